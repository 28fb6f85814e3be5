"""Evaluation: sums over counted tokens only, ratios of sums, errors by the delta method, all worked out by hand."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tlcr.errors import DataError, ShapeError
from tlcr.evaluation.drift import WordGold
from tlcr.evaluation.evaluate import (
    Detailer,
    EvaluatedAnswer,
    PolicyEvaluation,
    TokenDetail,
    evaluate_policy,
    mean_of,
    ratio_of_sums,
    summarise,
    write_evaluation,
)
from tlcr.text.padding import pad_left
from tlcr.text.tokenization import character_spans
from tlcr.types import PolicyScores, Rollout

PROMPTS = ("Human: bread?", "Human: soup, please?")
RESPONSES = (" good", " never recommend it")
NAN = float("nan")


class Sampler:
    """Answers of fixed ids, the first shorter, with NaN wherever nothing is counted."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.asked: list[tuple[str, ...]] = []

    def generate(self, prompts: Sequence[str]) -> Rollout:
        self.asked.append(tuple(prompts))
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        answers = []
        for prompt in prompts:
            which = PROMPTS.index(prompt)
            ids = self.tokenizer(RESPONSES[which])["input_ids"]
            answers.append([*ids, eos] if which == 0 else ids)  # the second was cut off
        encoded = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        width, longest = max(map(len, encoded)), max(map(len, answers))
        return Rollout(
            prompts=tuple(prompts),
            responses=tuple(RESPONSES[PROMPTS.index(prompt)] for prompt in prompts),
            prompt_ids_BP=torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded]),
            prompt_mask_BP=torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in encoded]),
            response_ids_BT=torch.tensor([ids + [pad] * (longest - len(ids)) for ids in answers]),
            mask_BT=torch.tensor([[True] * len(ids) + [False] * (longest - len(ids)) for ids in answers]),
            ended_B=torch.tensor([PROMPTS.index(prompt) == 0 for prompt in prompts]),
        )

    def score(self, rollout: Rollout) -> PolicyScores:
        return PolicyScores(
            logprobs_BT=_ramp(rollout, -0.5, 0.0),
            ref_logprobs_BT=_ramp(rollout, -0.5, -0.25),
            values_BT=_ramp(rollout, 1.0, 1.0),
            entropy_BT=_ramp(rollout, 2.0, 0.0),
            kl_BT=_ramp(rollout, 0.125, 0.0),
        )


def _ramp(rollout: Rollout, start: float, slope: float) -> Tensor:
    """start + slope * t at counted positions, NaN elsewhere."""
    steps_T = torch.arange(rollout.mask_BT.shape[1], dtype=torch.float32)
    return torch.where(rollout.mask_BT, start + slope * steps_T, NAN)


def _gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [3.0 if response == RESPONSES[0] else -1.0 for response in responses]


