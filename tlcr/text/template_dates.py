"""The date that a chat template writes: a template that asks the clock gives other tokens on every day.

The functions of ``tokenization`` that render take the moment that the clock shows, so that a run which is resumed on
another day reads the same tokens.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

__all__ = ["another_day", "asks_the_clock", "shown_at"]

CLOCK = "strftime_now"
"""The only clock that transformers gives to chat templates: a function of a format, as of ``datetime.strftime``."""

DATE = "tlcr_date"
DIRECTIVES = "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
"""Those that Python documents for every platform, and those of the C library of Linux."""
FLAGS = ("", "-", "_")
"""Before a directive: leading zeros are left away ("%-d"), or spaces in their place."""
WRITTEN = re.compile(r"%[-_0^#+]*\d{0,3}[EO]?[A-Za-z]")
"""A directive as a template writes it: the C library of Linux takes flags ("%^a"), a width ("%3d") and E or O too."""
PERCENT = "\x00"

# Not a function among the arguments: transformers gives templates plain values only.
MACRO = (
    f"{{% macro {CLOCK}(format) %}}{{% set shown = namespace(text=format) %}}"
    f"{{% for directive, value in {DATE}.items() %}}{{% set shown.text = shown.text | replace(directive, value) %}}"
    "{% endfor %}{{ shown.text }}{% endmacro %}\n"
)
"""Before a template, whose first line stays one: transformers drops a line end after a block (``trim_blocks``), and
the spaces before a block that begins its line (``lstrip_blocks``)."""


def asks_the_clock(template: str) -> bool:
    """Whether a template may write the date."""
    return CLOCK in template


def shown_at(template: str, moment: datetime) -> tuple[str, dict[str, Any]]:
    """A chat template whose clock stands still.

    Args:
        template: the template.
        moment: what its clock shows.

    Returns:
        The template to render in its place, and the further arguments that it needs. A template that does not ask the
        clock comes back as it is.
    """
    if not asks_the_clock(template):
        return template, {}
    # All that may come from elsewhere, such as a column, and what the template itself writes.
    directives = [*(f"%{flag}{letter}" for letter in DIRECTIVES for flag in FLAGS), *WRITTEN.findall(template)]
    values = {directive: moment.strftime(directive) for directive in directives}
    return MACRO + template, {DATE: {"%%": PERCENT, **values, PERCENT: "%"}}


def another_day(moment: datetime) -> datetime:
    """A moment that differs in its year, month, day, day of the week, hour and minute."""
    return moment + timedelta(days=403, hours=5, minutes=17)
