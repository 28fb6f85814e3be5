"""The discriminator's loss against hand-worked numbers and float64, its logits against each row read alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast

from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.discriminator import (
    classify,
    collate_pairs,
    discriminator_loss,
    labels_of,
    load_discriminator,
    predict_tokens,
    score_answers,
    target_distribution,
    temperature_of,
    token_logits,
)
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_token_classifier
from tlcr.models.saving import save_model
from tlcr.types import EncodedAnswer, LabelledAnswer, LabelledPair

PAD = 0


def labelled(
    side: str, prompt: list[int], ids: list[int], labels: list[int], counted: list[bool] | None = None
) -> LabelledAnswer:
    encoded = EncodedAnswer(ids=(*prompt, *ids), answer_start=len(prompt), complete=True)
    return LabelledAnswer(side, encoded, tuple(labels), tuple(counted or [True] * len(ids)))  # type: ignore[arg-type]


def pair(rejected_labels: list[int], revised_labels: list[int], *, prompt: int = 2, id: str = "p") -> LabelledPair:
    start = list(range(5, 5 + prompt))
    return LabelledPair(
        id,
        labelled("rejected", start, list(range(20, 20 + len(rejected_labels))), rejected_labels),
        labelled("revised", start, list(range(40, 40 + len(revised_labels))), revised_labels),
    )


@pytest.fixture
def classifier(tiny_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = load_token_classifier(tiny_causal_lm(seed=3), ModelConfig(), id2label=labels_of("soft"))
    torch.nn.init.normal_(model.score.weight, std=1.0)
    return model.eval()


# ---- collation


def test_collation_puts_every_label_at_its_own_token() -> None:
    rejected = labelled("rejected", [5, 6], [20, 21, 22], [0, -1, 0], [True, True, False])
    revised = labelled("revised", [5, 6, 7], [40], [1])
    batch = collate_pairs([LabelledPair("p", rejected, revised)], pad_token_id=PAD, targets="soft")
    assert batch["ids"].tolist() == [[5, 6, 20, 21, 22], [5, 6, 7, 40, PAD]]
    assert batch["attention_mask"].tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch["labels"].tolist() == [[0, 0, 0, -1, 0], [0, 0, 0, 1, 0]]
    assert batch["weights"].tolist() == [[0, 0, 0.5, 0.5, 0], [0, 0, 0, 1, 0]]


def test_masks_come_from_lengths_and_not_from_the_padding_id() -> None:
    p = LabelledPair("p", labelled("rejected", [PAD], [PAD, PAD], [0, -1]), labelled("revised", [PAD], [PAD], [1]))
    batch = collate_pairs([p], pad_token_id=PAD, targets="soft")
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]


# ---- loss


def test_targets_are_those_of_the_paper() -> None:
    labels = torch.tensor([-1, 0, 1])
    assert target_distribution(labels, 2).tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    assert target_distribution(labels, 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def hand_logits(batch: dict[str, Tensor], classes: int = 2) -> Tensor:
    """p(positive) = 0.8 at every position (and, of three classes, 0.1, 0.1, 0.8)."""
    p = torch.tensor([0.2, 0.8] if classes == 2 else [0.1, 0.1, 0.8], dtype=torch.float64)
    return p.log().expand(*batch["ids"].shape, classes).clone()


def test_soft_loss_worked_by_hand() -> None:
    # rejected: negative, neutral -> (-ln .2 + -(ln .2 + ln .8)/2) / 2; revised: positive, neutral, neutral, neutral
    batch = collate_pairs([pair([-1, 0], [1, 0, 0, 0])], pad_token_id=PAD, targets="soft")
    total, weight = discriminator_loss(hand_logits(batch), batch["labels"], batch["weights"])
    neutral = -(math.log(0.2) + math.log(0.8)) / 2
    wanted = (-math.log(0.2) + neutral) / 2 + (-math.log(0.8) + 3 * neutral) / 4
    assert weight.item() == 1
    assert total.item() == pytest.approx(wanted, rel=1e-6)


def test_hard_loss_counts_edited_tokens_only() -> None:
    batch = collate_pairs([pair([-1, 0], [1, 0, 0, 1])], pad_token_id=PAD, targets="hard")
    total, weight = discriminator_loss(hand_logits(batch), batch["labels"], batch["weights"])
    assert weight.item() == 1
    assert total.item() == pytest.approx(-math.log(0.2) - math.log(0.8), rel=1e-6)


def test_three_class_loss_is_plain_cross_entropy() -> None:
    batch = collate_pairs([pair([-1, 0], [1, 0, 0, 0])], pad_token_id=PAD, targets="three_class")
    total, _ = discriminator_loss(hand_logits(batch, 3), batch["labels"], batch["weights"])
    wanted = -math.log(0.1) + (-math.log(0.8) - 3 * math.log(0.1)) / 4
    assert total.item() == pytest.approx(wanted, rel=1e-6)


def test_a_side_with_nothing_counted_adds_neither_loss_nor_weight() -> None:
    inserted_only = collate_pairs([pair([0, 0], [0, 1, 0])], pad_token_id=PAD, targets="hard")
    total, weight = discriminator_loss(hand_logits(inserted_only), inserted_only["labels"], inserted_only["weights"])
    assert weight.item() == 0.5
    assert total.item() == pytest.approx(-math.log(0.8), rel=1e-6)
    untouched = collate_pairs([pair([0, 0], [0, 0])], pad_token_id=PAD, targets="hard")
    logits = hand_logits(untouched).requires_grad_()
    total, weight = discriminator_loss(logits, untouched["labels"], untouched["weights"])
    total.backward()
    assert (total.item(), weight.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", ["soft", "hard", "three_class"])
def test_value_and_gradient_against_a_loop_in_float64(targets: str) -> None:
    pairs = [pair([-1, 0, 0, -1], [1, 0]), pair([0], [0, 1, 0], prompt=4), pair([-1], [0])]
    batch = collate_pairs(pairs, pad_token_id=PAD, targets=targets)  # type: ignore[arg-type]
    classes = 3 if targets == "three_class" else 2
    logits = torch.randn(*batch["ids"].shape, classes, dtype=torch.float64)

    def by_loop(z: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for b, answer in enumerate([p.rejected for p in pairs] + [p.revised for p in pairs]):
            losses = []
            for t, label in enumerate(answer.labels):
                row = z[b, answer.encoded.answer_start + t]
                log_p = row - torch.logsumexp(row, 0)
                if targets == "three_class":
                    losses.append(-log_p[label + 1])
                elif label != 0:
                    losses.append(-log_p[1 if label > 0 else 0])
                elif targets == "soft":
                    losses.append(-log_p.sum() / 2)
            if losses:
                total = total + torch.stack(losses).mean()
        return total

    fast, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total, _ = discriminator_loss(fast, batch["labels"], batch["weights"])
    wanted = by_loop(truth)
    total.backward()
    wanted.backward()
    # the weights are float32
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast.grad, truth.grad, rtol=1e-6, atol=1e-6)
    # the check can fail: the same labels one token late
    late, _ = discriminator_loss(logits, batch["labels"].roll(1, 1), batch["weights"].roll(1, 1))
    assert abs(late.item() - wanted.item()) > 1e-2
    # bfloat16 logits are reduced in float32
    low = logits.bfloat16()
    torch.testing.assert_close(
        discriminator_loss(low, batch["labels"], batch["weights"])[0].double(),
        by_loop(low.double()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_stands_where_nothing_counts_reaches_neither_loss_nor_gradient() -> None:
    batch = collate_pairs([pair([-1, 0], [1, 0, 0])], pad_token_id=PAD, targets="soft")
    clean = torch.randn(*batch["ids"].shape, 2)
    dirty = torch.where((batch["weights"] > 0)[..., None], clean, torch.nan).requires_grad_()
    total, _ = discriminator_loss(dirty, batch["labels"], batch["weights"])
    total.backward()
    assert torch.equal(total, discriminator_loss(clean, batch["labels"], batch["weights"])[0])
    assert dirty.grad is not None and torch.isfinite(dirty.grad).all()


def loss_and_gradient(
    model: PreTrainedModel, parts: list[list[LabelledPair]], widen: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all parts together, each run through the model on its own, and every parameter's gradient."""
    model.zero_grad()
    batches = [collate_pairs(part, pad_token_id=PAD, targets="soft") for part in parts]
    totals, weights = [], []
    for batch in batches:
        batch = {name: torch.nn.functional.pad(value, (0, widen)) for name, value in batch.items()}
        logits = classify(model, batch["ids"], batch["attention_mask"])
        total, weight = discriminator_loss(logits, batch["labels"], batch["weights"])
        totals.append(total)
        weights.append(weight)
    loss = sum(totals) / sum(weights)
    loss.backward()  # type: ignore[union-attr]
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]  # type: ignore[return-value]


