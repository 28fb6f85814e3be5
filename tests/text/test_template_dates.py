"""A chat template's clock stands still at the moment that it is given."""

from __future__ import annotations

import string
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.text.template_dates import DIRECTIVES, FLAGS, another_day, shown_at
from tlcr.text.tokenization import render_answer, render_prompt

MOMENT = datetime(2026, 7, 4, 9, 5, 3)
DATED = (
    "{%- if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}Today: {{ date_string }}\n"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK = [{"role": "user", "content": "What day is it?"}]


def of(tokenizer: PreTrainedTokenizerFast, template: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


def test_prompt_and_answer_show_the_given_day(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = of(tiny_tokenizer, DATED, monkeypatch)
    assert render_prompt(tokenizer, ASK, rendered_at=MOMENT) == "Today: 04 Jul 2026\n<user>What day is it?<assistant>"
    assert render_answer(tokenizer, ASK, "Saturday.", rendered_at=MOMENT) == "Saturday."
    assert render_prompt(tokenizer, ASK, rendered_at=MOMENT, date_string="May Day").startswith("Today: May Day\n")
    assert render_prompt(tokenizer, ASK).startswith(f"Today: {datetime.now():%d %b %Y}\n"), "without one, it is today"


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d",
        "%-d.%-m.%y",
        "100%%",
        "%%d",
        "%A, %B %d, %H:%M",
        "%F %T",
        "%D",
        "%B %e, %Y",
        "%k:%M",
        "%l %P",
        "%G-W%V-%u",
        "%^a %^B %#p",
        "%-^b %03d %6Y %0e",
        "%Ey %Od",
        "%%^a",
    ]
    + [f"%{flag}{d}" for d in DIRECTIVES for flag in FLAGS],
)
def test_formats_mean_what_they_mean_in_python(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    tokenizer = of(tiny_tokenizer, f"{{{{ strftime_now({form!r}) }}}}", monkeypatch)
    for moment in (MOMENT, datetime(2007, 12, 31, 23, 59, 58), datetime(2001, 1, 1)):
        assert render_prompt(tokenizer, ASK, rendered_at=moment) == moment.strftime(form)


@pytest.mark.parametrize("letter", string.ascii_letters)
def test_no_directive_that_the_system_knows_is_left_in_the_text(letter: str) -> None:
    if MOMENT.strftime(f"%{letter}") not in (f"%{letter}", letter):
        assert letter in DIRECTIVES


@pytest.mark.parametrize(
    "beginning", ["\n", "\n\n", "  ", "  {% set a = 1 %}\n", "\n  {% if true %}\n", "{%- if true %}"]
)
def test_a_template_begins_as_without_a_clock_that_stands_still(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, beginning: str
) -> None:
    end = "{% endif %}" if "if" in beginning else ""
    tokenizer = of(tiny_tokenizer, f"{beginning}{{{{ strftime_now('%Y') }}}}.{end}", monkeypatch)
    running = tokenizer.apply_chat_template(ASK, tokenize=False)
    assert render_prompt(tokenizer, ASK, rendered_at=MOMENT) == running.replace(f"{datetime.now():%Y}", "2026")


def test_the_date_is_a_text_that_templates_may_compute_with(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% macro year() %}{{ strftime_now('%Y') | int + 1 }}{% endmacro %}{{ year() }} {{ strftime_now('%b')[:2] }}"
    )
    assert render_prompt(of(tiny_tokenizer, template, monkeypatch), ASK, rendered_at=MOMENT) == "2027 Ju"


def test_a_template_without_a_clock_is_as_it_was() -> None:
    assert shown_at("{{ messages }}", MOMENT) == ("{{ messages }}", {})


def test_another_day_differs_in_everything_that_a_template_writes() -> None:
    other = another_day(MOMENT)
    assert all(MOMENT.strftime(f"%{d}") != other.strftime(f"%{d}") for d in "YymdAjHM")
