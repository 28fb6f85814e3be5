"""A real vLLM serves a policy on the CPU: its answers have the trainer's log-probabilities after every update.

Usage: python .ci/engines.py [ROUNDS]

In each of ten rounds the weights move, are sent, and sample at a temperature, with top-p, and with top-k. Three more
send a policy with an adapter. The environment is that of .ci/vllm.py.
"""

import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402
from vllm import installed, served  # type: ignore[attr-defined]  # noqa: E402

from tests.ppo.engines.test_server import PROMPTS, sampling, worst  # noqa: E402
from tlcr.config.schema import LoRAConfig, RolloutConfig  # noqa: E402
from tlcr.models.adapters import Roles  # noqa: E402
from tlcr.ppo.engines import build_engine  # noqa: E402

TOLERANCE = 2e-5
"""Of a log-probability, in float32 with other kernels."""
WAYS: tuple[dict[str, Any], ...] = ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20})


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    torch.manual_seed(0)
    policy = small()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small().save_pretrained(folder / "model")
        began = time.monotonic()
        arguments = ["serve", str(folder / "model"), "--dtype", "float32", "--max-model-len", "256"]
        arguments += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--skip-tokenizer-init"]
        with served(installed(), arguments, folder) as url:
            say(f"a server was ready after {time.monotonic() - began:.0f} s")
            for number in range(rounds):
                move(policy, seed=number)
                say(f"round {number}: {agreement(policy, url)}")
            roles = Roles(small(), LoRAConfig(rank=4), seed=0)
            for number in range(3):
                move(roles.policy, seed=number)
                say(f"adapter, round {number}: {agreement(roles.policy, url)}")
    say("every answer had the log-probabilities of the policy of its round")


def small() -> PreTrainedModel:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval()


@torch.no_grad()
def move(policy: PreTrainedModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def agreement(policy: PreTrainedModel, url: str) -> str:
    """How far log-probabilities are from the policy's, after it was sent. Ends the command where they are not its."""
    found = {}
    for way in WAYS:
        how = replace(sampling(max_new_tokens=24, batch_size=8), **way)
        cfg = RolloutConfig(engine="server", server=(url,), **way)
        with closing(build_engine(cfg, policy)) as engine:
            began = time.monotonic()
            engine.refresh()
            seconds = time.monotonic() - began
            answers = engine.sample(PROMPTS, how, torch.Generator().manual_seed(1))
        found[str(way)] = worst(policy, answers, how)
        if not found[str(way)] < TOLERANCE:
            sys.exit(f"{way}: log-probabilities differ by {found[str(way)]:.1e}, more than {TOLERANCE:.0e}")
    return ", ".join(f"{way} {gap:.1e}" for way, gap in found.items()) + f"; weights sent and probed in {seconds:.2f} s"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