def test_loss_is_the_same_padded_wider_permuted_and_in_parts(classifier: PreTrainedModel) -> None:
    pairs = [pair([-1, 0, 0, -1], [1, 0]), pair([0], [0, 1, 0], prompt=4), pair([-1], [0, 1]), pair([0, 0], [1])]
    loss, gradients = loss_and_gradient(classifier, [pairs])
    for parts, widen in (([pairs], 5), ([pairs[::-1]], 0), ([[p] for p in pairs], 0), ([pairs[:3], pairs[3:]], 2)):
        other, others = loss_and_gradient(classifier, parts, widen)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    # the check can fail: the mean of the parts' means is another number
    singles = [loss_and_gradient(classifier, [[p]])[0] for p in (pairs[0], pairs[1])]
    uneven = torch.stack([singles[0], loss_and_gradient(classifier, [pairs[1:]])[0]]).mean()
    assert abs(uneven.item() - loss.item()) > 1e-4


# ---- logits of a rollout


def padded_rollout() -> tuple[list[list[int]], list[list[int]], Tensor, Tensor, int]:
    prompts, responses = [[7, 8, 9], [10], [], [11, 12]], [[30, 31], [32, 33, 34, 35], [36], []]
    P, T = 3, 4
    ids, mask = torch.full((4, P + T), PAD), torch.zeros(4, P + T, dtype=torch.bool)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = [*prompt, *response]
        start = P - len(prompt)
        ids[b, start : start + len(row)] = torch.tensor(row)
        mask[b, start : start + len(row)] = True
    return prompts, responses, ids, mask, P


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_logits_of_a_rollout_are_those_of_each_row_alone(
    architecture: str,
    micro_batch_size: int | None,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_gpt2: Callable[..., PreTrainedModel],
) -> None:
    # GPT-2 has absolute positions: left padding would move them
    lm = tiny_causal_lm() if architecture == "llama" else tiny_gpt2()
    model = load_token_classifier(lm, ModelConfig(), id2label=labels_of("soft"))
    torch.nn.init.normal_(classification_head(model).weight)
    prompts, responses, ids, mask, P = padded_rollout()
    logits = token_logits(model, ids, mask, slice(P, ids.shape[1]), micro_batch_size=micro_batch_size)
    assert logits.shape == (4, 4, 2) and logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.isfinite(logits).all()
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if response:
            row = torch.tensor([[*prompt, *response]])
            alone = model.eval()(input_ids=row).logits[0, len(prompt) :]
            torch.testing.assert_close(logits[b, : len(response)], alone, rtol=1e-4, atol=1e-5)
            if len(response) > 1:  # a shift by one token is another number
                assert not torch.allclose(logits[b, 1 : len(response)], alone[:-1], rtol=1e-4, atol=1e-5)


