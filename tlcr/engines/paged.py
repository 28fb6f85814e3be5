"""Continuous batching of transformers: when an answer ends, the next prompt takes its place at once.

Keys and values lie in pages that a call allocates and frees. Nothing is kept from one call to the next, neither they
nor the weights that made them. The library's part is `generate_batch`, and nothing outside this module calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from tlcr.engines.generate import generating_with, generation_config
from tlcr.engines.protocol import Answer, InProcess, Sampling, drawing_from
from tlcr.errors import BackendUnavailable, ConfigError
from tlcr.models import attention
from tlcr.models.faults import one_line
from tlcr.training.profiling import part

PAGE = 256
"""Tokens whose keys and values lie in one page, in each layer."""
STEP_TOKENS = 1024
"""Tokens that one step reads at most: prompts beyond it are read in the next one (ours; it bounds the mask)."""

REMEDY = "set engine: generate"


class Paged(InProcess):
    """``generate_batch`` of transformers. Raises ConfigError where it cannot run the policy (``fault_of``)."""

    def __init__(self, policy: PreTrainedModel) -> None:
        if (fault := fault_of(policy.config, type(policy))) is not None:
            raise ConfigError(f"engine is 'paged', and {fault}; {REMEDY}")
        self._policy = policy

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Answer]:
        """See ``Engine``."""
        with drawing_from(generator, self._policy.device):
            seed = int(torch.randint(2**63 - 1, (1,)))
        found = _generate_batch(self._policy, prompts, sampling, seed)
        lacking = [row for row, output in enumerate(found) if output is None or output.error is not None]
        if lacking:
            reasons = [one_line(output.error) for output in found if output is not None and output.error is not None]
            raise BackendUnavailable(
                f"engine 'paged' gave no answer to {len(lacking)} of {len(prompts)} prompts "
                f"({reasons[0] if reasons else 'its thread ended; the log says why'}); {REMEDY}"
            )
        device = self._policy.device
        return [
            Answer(
                torch.tensor(output.generated_tokens, dtype=torch.long, device=device),
                torch.tensor(output.logprobs, device=device) if sampling.logprobs else None,
            )
            for output in found
        ]


def fault_of(config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None) -> str | None:
    """Why continuous batching cannot run models of an architecture, found by running a small one.

    The small one has the config's own kinds of layers, one of each, few words and random weights in float32. It answers
    two prompts, and its log-probabilities are held to those of a forward pass.

    Args:
        config: of the policy; from it the small model is made.
        kind: the policy's class; None: the one that transformers has for the config.

    Returns:
        A clause; None where nothing is wrong.
    """
    own = config._attn_implementation
    if _implementation(own) is None:
        return f"model.attn_implementation {own!r} has no paged form (sdpa, eager and flash_attention_2 have one)"
    small = _small(config)
    key = kind, own, repr(sorted(small.to_dict().items()))
    if key not in _tried:
        _tried[key] = _try(small, kind, own)
    return _tried[key]


_tried: dict[tuple[type[PreTrainedModel] | None, str, str], str | None] = {}


def _try(config: PreTrainedConfig, kind: type[PreTrainedModel] | None, implementation: str) -> str | None:
    name = config.model_type if kind is None else kind.__name__
    implementation = "sdpa" if implementation.startswith("flash") else implementation  # which needs a GPU
    prompts = [list(range(5, 8)), list(range(9, 22))]
    sampling = Sampling(4, 0.0, 1.0, 0, (-1,), 0, batch_size=2, logprobs=True)
    make = AutoModelForCausalLM.from_config if kind is None else kind._from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = make(config, dtype=torch.float32, attn_implementation=implementation).eval()
            outputs = [_checked(output) for output in _generate_batch(model, prompts, sampling, seed=0)]
        except Exception as error:  # noqa: BLE001 - what a model's own code raises can be of any class
            return f"transformers' continuous batching cannot run {name} ({one_line(error)[:200]})"
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt + output.generated_tokens])
        with torch.no_grad():
            logprobs_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        read_T = logprobs_TV.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        if not torch.allclose(torch.tensor(output.logprobs), read_T, rtol=0, atol=1e-3):
            return f"transformers' continuous batching computes something else than {name} does"
    return None


def _checked(output: Any) -> Any:
    if output is None:
        raise RuntimeError("its thread ended")
    if output.error is not None:
        raise RuntimeError(output.error)
    return output


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same architecture with few words, narrow feed-forward layers, and one layer of each kind."""
    small = deepcopy(config.get_text_config())
    layers = list(dict.fromkeys(vars(small).get("layer_types") or ["all alike"]))
    if vars(small).get("layer_types"):
        small.layer_types = layers
    changes: dict[str, float] = {
        "num_hidden_layers": len(layers),
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    changes |= {"eos_token_id": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
    changes |= {"initializer_range": 0.3}  # with the usual 0.02 an error of positions would be lost in the rounding
    for field, value in changes.items():
        if getattr(small, field, None) is not None:
            setattr(small, field, value)
    return small


def _generate_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
) -> list[Any]:
    """transformers' output for each prompt; None where there is none. Torch's random state is left alone."""
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    rows = min(sampling.batch_size, len(prompts))
    options: dict[str, Any] = {
        "page_size": PAGE,
        "num_blocks": rows * math.ceil(longest / PAGE),
        "max_batch_tokens": max(STEP_TOKENS, rows),
        "max_requests_per_batch": rows,
        # Prompts of one batch seldom share a page, and pages of earlier weights must never be found again.
        "allow_block_sharing": False,
        "return_logprobs": sampling.logprobs,
        "seed": seed,
        "auto_switch_to_flash": False,  # model.attn_implementation decides, as it does in training
    }
    config = generation_config(sampling)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        _paged_attention(model),
        generating_with(model, config),
        part("rollout: paged"),
    ):
        outputs = model.generate_batch(  # type: ignore[operator]
            inputs=[list(prompt) for prompt in prompts],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**options),
            progress_bar=False,
        )
    numbers = {int(name.rpartition("_")[2]): output for name, output in outputs.items()}
    return [numbers.get(row) for row in range(len(prompts))]


@contextmanager
def _paged_attention(model: PreTrainedModel) -> Iterator[None]:
    """The attention that reads pages, in place of the model's own."""
    own = model.config._attn_implementation
    paged = _implementation(own)
    if paged is None or paged == own:
        yield
        return
    model.set_attn_implementation(paged)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _implementation(own: str) -> str | None:
    """transformers' name of the paged form of an attention implementation; None where there is none."""
    if own in ("sdpa", attention.NAME):
        return "sdpa"
    if own == "eager":
        return "paged|eager"
    return own if own.startswith(("flash_attention", "kernels-community/flash")) else None
