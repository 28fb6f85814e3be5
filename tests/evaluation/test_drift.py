"""Drift: which tokens of an answer are judged, and the figures of them by hand."""

from __future__ import annotations

import pytest

from tlcr.data import embedded
from tlcr.evaluation.drift import JudgedToken, calibration_error, judge, ranking
from tlcr.text.tokenization import character_spans


def test_every_token_of_a_word_with_a_gold_is_judged_and_no_other() -> None:
    """An answer of the embedded language: its words' characters, from its tokens' own places, one by one."""
    tokenizer = embedded.build_tokenizer(0)
    pair = embedded.generate_pairs(1, 0)[0][0]
    prompt, response = pair.prompt, pair.rejected
    words = embedded.gold(prompt, response).words
    assert {word.gold > 0 for word in words if word.gold} == {True, False}, "the words must tell the sides apart"
    context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    confidence = [index / 100 for index in range(len(ids))]
    spans = character_spans(tokenizer, ids, context=context)
    wanted = []
    for (start, end), sure in zip(spans, confidence, strict=True):
        text = response[start:end]
        place = start + len(text) - len(text.lstrip())
        for word in words:
            if word.start <= place < word.end and word.gold != 0 and text.strip(" ,."):
                wanted.append(JudgedToken(sure, word.gold > 0))
    given = [(word.start, word.end, word.gold) for word in words]
    found = judge(given, response, ids, confidence, context=context, tokenizer=tokenizer)
    assert list(found) == wanted
    judged_words = sum(word.gold != 0 for word in words)
    assert judged_words < len(wanted) < len(ids), "some words need two tokens, and some tokens have no gold"
    late = judge(given, response, ids, [0.0, *confidence[:-1]], context=context, tokenizer=tokenizer)
    assert [token.good for token in late] == [token.good for token in found]
    assert [token.confidence for token in late] != [token.confidence for token in found]


def test_an_answer_without_a_gold_is_not_judged() -> None:
    tokenizer = embedded.build_tokenizer(0)
    ids = tokenizer(" zi nika", add_special_tokens=False)["input_ids"]
    assert judge([], " zi nika", ids, [0.5] * len(ids), context=[], tokenizer=tokenizer) == ()
    nothing = judge([(1, 8, 0.0)], " zi nika", ids, [0.5] * len(ids), context=[], tokenizer=tokenizer)
    assert nothing == ()


def test_the_figures_by_hand() -> None:
    """Bad tokens at .2 and .6, good ones at .5 and .9: three of the four pairs stand in the right order. Each is alone
    in its bin, so that the error is the mean distance: (.2 + .6 + .5 + .1) / 4."""
    tokens = [JudgedToken(0.2, False), JudgedToken(0.6, False), JudgedToken(0.5, True), JudgedToken(0.9, True)]
    assert ranking(tokens) == pytest.approx(3 / 4)
    assert calibration_error(tokens) == pytest.approx(1.4 / 4)


def test_figures_that_are_not_defined_are_none() -> None:
    assert ranking([]) is None and calibration_error([]) is None
    assert ranking([JudgedToken(0.2, True), JudgedToken(0.3, True)]) is None
    assert calibration_error([JudgedToken(0.25, True)]) == pytest.approx(0.75)
