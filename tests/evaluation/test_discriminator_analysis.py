"""What a discriminator gets right and where, against cases worked by hand; a shift of one token breaks each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.data.test_labels import LETTERS, label
from tlcr import ops
from tlcr.config.schema import DataConfig, DiscriminatorConfig, LabelConfig, ModelConfig, RunConfig
from tlcr.data.labels import label_pair
from tlcr.errors import DataError
from tlcr.evaluation.discriminator_analysis import (
    AnalysedTokens,
    PlaceRow,
    TokenPlace,
    analysed_tokens,
    by_absolute_position,
    by_kind,
    by_relative_position,
    compare_answers,
    edit_structure,
    rewards_by_answer,
    spill,
)
from tlcr.models.discriminator import labels_of, score_answers
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_token_classifier
from tlcr.recipes.analyse_discriminator import analyse_discriminator
from tlcr.types import EditPair, PreferencePair

LETTER = {"substitution": "s", "deletion": "d", "insertion": "i", "kept": "."}


def structure(rejected: str, revised: str) -> tuple[list[TokenPlace], list[TokenPlace]]:
    return edit_structure(*ops.token_labels([ord(c) for c in rejected], [ord(c) for c in revised]))


def kinds(places: Sequence[TokenPlace]) -> str:
    return "".join(LETTER[place.kind] for place in places)


class TestEditStructure:
    @pytest.mark.parametrize(
        ("rejected", "revised", "expected"),
        [
            ("abc", "abc", ("...", "...")),
            ("abc", "axc", (".s.", ".s.")),
            ("abc", "ac", (".d.", "..")),
            ("ac", "abc", ("..", ".i.")),
            ("abcdef", "axefz", (".sdd..", ".s..i")),
            ("ae", "axyze", ("..", ".iii.")),
            ("be", "xyze", ("s.", "sii.")),
            ("abc", "xyz", ("sss", "sss")),
            ("abc", "", ("ddd", "")),
            ("", "ab", ("", "ii")),
        ],
    )
    def test_kinds(self, rejected: str, revised: str, expected: tuple[str, str]) -> None:
        first, second = structure(rejected, revised)
        assert (kinds(first), kinds(second)) == expected

    def test_distances_count_kept_tokens_from_the_last_edit_or_to_the_first(self) -> None:
        # kept: a b | d e f, c replaced; then g inserted at the end, which no kept token follows
        first, second = structure("abcdef", "abxdefg")
        assert [place.distance for place in first] == [-2, -1, None, 1, 2, 3]
        assert [place.distance for place in second] == [-2, -1, None, 1, 2, 3, None]
        assert [place.kept for place in second] == [0, 1, None, 2, 3, 4, None]

    def test_an_insertion_is_an_edit_to_the_rejected_side_too(self) -> None:
        first, second = structure("abcd", "abxcd")
        assert [place.distance for place in first] == [-2, -1, 1, 2]
        assert [place.distance for place in second] == [-2, -1, None, 1, 2]

    def test_a_later_edit_takes_over(self) -> None:
        assert [place.distance for place in structure("abcd", "xbyd")[0]] == [None, 1, None, 1]

    def test_without_an_edit_there_is_no_distance(self) -> None:
        assert {place.distance for place in structure("ab", "ab")[0]} == {None}

    def test_sides_of_two_alignments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="keep 2 tokens and revised_labels 1"):
            edit_structure([0, 0], [0])

    @given(st.text("abc", max_size=9), st.text("abc", max_size=9))
    def test_the_kinds_are_the_steps_of_the_script(self, rejected: str, revised: str) -> None:
        assert tuple(kinds(side) for side in structure(rejected, revised)) == script(rejected, revised)


def script(rejected: str, revised: str) -> tuple[str, str]:
    """The steps of the minimal script by its own rule, on the plain table of edit distances."""
    rows, columns = len(rejected) + 1, len(revised) + 1
    D = [[max(i, j) if min(i, j) == 0 else 0 for j in range(columns)] for i in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            same = rejected[i - 1] == revised[j - 1]
            D[i][j] = min(D[i - 1][j] + 1, D[i][j - 1] + 1, D[i - 1][j - 1] + (not same))
    i, j, first, second = rows - 1, columns - 1, "", ""
    while i or j:
        if i and j and rejected[i - 1] == revised[j - 1]:
            i, j, first, second = i - 1, j - 1, "." + first, "." + second
        elif i and D[i][j] == D[i - 1][j] + 1:
            i, first = i - 1, "d" + first
        elif j and D[i][j] == D[i][j - 1] + 1:
            j, second = j - 1, "i" + second
        else:
            i, j, first, second = i - 1, j - 1, "s" + first, "s" + second
    return first, second


# One letter is one token; each answer ends with the end of sequence.
#                 rejected: a    b    c    d   end     revised: a   x   c   d   end
REWARDS = [
    *(0.1, -0.5, -0.2, 0.0, 0.3, 0.1, 0.4, 0.2, 0.1, -0.3),
    # rejected: a    b   end  revised: a   b    z   end
    *(0.0, 0.2, 0.5, 0.0, 0.2, -0.6, 0.4),
]


def example(rewards: Sequence[float] = REWARDS) -> AnalysedTokens:
    pairs = [label("abcd", "axcd"), label("ab", "abz")]
    return analysed_tokens(pairs, pairs, rewards)


def shifted() -> AnalysedTokens:
    return example([*REWARDS[1:], REWARDS[0]])


def summary(rows: Sequence[Any]) -> dict[tuple[str, str], tuple[Any, ...]]:
    return {
        (row.side, row.kind): (
            row.cell.tokens,
            row.cell.pairs,
            None if row.cell.accuracy is None else row.cell.accuracy.value,
            pytest.approx(row.cell.mean_reward.value),
            row.auc_kept,
        )
        for row in rows
    }


def test_by_kind() -> None:
    expected = {
        ("rejected", "substitution"): (1, 1, 1.0, -0.5, 1.0),
        # a c d of the first, a b of the second
        ("rejected", "kept"): (5, 2, None, (0.1 - 0.2 + 0.0 + 0.0 + 0.2) / 5, None),
        ("rejected", "end kept"): (2, 2, None, 0.4, None),
        ("revised", "substitution"): (1, 1, 1.0, 0.4, 1.0),
        ("revised", "insertion"): (1, 1, 0.0, -0.6, 0.0),
        ("revised", "kept"): (5, 2, None, (0.1 + 0.2 + 0.1 + 0.0 + 0.2) / 5, None),
        ("revised", "end kept"): (2, 2, None, 0.05, None),
    }
    assert summary(by_kind(example())) == expected
    assert summary(by_kind(shifted())) != expected


def test_a_moved_end_is_a_kind_of_its_own() -> None:
    pair = label("abc", "ab", end="boundary")
    rows = summary(by_kind(analysed_tokens([pair], [pair], [0.0, 0.0, -0.4, 0.2, 0.0, 0.0, 0.3])))
    assert rows["rejected", "end kept" if ("rejected", "end kept") in rows else "end moved"][:3] == (1, 1, 0.0)
    assert rows["revised", "end moved"][:3] == (1, 1, 1.0)


def test_an_end_that_does_not_count_is_left_out() -> None:
    pair = label("ab", "ax", end="ignore")
    assert {key[1] for key in summary(by_kind(analysed_tokens([pair], [pair], [0.0] * 4)))} == {"kept", "substitution"}


def test_kinds_come_from_whole_answers_though_the_model_saw_them_cut() -> None:
    """c was replaced by C, which lies beyond the limit: of the cut answers alone, c would count as deleted."""
    texts = ("abcdefgh", "xyzabCdefgh")
    cut, whole = label(*texts, limit=4), label(*texts)
    rows = by_kind(analysed_tokens([cut], [whole], [0.0, 0.0, -0.1, 0.0, 0.1, 0.1, 0.1, 0.0]))
    assert {(row.side, row.kind): row.cell.tokens for row in rows} == {
        ("rejected", "substitution"): 1,
        ("rejected", "kept"): 3,
        ("revised", "insertion"): 3,
        ("revised", "kept"): 1,
    }
    mistaken = by_kind(analysed_tokens([cut], [cut_as_whole()], [0.0] * 8))
    assert "deletion" in {row.kind for row in mistaken}


def cut_as_whole() -> Any:
    """The labels of the visible tokens, as though nothing had been cut."""
    return label("abcd", "xyzab")


def test_rewards_of_other_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rewards came with 17 counted tokens"):
        example([0.0, 0.1, 0.2])


def counts(rows: Sequence[PlaceRow]) -> list[tuple[int, int, int]]:
    return [(row.negative.tokens, row.kept.tokens, row.positive.tokens) for row in rows]


def test_by_fifths_of_the_answer() -> None:
    rows = by_relative_position(example())
    # of 4 tokens they are 0 1 2 3, of 3 tokens 0 1 3, of 2 tokens 0 2
    assert counts(rows) == [(0, 4, 0), (1, 1, 1), (0, 3, 0), (0, 2, 1), (0, 0, 0)]
    assert [(row.first, row.last) for row in rows] == [(k, k) for k in range(5)]
    assert rows[1].negative.accuracy is not None and rows[1].negative.accuracy.value == 1.0
    assert rows[3].positive.accuracy is not None and rows[3].positive.accuracy.value == 0.0
    kept = rows[2].kept.mean_reward
    assert kept is not None and kept.value == pytest.approx((-0.2 + 0.2 + 0.2) / 3)
    assert rows != by_relative_position(shifted())


def test_by_tokens_before() -> None:
    rejected = "abcdefghijklmnopqrst"
    pair = label(rejected, rejected[:7] + "1" + "2" + rejected[9:])
    rewards = [-0.1] * 21 + [0.1] * 21
    rows = by_absolute_position(analysed_tokens([pair], [pair], rewards))
    assert [(row.first, row.last) for row in rows] == [(0, 7), (8, 15), (16, 31)]
    # tokens 7 and 8 were replaced: one on either side of the first bound
    assert counts(rows) == [(1, 14, 1), (1, 14, 1), (0, 8, 0)]


def test_spill_compares_the_same_token_in_both_answers() -> None:
    rows = {(row.first, row.last): row for row in spill(example())}
    found = {
        place: (row.tokens, row.rejected.value, row.revised.value, row.difference.value) for place, row in rows.items()
    }
    expected = {
        (-2, -2): (1, 0.0, 0.0, 0.0),  # a of the second pair
        (-1, -1): (2, pytest.approx(0.15), pytest.approx(0.15), 0.0),  # a of the first, b of the second
        (1, 1): (1, -0.2, 0.2, pytest.approx(0.4)),  # c
        (2, 2): (1, 0.0, 0.1, pytest.approx(0.1)),  # d
    }
    assert found == expected
    moved = {(row.first, row.last): row.difference.value for row in spill(shifted())}
    assert moved != {place: figures[-1] for place, figures in expected.items()}


def test_spill_wants_a_token_on_both_sides() -> None:
    texts = ("abcdefgh", "xyzabCdefgh")
    cut, whole = label(*texts, limit=4), label(*texts)
    rows = spill(analysed_tokens([cut], [whole], [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.7]))
    # of the revised answer only x y z a are there, and only a was kept
    assert [(row.first, row.tokens, row.rejected.value, row.revised.value) for row in rows] == [(1, 1, 0.5, 0.7)]


BETTER = [[0.5, 0.1], [0.1], [0.2]]
WORSE = [[0.2], [0.3, 0.1], [-0.2]]


def test_whole_answers() -> None:
    found = compare_answers(BETTER, WORSE)
    assert found is not None and found.accuracy and found.better and found.worse
    # means .3 .1 .2 against .2 .2 -.2; the better one is longer, shorter, as long
    assert found.accuracy.value == pytest.approx(2 / 3)
    parts = (found.accuracy_longer, found.accuracy_shorter, found.accuracy_same, found.length_accuracy)
    assert [part and part.value for part in parts] == [1.0, 0.0, 1.0, 0.5]
    assert (found.better.value, found.worse.value) == (pytest.approx(0.2), pytest.approx(0.2 / 3))
    lengths, means = [2, 1, 1, 1, 2, 1], [0.3, 0.1, 0.2, 0.2, 0.2, -0.2]
    sums = [0.6, 0.1, 0.2, 0.2, 0.4, -0.2]
    for correlation, values in ((found.correlation_mean, means), (found.correlation_sum, sums)):
        assert correlation is not None
        assert correlation.value == pytest.approx(stats.spearmanr(lengths, values).statistic)
    assert sum(found.better_histogram) == sum(found.worse_histogram) == 3
    assert (found.low, found.high) == (pytest.approx(-0.2), pytest.approx(0.3))
    assert found.better_quantiles[2] == pytest.approx(0.2)
    assert found == compare_answers(BETTER, WORSE)


def test_whole_answers_at_the_edges() -> None:
    assert compare_answers([], []) is None
    tied = compare_answers([[0.1], []], [[0.1], [0.0]])
    assert tied is not None and tied.accuracy is not None and tied.accuracy.value == 0.5
    assert tied.correlation_mean is not None  # of lengths 1 0 1 1
    alike = compare_answers([[0.1]], [[0.3]])
    assert alike is not None and alike.correlation_mean is None and alike.accuracy_longer is None


def test_flat_rewards_are_cut_into_answers() -> None:
    assert rewards_by_answer([1, 2, 3, 4, 5], [2, 0, 3]) == [[1, 2], [], [3, 4, 5]]


# ---- the recipe, with a model


EDITS = [
    EditPair("1", "ask:", " the old soup was bad.", " the new soup was good."),
    EditPair("2", "ask:", " nothing to say of it", " nothing to say"),
    EditPair("3", "ask:", " so so", " so and so"),
]


@pytest.fixture(scope="module")
def discriminator(tiny_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=labels_of("soft"))
    torch.nn.init.normal_(classification_head(model).weight, generator=torch.Generator().manual_seed(0))
    model.config.tlcr_temperature = 2.0
    return model.eval()


def config(**data: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig(**{"max_prompt_tokens": 16, "max_answer_tokens": 64, **data}),
        labels=LabelConfig(),
        discriminator=DiscriminatorConfig(batch_size=2),
    )


def test_the_analysis_reads_the_rewards_that_scoring_gives(
    discriminator: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    limits = {"max_prompt_tokens": 16, "max_answer_tokens": 64}
    found = analyse_discriminator(
        config(), model=discriminator, tokenizer=tiny_tokenizer, edits=EDITS, calibrated_on_them=False
    )
    sums = {"substitution": [0.0, 0], "deletion": [0.0, 0]}
    for edit in EDITS:
        pair = label_pair(edit, tiny_tokenizer, end_of_sequence="neutral", **limits)
        texts = [(edit.prompt, edit.rejected)]
        rewards = score_answers(discriminator, tiny_tokenizer, texts, batch_size=1, **limits)[0].rewards
        places, _ = edit_structure(pair.rejected.labels[:-1], pair.revised.labels[:-1])
        for place, reward in zip(places, rewards, strict=False):
            if place.kind in sums:
                sums[place.kind][0] += reward
                sums[place.kind][1] += 1
    assert all(count for _, count in sums.values())
    rows = {row.kind: row.cell for row in found.kinds if row.side == "rejected"}
    for kind, (total, count) in sums.items():
        own = rows[kind]
        assert own.tokens == count and own.mean_reward is not None
        assert own.mean_reward.value == pytest.approx(total / count, abs=1e-6)
    assert found.pairs == 3 and found.temperature == 2.0
    assert set(found.reliability) == {"before", "after"} and set(found.comparisons) == {"revised over rejected"}
    assert found.calibration_error["before"] != found.calibration_error["after"]


def test_before_the_first_edit_a_causal_model_says_the_same_of_both_answers(
    discriminator: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = analyse_discriminator(
        config(), model=discriminator, tokenizer=tiny_tokenizer, edits=EDITS, calibrated_on_them=False
    )
    before = [row.difference.value for row in found.spill if row.last is not None and row.last < 0]
    after = [row.difference.value for row in found.spill if row.first is not None and row.first > 0]
    assert before and np.abs(before).max() < 1e-6
    assert after and np.abs(after).max() > 1e-3


def test_preferences_are_compared_too(discriminator: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    preferences = [
        PreferencePair("1", "ask:", " a good one", " a bad one, that is long"),
        PreferencePair("2", "", "a", "b"),
    ]
    found = analyse_discriminator(
        config(),
        model=discriminator,
        tokenizer=tiny_tokenizer,
        edits=EDITS,
        preferences=preferences,
        calibrated_on_them=True,
    )
    assert found.comparisons["chosen over rejected"].pairs == 2
    assert found.to_json()["comparisons"]["chosen over rejected"]["pairs"] == 2


def test_nothing_to_analyse_is_said(discriminator: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no edit pair to analyse"):
        analyse_discriminator(
            config(), model=discriminator, tokenizer=tiny_tokenizer, edits=[], calibrated_on_them=False
        )


def test_an_uncalibrated_model_has_no_after(
    discriminator: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg, temperature = config(), discriminator.config.tlcr_temperature
    del discriminator.config.tlcr_temperature
    try:
        found = analyse_discriminator(
            replace(cfg, data=replace(cfg.data, max_answer_tokens=4)),
            model=discriminator,
            tokenizer=tiny_tokenizer,
            edits=EDITS,
            calibrated_on_them=True,
        )
    finally:
        discriminator.config.tlcr_temperature = temperature
    assert set(found.reliability) == {"before"} and found.temperature == 1.0


def test_one_held_out_pair_is_no_reason_to_stop(
    discriminator: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Half of one pair is nothing to fit on; what needs no fit is there."""
    found = analyse_discriminator(
        config(), model=discriminator, tokenizer=tiny_tokenizer, edits=EDITS[:1], calibrated_on_them=True
    )
    assert set(found.reliability) == {"before"} and found.pairs == 1
    assert all(row.cell.mean_reward and row.cell.mean_reward.interval is None for row in found.kinds)


def test_letters_are_tokens_here() -> None:
    assert len(LETTERS("abc", add_special_tokens=False)["input_ids"]) == 3
