"""The analysis as people read it: every figure where it belongs, nothing missing without a word, nothing unescaped."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.test_discriminator_analysis import BETTER, WORSE, example
from tests.report.run_folders import NASTY, add_stages, write_run
from tests.report.test_page import Page
from tlcr.data.embedded import gold
from tlcr.evaluation.discriminator_analysis import (
    by_absolute_position,
    by_kind,
    by_relative_position,
    compare_answers,
    spill,
)
from tlcr.evaluation.discriminator_metrics import ReliabilityBin
from tlcr.recipes.analyse_discriminator import DiscriminatorAnalysis, EditExample, ExampleAnswer
from tlcr.report import analysis as analysis_page
from tlcr.report.page import write_analysis_page, write_report
from tlcr.report.tokens import number


def made_up(**changes: Any) -> dict[str, Any]:
    """The analysis of tests/evaluation/test_discriminator_analysis.py's two pairs, as its JSON file holds it."""
    tokens, compared = example(), compare_answers(BETTER, WORSE)
    assert compared is not None
    found = DiscriminatorAnalysis(
        pairs=2,
        tokens=17,
        temperature=1.25,
        targets="three_class",
        bidirectional_layers=1,
        kinds=by_kind(tokens),
        relative_positions=by_relative_position(tokens),
        absolute_positions=by_absolute_position(tokens),
        spill=spill(tokens),
        calibration_error={"before": 0.125, "after": None},
        reliability={"before": [ReliabilityBin(0.0, 1.0, 17, 0.5, 0.6)]},
        comparisons={"revised over rejected": compared},
        example=None,
    )
    plain: dict[str, Any] = json.loads(json.dumps(replace(found, **changes).to_json()))
    return plain


def test_an_edit_is_drawn_before_the_first_paragraph(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    add_stages(folder)
    (folder / "analysis").mkdir()
    prompt = "User: what of tala dipo for once?\nAssistant:"
    edit = EditExample(
        prompt,
        ExampleAnswer(
            " zi ne",
            (" zi", " n", "e", "<end>"),
            ("neutral", "negative", "negative", "neutral"),
            (0.1, -0.5, -0.7, 0.0),
        ),
        ExampleAnswer(" zi laro", (" zi", " laro", "<end>"), ("neutral", "positive", "neutral"), (0.1, 0.8, 0.0)),
    )
    (folder / "analysis" / "analysis.json").write_text(json.dumps(made_up(example=edit)))
    text = write_report(folder).read_text(encoding="utf-8")
    Page(text)
    figure = text[text.index('id="edit"') : text.index('id="what"')]
    assert re.findall(r'class="token (\w+)"><span class="word">([^<]*)<', figure) == [
        *(("kept", " zi"), ("removed", " n"), ("removed", "e"), ("kept", "&lt;end&gt;")),
        *(("kept", " zi"), ("added", " laro"), ("kept", "&lt;end&gt;")),
    ]
    assert re.findall(r'--r: (\S+)"', figure) == ["0.1", "-0.5", "-0.7", "0.0", "0.1", "0.8", "0.0"]
    # each word's gold stands under its last token
    worth = {word.text: number(word.gold, 1) for word in gold(prompt, " zi ne laro").words}
    shown = [cell.replace("&nbsp;", "") for cell in re.findall(r'class="gold">([^<]*)<', figure)]
    assert shown == [worth["zi"], "", worth["ne"], "", worth["zi"], worth["laro"], ""]


def test_an_analysis_of_an_older_version_has_no_edit_to_draw(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    (folder / "analysis").mkdir()
    older = made_up()
    del older["example"]
    (folder / "analysis" / "analysis.json").write_text(json.dumps(older))
    assert 'id="edit"' not in write_report(folder).read_text(encoding="utf-8")


def test_the_tables_hold_the_figures(tmp_path: Path) -> None:
    page = Page(write_analysis_page(tmp_path, made_up(), "mine").read_text(encoding="utf-8"))
    kinds = {row[0]: row[1:] for row in page.rows["analysis-kinds"]}
    assert kinds["Substituted, the old token"] == ["negative", "1", "1", "1.000", "1.000", number(-0.5)]
    assert kinds["Inserted"] == ["positive", "1", "1", "0.000", "0.000", number(-0.6)]
    assert kinds["Kept, in the rejected answer"][:3] == ["neutral", "5", "2"]
    assert kinds["Kept, in the rejected answer"][3:5] == ["–", "–"]  # noqa: RUF001
    distances = {row[0]: row[1:] for row in page.rows["analysis-spill"]}
    assert distances["1 after"] == ["1", number(-0.2), "0.200", "0.400"]
    assert distances["1 before"][0] == "2" and distances["1 before"][3].startswith("0.000")
    answers = {row[0]: row[1] for row in page.rows["analysis-answers"]}
    assert answers["Pairs"] == "3"
    assert answers["Share of pairs told right by the mean reward"].startswith("0.667 ")
    assert answers["… where it is shorter"] == "0.000"


def test_a_name_cannot_write_into_the_page(tmp_path: Path) -> None:
    text = write_analysis_page(tmp_path, made_up(), NASTY).read_text(encoding="utf-8")
    Page(text)
    assert "<script" not in text and "&lt;script&gt;" in text


def test_a_page_of_little_stands_too(tmp_path: Path) -> None:
    """No kept token beside an edit, no answers compared: those parts are left out."""
    page = Page(write_analysis_page(tmp_path, made_up(spill=(), comparisons={}), "mine").read_text(encoding="utf-8"))
    assert "analysis-spill" not in page.rows and "analysis-answers" not in page.rows


def test_the_report_shows_it_or_says_how_to_get_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"continuous": 0.5}, answers=1)
    add_stages(run)
    assert "<code>tlcr analyse</code>" in write_report(run).read_text(encoding="utf-8")
    (run / "analysis").mkdir()
    (run / "analysis" / "analysis.json").write_text(json.dumps(made_up()))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.rows["analysis-kinds"][1][0] == "Substituted, the old token"


def test_the_terminal_shows_the_kinds() -> None:
    file = io.StringIO()
    analysis_page.print_analysis(made_up(), Console(file=file, width=80))
    shown = file.getvalue()
    assert "2 pairs, 17 tokens; 95% intervals over pairs" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("Deleted")] == []
    assert any(line.split()[:5] == ["Substituted,", "the", "old", "token", "1"] for line in shown.splitlines())


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [(None, -4, "4+ before"), (-1, -1, "1 before"), (1, 1, "1 after"), (5, 8, "5–8 after"), (9, None, "9+ after")],  # noqa: RUF001
)
def test_distances_in_words(first: int | None, last: int | None, words: str) -> None:
    assert analysis_page._distance({"first": first, "last": last}) == words
