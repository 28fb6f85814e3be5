"""A discriminator that learns from the policy's own answers: which tokens it is told of, and what it mixes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.rewards.rollouts import Row, ids_of, rollout_of
from tlcr.config.schema import (
    DataConfig,
    DiscriminatorConfig,
    PPOConfig,
    RefreshConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from tlcr.data.labels import label_pair
from tlcr.errors import TrainingDiverged
from tlcr.models.discriminator import labels_of, token_logits
from tlcr.models.loading import load_token_classifier
from tlcr.recipes import refresh_discriminator
from tlcr.recipes.refresh_discriminator import DiscriminatorRefresh
from tlcr.rewards.sources import DiscriminatorSource, FrozenModel
from tlcr.types import EditPair, LabelledPair, Rollout

PROMPT = "The food was"


def config(*, max_new_tokens: int = 16, **refresh: float) -> RunConfig:
    return replace(
        RunConfig(),
        data=DataConfig(max_prompt_tokens=32, max_answer_tokens=32),
        discriminator=DiscriminatorConfig(batch_size=4, learning_rate=2e-2, weight_decay=0.0),
        reward=RewardConfig(refresh=RefreshConfig(**{"every": 2, **refresh})),
        rollout=RolloutConfig(max_new_tokens=max_new_tokens),
        ppo=PPOConfig(updates=10),
    )


def replaces_bad(answers: Sequence[tuple[str, str]], updates: int) -> list[EditPair]:
    """A reviser for which " bad" is wrong and " good" right."""
    return [EditPair(str(n), p, a, a.replace("bad", "good")) for n, (p, a) in enumerate(answers)]


def answers(tokenizer: PreTrainedTokenizerFast, number: int = 16) -> Rollout:
    texts = [" not bad at the", " the bad food", " food was bad"]
    rows = [Row(PROMPT, [*ids_of(tokenizer, texts[n % 3]), tokenizer.eos_token_id], True) for n in range(number)]
    return rollout_of(rows, tokenizer, left=2, right=1)


@pytest.fixture
def make(
    tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., DiscriminatorRefresh]:
    def make(
        cfg: RunConfig, original: Sequence[LabelledPair] = (), seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> DiscriminatorRefresh:
        model = load_token_classifier(tiny_causal_lm().to(dtype), cfg.model, id2label=labels_of("soft"))
        return DiscriminatorRefresh(
            cfg, model=model, tokenizer=tiny_tokenizer, original=lambda: original, revise=replaces_bad, seed=seed
        )

    return make


def rewards(model: PreTrainedModel, rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """What the reward source pays the tokens of the rollout, 2 D - 1."""
    signal = DiscriminatorSource(FrozenModel(model, tokenizer, tokenizer, 32))(rollout)
    assert signal.logits_BTC is not None
    return 2 * signal.logits_BTC.softmax(-1)[..., 1] - 1


def test_the_source_pays_the_removed_token_less_and_no_other(
    make: Callable[..., DiscriminatorRefresh], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The token that the reviser replaced falls, in the source that reads the model; its neighbours hardly move. A
    reward one token off would move them instead."""
    refresh = make(config(share=0.0, learning_rate=3e-3))
    rollout = answers(tiny_tokenizer)
    figures = [refresh(rollout, updates) for updates in range(2, 22, 2)]
    paid_BT = rewards(refresh.model, rollout, tiny_tokenizer)
    bad_BT = (rollout.response_ids_BT == ids_of(tiny_tokenizer, " bad")[0]) & rollout.mask_BT
    assert bad_BT.sum() == 16
    assert paid_BT[bad_BT].max() < -0.7 and paid_BT[~bad_BT & rollout.mask_BT].min() > -0.3
    assert figures[-1]["refresh/auc_after"] == 1 and figures[-1]["refresh/loss"] < figures[0]["refresh/loss"]
    assert figures[0]["refresh/pairs"] == 16 and figures[0]["refresh/revised_share"] == 1
    assert not refresh.model.training