def test_tokens_masked_inside_an_answer_are_not_seen(classifier: PreTrainedModel) -> None:
    ids = torch.tensor([[PAD, 7, 8, 30, 31, 32, 33, PAD]])
    mask = torch.tensor([[False, True, True, True, False, True, True, False]])
    logits = token_logits(classifier, ids, mask, slice(3, 8))
    alone = classifier(input_ids=ids[mask][None]).logits[0, 2:]
    torch.testing.assert_close(logits[0, [0, 2, 3]], alone, rtol=1e-4, atol=1e-5)


def test_logits_of_no_rows_and_no_tokens(classifier: PreTrainedModel) -> None:
    empty = torch.zeros(0, 5, dtype=torch.long)
    assert token_logits(classifier, empty, empty.bool(), slice(2, 5)).shape == (0, 3, 2)
    row = torch.ones(2, 3, dtype=torch.long)
    assert token_logits(classifier, row, row.bool(), slice(3, 3)).shape == (2, 0, 2)


def test_scoring_leaves_the_model_in_the_mode_it_was_in(classifier: PreTrainedModel) -> None:
    classifier.train()
    row = torch.ones(1, 3, dtype=torch.long)
    token_logits(classifier, row, row.bool(), slice(1, 3))
    assert classifier.training
    assert classifier(input_ids=row).logits.requires_grad


