"""Token scores against marked errors: which token counts as marked, the figures, and their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from tlcr.errors import DataError, ShapeError
from tlcr.evaluation.span_metrics import MarkedTokens, best_threshold, difference, evaluate_spans, is_in_span
from tlcr.types import ErrorSpan

TEXT = "It was a bad, bad idea."
TOKENS = {"It": (0, 2), " was": (2, 6), " a": (6, 8), " bad": (8, 12), ",": (12, 13), " ba": (13, 16), "d": (16, 17)}


def marked(start: int, end: int) -> list[str]:
    return [token for token, place in TOKENS.items() if is_in_span(*place, TEXT, [ErrorSpan(start, end, "x")])]


@pytest.mark.parametrize(
    ("start", "end", "tokens"),
    [
        (9, 12, [" bad"]),  # the word; its token has the space before it too
        (8, 12, [" bad"]),
        (9, 13, [" bad", ","]),  # one character on: the comma
        (10, 12, [" bad"]),  # two of three letters
        (11, 12, []),  # one of three
        (11, 13, [","]),
        (12, 14, [","]),  # the space of " ba" is not half of its letters
        (12, 15, [",", " ba"]),  # one letter of two is
        (12, 16, [",", " ba"]),
        (12, 17, [",", " ba", "d"]),
        (13, 17, [" ba", "d"]),  # one character on: without the comma
        (0, 1, ["It"]),
    ],
)
def test_a_token_is_marked_where_half_of_its_letters_are(start: int, end: int, tokens: list[str]) -> None:
    assert marked(start, end) == tokens


def test_white_space_counts_where_there_is_nothing_else() -> None:
    assert is_in_span(1, 3, "a  b", [ErrorSpan(2, 3, "x")])
    assert not is_in_span(1, 3, "a  b", [ErrorSpan(3, 4, "x")])


def test_spans_add_up_and_a_token_without_characters_is_in_none() -> None:
    assert is_in_span(0, 4, "word", [ErrorSpan(0, 1, "x"), ErrorSpan(3, 4, "y")])
    assert not is_in_span(2, 2, "word", [ErrorSpan(0, 4, "x")])


def tokens_of(*answers: str) -> MarkedTokens:
    """A letter is a token: "." is right, and any other letter names the kind of its error."""
    letters = np.array([letter for answer in answers for letter in answer], dtype=str)
    return MarkedTokens(
        error_N=letters != ".",
        kinds={kind: letters == kind for kind in sorted(set(letters) - {"."})},
        answer_N=np.repeat(np.arange(len(answers)), [len(answer) for answer in answers]),
        answers=len(answers),
    )


def scores(*values: float) -> Any:
    return np.array(values, dtype=np.float64)


def value(evaluation: Any, name: str) -> float | None:
    return evaluation.figures[name].value


def test_figures_of_a_case_worked_by_hand() -> None:
    tokens = tokens_of("a..", "ba", "..")
    score_N = scores(0.9, 0.2, -0.5, 0.1, 0.3, -0.2, 0.4)
    found = evaluate_spans(tokens, score_N, threshold=0.2)
    assert found.counts == {"tokens": 7, "errors": 3, "answers": 3, "answers_with_errors": 2}
    assert value(found, "share") == pytest.approx(3 / 7)
    # errors .9 .1 .3, others .2 -.5 -.2 .4: of 12 comparisons .9 wins 4, .1 wins 2, .3 wins 3
    assert value(found, "auc") == pytest.approx(9 / 12)
    # from above: .9 error (1/1), .4, .3 error (2/3), .2, .1 error (3/5)
    assert value(found, "average_precision") == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # above 0 are .9 .2 .1 .3 .4, three of them errors
    assert value(found, "precision") == pytest.approx(3 / 5)
    assert value(found, "recall") == pytest.approx(1)
    assert value(found, "f1") == pytest.approx(6 / 8)
    # above .2 are .9 .3 .4; .2 itself is not above
    assert value(found, "precision_at_threshold") == pytest.approx(2 / 3)
    assert value(found, "recall_at_threshold") == pytest.approx(2 / 3)
    assert value(found, "f1_at_threshold") == pytest.approx(4 / 6)
    # the first answer alone is ranked perfectly, the second has errors only, the third none
    assert value(found, "auc_per_answer") == pytest.approx(1)
    assert value(found, "f1_per_answer") == pytest.approx((2 / 3 + 1) / 2)
    assert value(found, "f1_per_answer_at_threshold") == pytest.approx((1 + 2 / 3) / 2)
    # kind b is the one token of .1; against the four right ones it wins 2
    assert value(found, "auc/b") == pytest.approx(2 / 4)
    assert value(found, "auc/a") == pytest.approx(7 / 8)
    assert value(found, "share/b") == pytest.approx(1 / 7)
    assert (value(found, "recall/b"), value(found, "recall_at_threshold/b")) == (1, 0)


def random_case(seed: int, answers: int = 30) -> tuple[MarkedTokens, Any]:
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("..ab"), size=rng.integers(1, 20))) for _ in range(answers)]
    tokens = tokens_of(*texts)
    return tokens, np.round(rng.normal(size=len(tokens.error_N)) + 0.5 * tokens.error_N, 1)  # rounded: many ties


@pytest.mark.parametrize("seed", range(5))
def test_the_ranking_is_that_of_scikit_learn_ties_and_draws_included(seed: int) -> None:
    tokens, score_N = random_case(seed)
    found = evaluate_spans(tokens, score_N, resamples=20, seed=3)
    assert value(found, "auc") == pytest.approx(roc_auc_score(tokens.error_N, score_N), abs=1e-12)
    assert value(found, "average_precision") == pytest.approx(
        average_precision_score(tokens.error_N, score_N), abs=1e-12
    )
    assert value(found, "f1") == pytest.approx(f1_score(tokens.error_N, score_N > 0), abs=1e-12)
    # A draw is a data set in which an answer occurs as often as it was drawn, once again by another route.
    times_RA = np.random.default_rng(3).multinomial(tokens.answers, np.full(tokens.answers, 1 / tokens.answers), 20)
    for r, times_A in enumerate(times_RA):
        drawn = np.concatenate([np.tile(np.flatnonzero(tokens.answer_N == a), n) for a, n in enumerate(times_A)])
        error, score = tokens.error_N[drawn], score_N[drawn]
        assert found.draws["auc"][r] == pytest.approx(roc_auc_score(error, score), abs=1e-12)
        assert found.draws["average_precision"][r] == pytest.approx(average_precision_score(error, score), abs=1e-12)
        assert found.draws["f1"][r] == pytest.approx(f1_score(error, score > 0), abs=1e-12)
        compared = tokens.kinds["a"][drawn] | ~error
        expected = roc_auc_score(tokens.kinds["a"][drawn][compared], score[compared])
        assert found.draws["auc/a"][r] == pytest.approx(expected, abs=1e-12)


def test_intervals_are_over_answers_not_tokens() -> None:
    """Answers that are all right or all wrong: 8 answers of 1 token say as much as 8 answers of 50."""
    score = dict(zip("abcdefgh", (0.1, 0.9, 0.4, 0.3, 0.8, 0.2, 0.6, 0.5), strict=True))
    widths = []
    for length in (1, 50):
        answers = [("x" if k % 2 else ".") * length for k in range(8)]
        score_N = np.repeat(list(score.values()), length)
        figure = evaluate_spans(tokens_of(*answers), score_N).figures["auc"]
        widths.append(figure.high - figure.low)  # type: ignore[operator]
        assert figure.low <= figure.value <= figure.high  # type: ignore[operator]
    assert widths[0] == pytest.approx(widths[1]) and widths[0] > 0.3


def test_an_interval_holds_the_middle_95_percent_of_the_draws() -> None:
    tokens, score_N = random_case(1)
    found = evaluate_spans(tokens, score_N)
    figure, draws = found.figures["f1"], found.draws["f1"]
    assert len(draws) == 1000
    assert np.mean((draws >= figure.low) & (draws <= figure.high)) == pytest.approx(0.95, abs=0.002)


def test_a_difference_is_taken_draw_by_draw() -> None:
    tokens, score_N = random_case(2)
    one = evaluate_spans(tokens, score_N)
    same = difference(one, evaluate_spans(tokens, score_N), "auc")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = difference(evaluate_spans(tokens, score_N + 0.3 * tokens.error_N), one, "auc")
    width = one.figures["auc"].high - one.figures["auc"].low  # type: ignore[operator]
    assert 0 < better.low < better.value < better.high  # type: ignore[operator]
    assert better.high - better.low < width  # type: ignore[operator]
    with pytest.raises(DataError, match="not of the same tokens"):
        difference(one, evaluate_spans(*random_case(3)), "auc")


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_one_with_the_highest_f1(seed: int) -> None:
    tokens, score_N = random_case(seed)
    threshold = best_threshold(tokens.error_N, score_N)
    precision, recall, _ = precision_recall_curve(tokens.error_N, score_N)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert f1_score(tokens.error_N, score_N > threshold) == pytest.approx(best)


def test_a_constant_calls_every_token_an_error_and_ranks_none() -> None:
    tokens = tokens_of("a..", ".b", "..")
    score_N = np.full(7, -0.3)
    threshold = best_threshold(tokens.error_N, score_N)
    found = evaluate_spans(tokens, score_N, threshold=threshold)
    assert value(found, "auc") == 0.5
    assert value(found, "average_precision") == pytest.approx(2 / 7)
    assert (value(found, "recall"), value(found, "recall_at_threshold")) == (0, 1)
    assert value(found, "precision") is None  # it calls none an error
    assert value(found, "f1_at_threshold") == pytest.approx(2 * 2 / (7 + 2))


def test_what_is_not_defined_is_none() -> None:
    found = evaluate_spans(tokens_of("..", "."), scores(0.1, -0.1, 0.2))
    for name in ("auc", "average_precision", "recall", "auc_per_answer", "f1_per_answer"):
        assert found.figures[name].value is None, name
    assert value(found, "precision") == 0
    found = evaluate_spans(tokens_of("aa"), scores(0.1, -0.1))
    assert value(found, "auc") is None and value(found, "recall") == 0.5


def test_a_kind_that_a_draw_lacks_does_not_enter_its_interval() -> None:
    tokens = tokens_of("a.", "..", "..", "..")
    found = evaluate_spans(tokens, scores(0.9, 0.1, 0.2, 0.1, 0.0, 0.1, 0.2, 0.3))
    assert np.isnan(found.draws["auc/a"]).any()
    assert (found.figures["auc/a"].low, found.figures["auc/a"].high) == pytest.approx((1, 1))


def test_wrong_input_is_named() -> None:
    tokens = tokens_of("a.")
    with pytest.raises(ShapeError, match=r"\(3,\).*\(2,\)"):
        evaluate_spans(tokens, scores(1, 2, 3))
    with pytest.raises(DataError, match="token 1 of answer 0 is nan"):
        evaluate_spans(tokens, scores(1, float("nan")))
    with pytest.raises(DataError, match="no token to evaluate"):
        evaluate_spans(tokens_of("", ""), scores())
    with pytest.raises(DataError, match="is marked as an error"):
        best_threshold(np.zeros(2, dtype=bool), scores(1, 2))