def _detail(rollout: Rollout, scores: PolicyScores) -> TokenDetail:
    return TokenDetail(_ramp(rollout, 4.0, 2.0), _ramp(rollout, 10.0, 1.0), _ramp(rollout, -1.0, 0.5))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_measures_by_hand(tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    sampler = Sampler(tiny_tokenizer)
    result = evaluate_policy(
        PROMPTS,
        tokenizer=tiny_tokenizer,
        generate=sampler.generate,
        score=sampler.score,
        scorer=_gold,
        batch_size=batch_size,
    )
    assert sampler.asked == ([PROMPTS] if batch_size == 2 else [PROMPTS[:1], PROMPTS[1:]])
    a, b = len(tiny_tokenizer(RESPONSES[0])["input_ids"]) + 1, len(tiny_tokenizer(RESPONSES[1])["input_ids"])
    assert a != b
    kl = [0.25 * n * (n - 1) / 2 for n in (a, b)]  # the log-ratio at t is 0.25 t
    assert result.gold_per_token == pytest.approx(2 / (a + b))
    assert result.gold_per_answer == pytest.approx(1.0)
    assert result.kl_per_token == pytest.approx(sum(kl) / (a + b))
    assert result.kl_per_answer == pytest.approx(sum(kl) / 2)
    assert result.exact_kl_per_token == pytest.approx(0.125)
    assert result.entropy == pytest.approx(2.0)
    assert result.length == pytest.approx((a + b) / 2)
    assert result.ended_share == 0.5
    assert result.answers == 2
    assert result.standard_errors["gold_per_answer"] == pytest.approx(math.sqrt(8 / 2))
    assert result.standard_errors["exact_kl_per_token"] == pytest.approx(0.0, abs=1e-9)
    assert result.samples == ()
    assert result.proxy_per_token is None and "proxy_per_answer" not in result.metrics()
    assert result.metrics()["gold_per_token"] == result.gold_per_token


@pytest.mark.parametrize("samples", [0, 1])
def test_the_arms_own_reward_is_measured_on_all_answers(tiny_tokenizer: PreTrainedTokenizerFast, samples: int) -> None:
    sampler = Sampler(tiny_tokenizer)
    result = evaluate_policy(
        PROMPTS,
        tokenizer=tiny_tokenizer,
        generate=sampler.generate,
        score=sampler.score,
        scorer=None,
        batch_size=1,
        samples=samples,
        detail=_detail,
    )
    lengths = [len(tiny_tokenizer(RESPONSES[0])["input_ids"]) + 1, len(tiny_tokenizer(RESPONSES[1])["input_ids"])]
    proxy = [sum(4.0 + 2.0 * t for t in range(n)) for n in lengths]
    assert result.proxy_per_answer == pytest.approx(sum(proxy) / 2)
    assert result.proxy_per_token == pytest.approx(sum(proxy) / sum(lengths))


def test_samples_hold_each_counted_action(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = Sampler(tiny_tokenizer)
    result = evaluate_policy(
        PROMPTS[::-1],
        tokenizer=tiny_tokenizer,
        generate=sampler.generate,
        score=sampler.score,
        scorer=None,
        samples=2,
        detail=_detail,
    )
    cut, ended = result.samples
    assert ended.tokens[-1] == tiny_tokenizer.eos_token
    assert "".join(ended.tokens[:-1]) == RESPONSES[0] and "".join(cut.tokens) == RESPONSES[1]
    for answer in (cut, ended):
        steps = range(len(answer.tokens))
        assert answer.length == len(answer.tokens)
        assert answer.reward == pytest.approx([10.0 + t for t in steps])
        assert answer.advantage == pytest.approx([-1.0 + 0.5 * t for t in steps])
        assert answer.value == pytest.approx([1.0 + t for t in steps])
        assert answer.token_kl == pytest.approx([0.25 * t for t in steps])
        assert sum(answer.token_kl) == pytest.approx(answer.kl)
    assert result.gold_per_token is None and cut.gold is None
    assert "gold_per_token" not in result.metrics() and "entropy" in result.metrics()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_discriminator_is_held_against_the_gold_of_words(
    tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    """The word "good" is good, "never" and "recommend" are bad, and "it" is worth nothing. Whoever looks one token late
    sees another word's confidence."""
    sure = {" good": 0.9, " never": 0.2, " recommend": 0.3, " it": 0.8}

    def words(prompt: str, response: str) -> list[tuple[int, int, float]]:
        golds = {"good": 2.0, "never": -1.0, "recommend": -0.5, "it": 0.0}
        return [(m.start(), m.end(), golds[m.group()]) for m in re.finditer(r"\w+", response)]

    def detail(rollout: Rollout, scores: PolicyScores) -> TokenDetail:
        confidence_BT = torch.full(rollout.mask_BT.shape, NAN)
        for row, response in enumerate(rollout.responses):
            spans = character_spans(tiny_tokenizer, rollout.response_ids_BT[row][rollout.mask_BT[row]].tolist())
            for t, (start, _) in enumerate(spans):
                here = [
                    c for word, c in sure.items() if 0 <= start - response.find(word) < len(word) and word in response
                ]
                confidence_BT[row, t] = here[0] if here else 0.05
        return replace(_detail(rollout, scores), confidence_BT=confidence_BT)

    def run(detail: Detailer, word_gold: WordGold | None) -> PolicyEvaluation:
        sampler = Sampler(tiny_tokenizer)
        options = {"score": sampler.score, "scorer": None, "batch_size": batch_size, "detail": detail}
        return evaluate_policy(
            PROMPTS, tokenizer=tiny_tokenizer, generate=sampler.generate, word_gold=word_gold, **options
        )

    found = run(detail, words)
    assert found.discriminator_auc == 1.0
    ids = {word: len(tiny_tokenizer(word)["input_ids"]) for word in sure}
    errors = ids[" good"] * 0.1 + ids[" never"] * 0.2 + ids[" recommend"] * 0.3
    assert found.discriminator_ece == pytest.approx(errors / (ids[" good"] + ids[" never"] + ids[" recommend"]))
    assert found.metrics()["discriminator_auc"] == found.to_json()["discriminator_auc"] == 1.0

    def late(rollout: Rollout, scores: PolicyScores) -> TokenDetail:
        given = detail(rollout, scores)
        assert given.confidence_BT is not None
        return replace(given, confidence_BT=given.confidence_BT.roll(1, dims=1).nan_to_num(0.5))

    assert (run(late, words).discriminator_auc or 0.0) < 1.0
    for without in (run(_detail, words), run(detail, None)):
        assert without.discriminator_auc is None and "discriminator_ece" not in without.metrics()


def test_only_so_many_samples_are_kept(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = Sampler(tiny_tokenizer)

    def run(samples: int, batch_size: int) -> list[str]:
        result = evaluate_policy(
            PROMPTS * 3,
            tokenizer=tiny_tokenizer,
            generate=sampler.generate,
            score=sampler.score,
            scorer=None,
            samples=samples,
            batch_size=batch_size,
        )
        assert result.answers == 6
        return [answer.prompt for answer in result.samples]

    assert run(3, 2) == run(3, 6) == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert run(0, 4) == []


def test_shares_of_several_processes_are_one_evaluation(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of three prompts in batches of one, the second process has one, and asks as often as the first. The samples are
    those of the first prompts, though they were answered in different processes."""
    prompts = [*PROMPTS, PROMPTS[0]]
    others: list[EvaluatedAnswer] = []

    def evaluate(share: tuple[int, int], expected: list[tuple[str, ...]]) -> object:
        sampler = Sampler(tiny_tokenizer)

        def gather(mine: list[EvaluatedAnswer]) -> list[EvaluatedAnswer]:
            others.extend(mine)
            return list(others)  # one process after the other

        found = evaluate_policy(
            prompts,
            tokenizer=tiny_tokenizer,
            generate=sampler.generate,
            score=sampler.score,
            scorer=_gold,
            batch_size=1,
            samples=2,
            share=share,
            gather=gather,
        )
        assert sampler.asked == expected
        return found

    alone = evaluate((0, 1), [(prompt,) for prompt in prompts])
    others.clear()
    evaluate((0, 2), [(PROMPTS[0],), (PROMPTS[0],)])
    assert evaluate((1, 2), [(PROMPTS[1],), (PROMPTS[0],)]) == alone
    assert alone.answers == 3
    assert [sample.prompt for sample in alone.samples] == prompts[:2]


def test_a_bad_scorer_is_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = Sampler(tiny_tokenizer)

    def run(scorer: object) -> None:
        evaluate_policy(
            PROMPTS,
            tokenizer=tiny_tokenizer,
            generate=sampler.generate,
            score=sampler.score,
            scorer=scorer,  # type: ignore[arg-type]
        )

    with pytest.raises(DataError, match=r"the scorer raised ZeroDivisionError: division by zero \(.*\.py:"):
        run(lambda prompts, responses: [1 / 0])
    with pytest.raises(DataError, match="returned 1 scores for 2 answers"):
        run(lambda prompts, responses: [0.0])
    with pytest.raises(DataError, match=r"returned nan for the answer ' never recommend it'"):
        run(lambda prompts, responses: [0.0, NAN])
    with pytest.raises(DataError, match="the scorer raised SystemExit: 0"):
        run(lambda prompts, responses: sys.exit(0))
    for wrong in (None, 1.0, {0: 1.0, 1: 2.0}, {1.0, 2.0}, "12"):
        with pytest.raises(DataError, match=f"returned a {type(wrong).__name__}; it must return a list"):
            run(lambda prompts, responses, wrong=wrong: wrong)
    for value in (None, (1.0, 2.0), "good"):
        with pytest.raises(DataError, match=rf"\({type(value).__name__}\) for an answer; it must return"):
            run(lambda prompts, responses, value=value: [0.0, value])
    with pytest.raises(DataError, match="no held-out prompts"):
        evaluate_policy([], tokenizer=tiny_tokenizer, generate=sampler.generate, score=sampler.score, scorer=None)


def test_details_of_another_shape_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = Sampler(tiny_tokenizer)

    def shifted(rollout: Rollout, scores: PolicyScores) -> TokenDetail:
        detail = _detail(rollout, scores)
        return replace(detail, advantages_BT=detail.advantages_BT[:, 1:])

    with pytest.raises(ShapeError, match="advantages_BT has shape"):
        evaluate_policy(
            PROMPTS,
            tokenizer=tiny_tokenizer,
            generate=sampler.generate,
            score=sampler.score,
            scorer=None,
            samples=1,
            detail=shifted,
        )


def test_errors_by_hand() -> None:
    assert mean_of([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(14 / 2 / 3)))
    assert mean_of([4.0]) == (4.0, None)
    # R = 6/6; residuals 1 - 1, 2 - 2, 3 - 3 are all 0: the ratio is the same in every answer.
    assert ratio_of_sums([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (1.0, 0.0)
    # R = 1; residuals 1, -1; sqrt(2 / (2 * 1)) / 2 = .5
    assert ratio_of_sums([2.0, 2.0], [1.0, 3.0]) == (1.0, pytest.approx(0.5))
    assert ratio_of_sums([0.0], [0.0]) == (0.0, None)


def test_the_standard_error_is_the_spread_over_repetitions() -> None:
    """The delta method against brute force: the ratio of 2000 fresh samples of 200 answers."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 30, (2000, 200), generator=generator).double()
    gold = lengths * 0.3 + torch.randn(2000, 200, generator=generator, dtype=torch.float64) * lengths.sqrt()
    spread = (gold.sum(1) / lengths.sum(1)).std()
    _, error = ratio_of_sums(gold[0].tolist(), lengths[0].tolist())
    assert error == pytest.approx(float(spread), rel=0.15)


def test_files_are_what_the_report_reads(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sampler = Sampler(tiny_tokenizer)
    result = evaluate_policy(
        PROMPTS,
        tokenizer=tiny_tokenizer,
        generate=sampler.generate,
        score=sampler.score,
        scorer=_gold,
        samples=2,
        detail=_detail,
    )
    write_evaluation(tmp_path, result, result)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["before"] == written["after"] == json.loads(json.dumps(result.to_json()))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before", "before", "after", "after"]
    for line in lines:
        assert len(line["tokens"]) == len(line["reward"]) == len(line["advantage"]) == len(line["kl"])
    assert lines[0]["gold"] == 3.0


def test_a_sample_marks_what_the_policy_was_not_given(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampler = Sampler(tiny_tokenizer)
    whole = sampler.generate(PROMPTS)
    prompt_ids_BP, mask_BP = pad_left([tiny_tokenizer(text)["input_ids"][-2:] for text in PROMPTS], 0)
    cut = replace(whole, prompt_ids_BP=prompt_ids_BP, prompt_mask_BP=mask_BP)
    for rollout, given in ((whole, False), (cut, True)):
        result = evaluate_policy(
            PROMPTS,
            tokenizer=tiny_tokenizer,
            generate=lambda _, rollout=rollout: rollout,
            score=sampler.score,
            scorer=None,
            samples=len(PROMPTS),
        )
        for prompt, sample in zip(PROMPTS, result.samples, strict=True):
            line = sample.to_json("before")
            kept = tiny_tokenizer.decode(tiny_tokenizer(prompt)["input_ids"][-2:]) if given else prompt
            assert line["prompt"] == prompt and line["prompt"][len(line["prompt_cut"]) :] == kept


def test_a_summary_needs_answers() -> None:
    with pytest.raises(DataError, match=r"evaluation\.prompts"):
        summarise([], samples=0)