# ---- predictions and scores


def test_predictions_come_in_the_order_of_the_pairs(classifier: PreTrainedModel) -> None:
    pairs = [pair([-1, 0], [1, 0, 0], prompt=5), pair([0, 0, -1, 0, 0, 0], [1])]
    partly = LabelledPair("q", labelled("rejected", [5], [20, 21], [-1, 0], [True, False]), pairs[0].revised)
    pairs.append(partly)
    found = predict_tokens(classifier, pairs, pad_token_id=PAD, batch_size=2)
    assert found.labels_N.tolist() == [-1, 0, 1, 0, 0, 0, 0, -1, 0, 0, 0, 1, -1, 1, 0, 0]
    assert found.answer_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 4, 5, 5, 5]
    alone = [
        classifier(input_ids=torch.tensor([a.encoded.ids])).logits[0, a.encoded.answer_start :][list(a.counted)]
        for p in pairs
        for a in (p.rejected, p.revised)
    ]
    torch.testing.assert_close(found.logits_NC, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_scores_of_texts(classifier: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    limits = {"max_prompt_tokens": 64, "max_answer_tokens": 64, "batch_size": 2}
    answers = [("The food", " was good"), ("I", " would never recommend this place at all."), ("Bread:", " café")]
    classifier.config.tlcr_temperature = 1.7
    scores = score_answers(classifier, tiny_tokenizer, answers, **limits)
    for (prompt, answer), score in zip(answers, scores, strict=True):
        assert "".join(score.pieces) == answer + "<eos>"
        assert len(score.pieces) == len(score.ids) == len(score.rewards) == len(score.p_positive)
        start = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        logits = classifier(input_ids=torch.tensor([start + list(score.ids)])).logits[0, len(start) :].double()
        p = torch.sigmoid((logits[:, 1] - logits[:, 0]) / 1.7)
        assert score.p_positive == pytest.approx(p.tolist(), abs=1e-5)
        assert score.rewards == pytest.approx((2 * p - 1).tolist(), abs=1e-5)
        assert score.mean_reward == pytest.approx((2 * p - 1).mean().item(), abs=1e-5)
    assert score_answers(classifier, tiny_tokenizer, [], **limits) == []
    cut = score_answers(classifier, tiny_tokenizer, answers, **{**limits, "max_answer_tokens": 1})
    assert [score.ids for score in cut] == [score.ids[:1] for score in scores]


# ---- loading


def test_a_saved_discriminator_loads_anywhere_and_as_it_was(
    classifier: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_top_layers_bidirectional(classifier, 1)
    classifier.config.tlcr_temperature = 2.5
    save_model(classifier, tiny_tokenizer, tmp_path / "d")
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    model, tokenizer = load_discriminator(tmp_path / "d", ModelConfig(path="elsewhere", pad_token="<unused>"))
    assert temperature_of(model) == 2.5 and not model.training
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert torch.equal(classify(model, ids, mask), classify(classifier, ids, mask))
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "d")
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    assert plain.config.label2id == {"negative": 0, "positive": 1}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name])
    # which layers see what is not in the weights: plain transformers reads them causally
    assert not torch.equal(classify(plain.eval(), ids, mask), classify(classifier, ids, mask))


def test_wrong_labels_are_refused_by_name(
    classifier: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(classifier, tiny_tokenizer, tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    for wrong in (["positive", "negative"], ["O", "B-PER"]):
        config["id2label"] = {str(i): name for i, name in enumerate(wrong)}
        config["label2id"] = {name: i for i, name in enumerate(wrong)}
        (tmp_path / "d" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=f"{wrong[0]}.*{wrong[1]}.*wanted.*negative.*positive"):
            load_discriminator(tmp_path / "d", ModelConfig())
