"""Rounds of weight updates by a real vLLM: every answer has the log-probabilities of the policy of its round.

``python -m tests.engines.real_vllm`` makes them with a vLLM in this process; .ci/engines.py with servers too.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.engines.helpers import PROMPTS, sampling, worst
from tlcr.config.schema import LoRAConfig, RolloutConfig
from tlcr.engines import Engine, Sampling, build_engine
from tlcr.models.lora.roles import Roles

TOLERANCE = 2e-5
"""Of a log-probability, in float32 with other kernels."""
WAYS: tuple[dict[str, Any], ...] = ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20})


def rounds(cfg: RolloutConfig, *, whole: int = 10, adapted: int = 10) -> None:
    """Moves the weights of a policy, and then of an adapter on one, sends them and samples, round after round."""
    for way in WAYS:
        how = replace(sampling(max_new_tokens=24, batch_size=8), **way)
        adapter = Roles(small(), LoRAConfig(rank=4), seed=0).policy
        for policy, count, what in ((small(), whole, ""), (adapter, adapted, " of an adapter")):
            with closing(build_engine(replace(cfg, batch_size=8, **way), policy)) as engine:
                for number in range(count):
                    move(policy, seed=number)
                    say(f"{cfg.engine}, {way}, round {number}{what}: {agreement(engine, policy, how)}")


def small() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval()


@torch.no_grad()
def move(policy: PreTrainedModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def agreement(engine: Engine, policy: PreTrainedModel, how: Sampling) -> str:
    """How far log-probabilities are from the policy's, after it was sent. Ends the command where they are not its."""
    began = time.monotonic()
    engine.refresh()
    seconds = time.monotonic() - began
    answers = engine.sample(PROMPTS, how, torch.Generator().manual_seed(1))
    gap, tokens = worst(policy, answers, how), sum(len(answer.ids_T) for answer in answers)
    if not gap < TOLERANCE:
        sys.exit(f"log-probabilities differ by {gap:.1e}, more than {TOLERANCE:.0e}")
    return f"{gap:.1e} over {tokens} tokens; weights sent and probed in {seconds:.2f} s"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    rounds(RolloutConfig(engine="vllm"))
