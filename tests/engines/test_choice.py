"""What ``rollout.engine: auto`` takes, that it is used, and that the doctor says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from tests.ppo.helpers import run_ppo, small_config
from tlcr.config.schema import RolloutConfig, RunConfig
from tlcr.engines import build_engine, choose, resolved
from tlcr.engines.generate import Generate
from tlcr.errors import CheckpointError
from tlcr.experiment.preflight import preflight

LM = Callable[..., PreTrainedModel]


def large(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **changes: Any) -> PreTrainedModel:
    """Of 135M parameters, none of which has a value."""
    sizes = {"vocab_size": 200_000, "hidden_size": 288, "num_hidden_layers": 2, "num_attention_heads": 9}
    with torch.device("meta"):
        return kind._from_config(config(**(sizes | changes)), attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("policy", "settings", "engine", "why"),
    [
        (large, {"server": ("http://a", "http://b")}, "server", "names 2 of them"),
        (large, {"batch_size": 32}, "paged", "continuous batching runs this model"),
        (large, {"batch_size": 33}, "generate", "with sdpa continuous batching was measured up to .* 32, and it is 33"),
        (lambda: large(vocab_size=1000), {"batch_size": 8}, "generate", r"as small as this one \(\d+\.\dM\)"),
        (
            lambda: large(FalconForCausalLM, FalconConfig, vocab_size=400_000),
            {"batch_size": 8},
            "generate",
            "cannot run Falcon",
        ),
    ],
    ids=["servers", "paged", "many answers", "a small model", "what pages cannot run"],
)
def test_auto_takes_the_fastest_that_is_there(
    policy: Callable[[], PreTrainedModel], settings: dict[str, Any], engine: str, why: str
) -> None:
    cfg, model = RolloutConfig(engine="auto", **settings), policy()
    found = choose(cfg, model)
    assert found.engine == engine == resolved(cfg, model).engine
    assert re.search(why, found.why) and "\n" not in found.why


def test_a_named_engine_is_taken_whatever_the_model() -> None:
    cfg = RolloutConfig(engine="static")
    assert choose(cfg, large()).engine == "static" and resolved(cfg, large()) is cfg


def test_a_run_is_resumed_by_the_engine_that_auto_took(
    tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As one that named it, and by no other."""
    assert isinstance(build_engine(RolloutConfig(engine="auto"), tiny_causal_lm()), Generate)
    cfg = small_config(updates=1)
    auto = replace(cfg, rollout=replace(cfg.rollout, engine="auto"))
    run_ppo(auto, tiny_causal_lm, tiny_tokenizer, tmp_path)
    _, result = run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path, resume=True)
    assert result.updates == 1
    paged = replace(cfg, rollout=replace(cfg.rollout, engine="paged"))
    with pytest.raises(CheckpointError):
        run_ppo(paged, tiny_causal_lm, tiny_tokenizer, tmp_path, resume=True)


def test_the_doctor_says_which_and_why(tmp_path: Path) -> None:
    cfg = RunConfig(output_dir=str(tmp_path / "run"))
    found = preflight(replace(cfg, rollout=replace(cfg.rollout, engine="auto")))
    (finding,) = (finding for finding in found if finding.subject == "rollout.engine")
    assert (finding.level, finding.fact) == (
        "note",
        "rollout.engine auto takes 'generate': continuous batching is slower for models as small as this one (0.2M)",
    )