def test_it_measures_on_what_it_is_not_trained_on_and_mixes_in_its_share(
    make: Callable[..., DiscriminatorRefresh],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 16 answers 4 are measured on and 12 trained on; with a share of 0.25, 4 of the first training's pairs join
    them. Which ones depends on the update, and on nothing else."""
    old = [
        label_pair(edit, tiny_tokenizer, max_prompt_tokens=32, max_answer_tokens=32, end_of_sequence="neutral")
        for edit in replaces_bad([(PROMPT, " bad bad")] * 9, 0)
    ]
    old = [replace(pair, id=f"old-{n}") for n, pair in enumerate(old)]
    trained: list[list[str]] = []
    measured: list[list[str]] = []
    collate, predict = refresh_discriminator.collate_pairs, refresh_discriminator.predict_tokens

    def collated(pairs: Sequence[LabelledPair], **options: object) -> object:
        trained[-1].extend(pair.id for pair in pairs)
        return collate(pairs, **options)  # type: ignore[arg-type]

    def predicted(model: PreTrainedModel, pairs: Sequence[LabelledPair], **options: int) -> object:
        measured.append([pair.id for pair in pairs])
        return predict(model, pairs, **options)

    monkeypatch.setattr(refresh_discriminator, "collate_pairs", collated)
    monkeypatch.setattr(refresh_discriminator, "predict_tokens", predicted)
    for updates in (2, 4, 2):
        trained.append([])
        make(config(share=0.25), old)(answers(tiny_tokenizer), updates)
    assert measured == [["0", "4", "8", "12"]] * 6
    for ids in trained:
        fresh = sorted(int(name) for name in ids if not name.startswith("old"))
        assert fresh == [n for n in range(16) if n % 4] and len(ids) == 16
    assert trained[0] == trained[2] != trained[1]


def test_an_end_behind_a_text_that_was_sampled_in_more_tokens_does_not_count(
    make: Callable[..., DiscriminatorRefresh],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policy wrote it letter by letter and was cut; read as a text it is shorter than the limit. Another answer of
    the same text ended."""
    letters = [token for letter in " bad" for token in ids_of(tiny_tokenizer, letter)]
    assert len(letters) > len(ids_of(tiny_tokenizer, " bad"))
    rows = [
        Row(PROMPT, letters, False),
        Row(PROMPT, [*ids_of(tiny_tokenizer, " bad"), tiny_tokenizer.eos_token_id], True),
    ]
    seen: list[LabelledPair] = []
    refresh = make(config(max_new_tokens=len(letters), share=0.0))
    monkeypatch.setattr(refresh, "_auc", lambda _, pairs: seen.extend(pairs) or {})
    monkeypatch.setattr(refresh, "_train", lambda pairs, _: seen.extend(pairs) or 0.0)
    refresh(rollout_of(rows, tiny_tokenizer, left=2, right=1), 2)
    cut, ended = (next(pair.rejected for pair in seen if pair.id == name) for name in ("0", "1"))
    assert cut.encoded.complete and cut.counted[-1] is False and all(cut.counted[:-1])
    assert ended.encoded.complete and all(ended.counted)


def test_no_end_is_labelled_where_the_length_limit_cut(
    make: Callable[..., DiscriminatorRefresh], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The policy chose no end there; data.max_answer_tokens, which is larger, would leave room for one."""
    edit = EditPair("cut", PROMPT, " not bad at the", " not good at the")
    length = len(ids_of(tiny_tokenizer, edit.rejected))
    cut = make(config(max_new_tokens=length))._labelled(edit, ended=False).rejected
    ended = make(config(max_new_tokens=length + 1))._labelled(edit, ended=True).rejected
    assert not cut.encoded.complete and len(cut.labels) == length and all(cut.counted)
    assert ended.encoded.complete and len(ended.labels) == length + 1 and all(ended.counted)
    assert cut.labels == ended.labels[:-1] == (0, -1, 0, 0)


def test_it_follows_every_so_many_updates_but_not_the_last(make: Callable[..., DiscriminatorRefresh]) -> None:
    refresh = make(config(every=5))
    assert [updates for updates in range(1, 12) if refresh.due(updates)] == [5]


def test_answers_without_an_edit_leave_no_area_and_no_answer_at_all_no_loss(
    make: Callable[..., DiscriminatorRefresh], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    refresh = make(config(share=0.0))
    refresh._revise = lambda answers, updates: [EditPair("same", p, a, a) for p, a in answers]
    figures = refresh(answers(tiny_tokenizer), 2)
    assert figures["refresh/revised_share"] == 0 and "refresh/auc_before" not in figures and figures["refresh/loss"] > 0
    refresh._revise = lambda answers, updates: [None] * len(answers)
    assert refresh(answers(tiny_tokenizer), 2) == {"refresh/pairs": 0.0, "refresh/revised_share": 0.0}


def test_what_it_saves_it_restores(
    make: Callable[..., DiscriminatorRefresh], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    refresh, rollout = make(config(share=0.0)), answers(tiny_tokenizer)
    refresh(rollout, 2)
    refresh.save(tmp_path)
    other = make(config(share=0.0))
    L = rollout.ids_BL.shape[1]
    logits = [token_logits(r.model, rollout.ids_BL, rollout.attention_mask_BL, slice(0, L)) for r in (refresh, other)]
    assert not torch.allclose(*logits)
    other.restore(tmp_path)
    torch.testing.assert_close(
        token_logits(other.model, rollout.ids_BL, rollout.attention_mask_BL, slice(0, L)), logits[0]
    )


def test_small_steps_of_a_bfloat16_discriminator_add_up_over_refreshes(
    make: Callable[..., DiscriminatorRefresh], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Three steps at a rate of 2e-6 are far below half a bfloat16 step of most weights, and sixty are not: what a
    refresh earns must not be rounded away at its end."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        refresh = make(config(share=0.0, learning_rate=2e-6), dtype=dtype)
        before = [p.detach().float().clone() for p in refresh.model.parameters()]
        for updates in range(2, 42, 2):
            refresh(answers(tiny_tokenizer), updates)
        after = [p.detach().float() for p in refresh.model.parameters()]
        moved.append(sum((a - b).abs().sum().item() for a, b in zip(after, before, strict=True)))
    assert moved[1] > 0.5 * moved[0] > 0


def test_a_loss_that_is_not_finite_says_what_to_lower(
    make: Callable[..., DiscriminatorRefresh], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    refresh = make(config(share=0.0, learning_rate=1.0))
    with torch.no_grad():
        next(refresh.model.parameters()).fill_(float("nan"))
    refresh._auc = lambda when, pairs: {}  # type: ignore[method-assign]
    with pytest.raises(
        TrainingDiverged, match=r"after 2 updates has the loss nan.*lower reward\.refresh\.learning_rate"
    ):
        refresh(answers(tiny_tokenizer), 2)
