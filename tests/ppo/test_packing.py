"""PPO with packed rows: scores and runs are those of padded rows, and models that cannot read them are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.models.architectures import config_class, tiny_model
from tests.ppo.helpers import double_actor_critic, known_rollout, run_ppo, small_config
from tlcr.errors import ConfigError
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo import packing
from tlcr.ppo.packing import packs_rows
from tlcr.ppo.scores import score_rollout
from tlcr.training.metrics import read_metrics
from tlcr.types import PolicyScores

LM = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("exact_kl", [False, True])
@pytest.mark.parametrize("tokens", [None, 20])
def test_scores_of_packed_rows_are_those_of_padded_ones(
    tiny_gpt2: LM, tiny_causal_lm: LM, exact_kl: bool, tokens: int | None
) -> None:
    rollout = known_rollout(extra_left=2, extra_right=1)
    rollout.mask_BT[3] = False  # an empty answer
    for make_lm in (tiny_gpt2, tiny_causal_lm):
        actor_critic, reference = double_actor_critic(make_lm), make_lm(seed=5).double()

        def scores(packed: bool) -> PolicyScores:
            return score_rollout(
                actor_critic,  # noqa: B023
                reference,  # noqa: B023
                rollout,
                temperature=0.7,
                micro_batch_size=None,
                micro_batch_tokens=tokens if packed else None,
                packed=packed,
                exact_kl=exact_kl,
            )

        for expected, found in zip(vars(scores(False)).values(), vars(scores(True)).values(), strict=True):
            if expected is not None:
                assert expected.abs().sum() > 0 and (found[3] == 0).all()
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_run_with_packed_rows_is_the_run_with_padded_ones(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of train_ppo: sampling does not change, and scores and updates differ by rounding."""
    laid_out: dict[str, set[str]] = {"never": set(), "always": set()}
    read = ActorCritic.forward
    for setting, seen in laid_out.items():

        def forward(self: ActorCritic, ids, layout, actions, **options):  # type: ignore[no-untyped-def]
            seen.add(type(layout).__name__)  # noqa: B023
            return read(self, ids, layout, actions, **options)

        monkeypatch.setattr(ActorCritic, "forward", forward)
        cfg = small_config(packing=setting, updates=2, value_model="separate")
        run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path / setting)
    assert laid_out == {"never": {"Tensor"}, "always": {"Packing"}}
    padded, packed = (read_metrics(tmp_path / setting / "metrics.jsonl") for setting in laid_out)
    assert len(padded) == len(packed) == 2
    for one, other in zip(padded, packed, strict=True):
        timeless = {key for key in one if not key.startswith("time")}
        assert {key: one[key] for key in timeless} == pytest.approx(
            {key: other[key] for key in timeless}, rel=1e-3, abs=1e-5
        )


def test_packing_may_be_turned_on_when_a_run_is_resumed(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run_ppo(small_config(updates=2), tiny_causal_lm, tiny_tokenizer, tmp_path)
    (tmp_path / "done.json").unlink()
    _, result = run_ppo(
        small_config(updates=3, packing="always"), tiny_causal_lm, tiny_tokenizer, tmp_path, resume=True
    )
    assert result.updates == 3


# ---- which runs pack


@pytest.fixture
def models(tiny_causal_lm: LM) -> tuple[ActorCritic, PreTrainedModel]:
    return ActorCritic(tiny_causal_lm(seed=1), None), tiny_causal_lm(seed=2)


def test_without_flash_attention_on_a_gpu_auto_does_not_pack(
    models: tuple[ActorCritic, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "packing_fault", lambda model: pytest.fail("tried"))
    assert not packs_rows("auto", *models)
    assert not packs_rows("never", *models)


def test_auto_packs_where_every_model_runs_flash_attention(
    models: tuple[ActorCritic, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = models[1]
    monkeypatch.setattr(packing, "_runs_flash", lambda model: model is not reference)
    assert not packs_rows("auto", *models)
    monkeypatch.setattr(packing, "_runs_flash", lambda model: True)
    assert packs_rows("auto", *models)


def test_flash_attention_counts_on_a_gpu_alone(tiny_causal_lm: LM) -> None:
    with torch.device("meta"):
        on_device = tiny_causal_lm(seed=1)
    names = {"flash_attention_2": True, "kernels-community/flash-attn3": True, "sdpa": False, "tlcr_sdpa": False}
    for name, runs in names.items():
        on_device.config._attn_implementation = name
        assert packing._runs_flash(on_device) is runs
    own = tiny_causal_lm(seed=1)
    own.config._attn_implementation = "flash_attention_2"
    assert not packing._runs_flash(own)


def test_a_model_that_mixes_rows_is_refused_or_noted(
    tiny_causal_lm: LM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actor_critic, opt = ActorCritic(tiny_causal_lm(seed=1), None), tiny_model(config_class("opt"))
    said = r"the reference, a OPTForCausalLM with attention sdpa, mixes packed rows: .* the rows before"
    with pytest.raises(ConfigError, match=rf"^ppo.packing is 'always', but {said}; set ppo.packing to never$"):
        packs_rows("always", actor_critic, opt)
    monkeypatch.setattr(packing, "_runs_flash", lambda model: True)
    with caplog.at_level(logging.WARNING, logger="tlcr"):
        assert not packs_rows("auto", actor_critic, opt)
    (note,) = caplog.messages
    assert note.startswith("rows are padded, not packed (ppo.packing: auto): the reference")


def test_the_value_model_is_tried_too(tiny_causal_lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    actor_critic = double_actor_critic(tiny_causal_lm)
    value_model = actor_critic.value_model
    monkeypatch.setattr(packing, "packing_fault", lambda model: "fails" if model is value_model else None)
    with pytest.raises(ConfigError, match=r"the value model, a LlamaForTokenClassification with attention .*, fails"):
        packs_rows("always", actor_critic, tiny_causal_lm(seed=3))
