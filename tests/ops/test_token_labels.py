"""token_labels."""

import random
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Levenshtein

from tlcr.errors import DataError
from tlcr.ops import TokenLabel, token_labels

LETTERS = {"-": TokenLabel.NEGATIVE, ".": TokenLabel.NEUTRAL, "+": TokenLabel.POSITIVE}


def labels(rejected: str, revised: str) -> tuple[str, str]:
    """Labels of two strings of one-character tokens, as strings of - . +"""
    signs = {label: sign for sign, label in LETTERS.items()}
    first, second = token_labels([ord(c) for c in rejected], [ord(c) for c in revised])
    return "".join(signs[label] for label in first), "".join(signs[label] for label in second)


def truth(rejected: list[int], revised: list[int]) -> tuple[list[int], list[int]]:
    """The stated rule on the definition of the edit distance, by recursion over prefixes."""

    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        substituted = distance(i - 1, j - 1) + (rejected[i - 1] != revised[j - 1])
        return min(substituted, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    first, second = [0] * len(rejected), [0] * len(revised)
    i, j = len(rejected), len(revised)
    while i or j:
        if i and j and rejected[i - 1] == revised[j - 1]:
            i, j = i - 1, j - 1
        elif i and distance(i, j) == distance(i - 1, j) + 1:
            i -= 1
            first[i] = -1
        elif j and distance(i, j) == distance(i, j - 1) + 1:
            j -= 1
            second[j] = 1
        else:
            i, j = i - 1, j - 1
            first[i], second[j] = -1, 1
    return first, second


@pytest.mark.parametrize(
    ("rejected", "revised", "rejected_signs", "revised_signs"),
    [
        ("", "", "", ""),
        ("abc", "abc", "...", "..."),
        ("abc", "", "---", ""),
        ("", "abc", "", "+++"),
        ("abc", "axc", ".-.", ".+."),
        ("abc", "ac", ".-.", ".."),
        ("ac", "abc", "..", ".+."),
        ("abcd", "xbd", "-.-.", "+.."),
    ],
)
def test_hand_worked(rejected: str, revised: str, rejected_signs: str, revised_signs: str) -> None:
    assert labels(rejected, revised) == (rejected_signs, revised_signs)


@pytest.mark.parametrize(
    ("rejected", "revised", "rejected_signs", "revised_signs"),
    [
        # Equal tokens are matched from the end: the first of two candidates is the edited one.
        ("aa", "a", "-.", "."),
        ("a", "aa", ".", "+."),
        # Two substitutions would be minimal as well; a deletion comes before both, and keeps a token.
        ("ab", "ba", ".-", "+."),
        # Substituting b and adding a would be minimal as well, and comes to the same labels at another token.
        ("xb", "ya", "--", "++"),
        # A deletion before an addition: the last token that differs goes first.
        ("abx", "yab", "..-", "+.."),
        # An addition before a substitution.
        ("b", "ca", "-", "++"),
    ],
)
def test_ties(rejected: str, revised: str, rejected_signs: str, revised_signs: str) -> None:
    assert labels(rejected, revised) == (rejected_signs, revised_signs)


@pytest.mark.parametrize("alphabet", [2, 3, 20])
def test_random_pairs_against_the_definition(alphabet: int) -> None:
    generator = random.Random(alphabet)
    for _ in range(300):
        rejected, revised = ([generator.randrange(alphabet) for _ in range(generator.randrange(13))] for _ in range(2))
        got = token_labels(rejected, revised)
        assert got == truth(rejected, revised)


def test_the_check_can_fail() -> None:
    got, _ = token_labels([1, 2, 3, 4], [1, 3, 4])
    wanted = truth([1, 2, 3, 4], [1, 3, 4])[0]
    assert got == wanted
    assert got[1:] + got[:1] != wanted and [-label for label in got] != wanted


def test_script_is_minimal_and_leaves_equal_texts() -> None:
    generator = random.Random(1)
    for length in (70, 200, 1000):
        rejected = [generator.randrange(30) for _ in range(length)]
        revised = [t for t in rejected if generator.random() < 0.8]
        revised = [generator.randrange(30) if generator.random() < 0.2 else t for t in revised]
        first, second = token_labels(rejected, revised)
        kept = [t for t, label in zip(rejected, first, strict=True) if label == TokenLabel.NEUTRAL]
        assert kept == [t for t, label in zip(revised, second, strict=True) if label == TokenLabel.NEUTRAL]
        # Runs of edits between two kept tokens cost as many operations as the longer side has tokens.
        assert _operations(first, second) == Levenshtein.distance(rejected, revised)


def _operations(first: list[TokenLabel], second: list[TokenLabel]) -> int:
    def gaps(row: list[TokenLabel]) -> list[int]:
        lengths = [0]
        for label in row:
            if label == TokenLabel.NEUTRAL:
                lengths.append(0)
            else:
                lengths[-1] += 1
        return lengths

    return sum(max(pair) for pair in zip(gaps(first), gaps(second), strict=True))


def test_takes_any_flat_sequence_of_integers() -> None:
    wanted = ([TokenLabel.NEUTRAL, TokenLabel.NEGATIVE], [TokenLabel.NEUTRAL, TokenLabel.POSITIVE])
    assert token_labels((1, 2), (1, 3)) == wanted
    assert token_labels(torch.tensor([1, 2]), torch.tensor([1, 3], dtype=torch.int32)) == wanted
    assert token_labels(np.array([1, 2]), np.array([1, 3])) == wanted
    assert torch.tensor(token_labels([1], [2])[0]).tolist() == [-1]


def test_long_answers_take_milliseconds() -> None:
    generator = random.Random(0)
    rejected = [generator.randrange(5000) for _ in range(2000)]
    revised = [generator.randrange(5000) for _ in range(2000)]
    started = time.process_time()
    token_labels(rejected, revised)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("text", "rejected_ids is text, wanted token ids; tokenise it first"),
        (["a"], "rejected_ids holds 'a', wanted a flat sequence of integer"),
        ([[1, 2]], r"rejected_ids holds \[1, 2\]"),
        ([1.0], "rejected_ids holds 1.0"),
        (torch.zeros(1, 2).long(), r"rejected_ids is torch.int64 of shape \(1, 2\), wanted integers \(N,\)"),
        (torch.zeros(2), r"rejected_ids is torch.float32"),
    ],
)
def test_errors(ids: Any, message: str) -> None:
    with pytest.raises(DataError, match="token_labels: " + message):
        token_labels(ids, [1])
