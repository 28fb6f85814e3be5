"""What limits cut is counted, said once with an example, and shown."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tlcr.config.schema import DataConfig
from tlcr.text.tokenization import encode_answer, encode_answers
from tlcr.text.truncation import CutTexts, cut_beginning, note_cut_prompts

LIMITS = DataConfig(max_prompt_tokens=5, max_answer_tokens=3)
LONG = "The food was good and the service was not bad at all."


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def test_an_encoded_answer_says_what_it_lost(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_answer(tiny_tokenizer, LONG, " The soup", max_prompt_tokens=99, max_answer_tokens=99)
    assert (whole.prompt_cut, whole.answer_cut) == (0, 0)
    cut = encode_answer(tiny_tokenizer, LONG, LONG, max_prompt_tokens=5, max_answer_tokens=3)
    length = tokens(tiny_tokenizer, LONG)
    assert (cut.prompt_cut, cut.answer_cut) == (length - 5, length + 1 - 3), "the end of sequence is cut too"


def test_prompts_count_once_and_answers_each(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    cuts = CutTexts(LIMITS)
    for prompt, answers in (("The", ("a", "b")), (LONG, ("a", LONG)), (f"Then {LONG}", (LONG, LONG))):
        cuts.add(
            prompt,
            *encode_answers(
                tiny_tokenizer, [prompt] * 2, answers, max_prompt_tokens=5, max_answer_tokens=3, end_of_sequence=False
            ),
        )
    length = tokens(tiny_tokenizer, LONG)
    assert cuts.notes() == [
        "2 of 3 prompts are longer than data.max_prompt_tokens (5) and are cut at the beginning: the first of them "
        f"loses the first {length - 5} of its {length} tokens, which begin {LONG!r}; raise data.max_prompt_tokens if "
        "what stands there (a system message, say) is to be read",
        "3 of 6 answers are longer than data.max_answer_tokens (3) and are cut at the end: the first of them loses the "
        f"last {length - 3} of its {length} tokens",
    ]
    assert CutTexts(LIMITS).notes() == []


def test_prompts_of_rollouts(tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    short = tokens(tiny_tokenizer, "The food")
    assert note_cut_prompts(tiny_tokenizer, ["The food"] * 3, LIMITS, stage="PPO") == short < 5
    assert not caplog.text
    with caplog.at_level(logging.WARNING, logger="tlcr"):
        assert note_cut_prompts(tiny_tokenizer, ["The food", *[LONG] * 2000], LIMITS, stage="PPO") == 5
    (said,) = caplog.messages
    assert said.startswith("PPO: 2000 of 2001 prompts are longer than data.max_prompt_tokens (5)")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(1, 9))
def test_the_cut_and_the_rest_are_the_prompt(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, kept: int) -> None:
    cut = cut_beginning(tiny_tokenizer, prompt, kept)
    assert prompt.startswith(cut)
    whole = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert bool(cut) <= (len(whole) > kept)
    given_ids = whole[-kept:]
    if prompt.isascii():
        assert tiny_tokenizer.decode(given_ids) == prompt[len(cut) :]


def test_a_short_prompt_is_not_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert cut_beginning(tiny_tokenizer, "The food", 8) == ""
    assert LONG.endswith(" at all.") and cut_beginning(tiny_tokenizer, LONG, 1) == LONG[:-1]
