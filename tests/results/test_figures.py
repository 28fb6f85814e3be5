"""The figures of docs/results.md and its pages are those of their files; and the check finds those that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.results.figures import RESULTS, Unfounded, look_up, unfounded

PAGES = [RESULTS.with_suffix(".md"), *sorted(RESULTS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_its_file_has(page: Path) -> None:
    assert not list(unfounded(page.read_text(encoding="utf-8")))


def test_the_short_page_names_files() -> None:
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8").count("<!-- = ") >= 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"lam": 0.7, "other": "sum", "gap": {"difference": 0.01849, "interval": [-0.0034, 0.04], "seeds": [0, 1]}},
        {"lam": 0.95, "other": "sum", "gap": {"mean": 1234.5, "interval": None}, "cost": 7},
    ]
    (tmp_path / "r.json").write_text(json.dumps({"gaps": rows}))
    (tmp_path / "t.md").write_text(
        "| arm | coef | gold |\n|---|---|---|\n| a | 0.1 | 0.4 [0.35, \u22120.1] |\n| a | 0.2 | 0.3 |\n\n"
        "| arm | KL |\n|---|---|\n| a | 2 |\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "it is 0.018 (\u22120.003 to 0.040)<!-- = r.json gaps[lam=0.7, other=sum].gap --> more",
        "0.02<!-- = r.json gaps[lam=0.7].gap -->",  # fewer decimals, without its interval
        "1,234.5<!-- = r.json gaps[lam=0.95].gap --> and 7<!-- = r.json gaps[lam=0.95].cost -->",
        "0.40 (0.35 to \u22120.10)<!-- = t.md [a, 0.1] gold --> and 0.3<!-- = t.md [*, 0.2] gold -->",
        "2.0<!-- = t.md [a] KL -->",
        "0.018 ± 0.022<!-- = r.json gaps[lam=0.7].gap -->",
        "<!-- rows = t.md -->\n\n| a | 0.2 | 0.3 |\n| a | 2 |\n",
    ],
)
def test_what_is_right_passes(folder: Path, text: str) -> None:
    assert not list(unfounded(text, folder))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0.019 (\u22120.003 to 0.040)<!-- = r.json gaps[lam=0.7].gap -->", "says 0.019"),
        ("0.018 (0.003 to 0.040)<!-- = r.json gaps[lam=0.7].gap -->", "says 0.003"),
        ("\u22120.018<!-- = r.json gaps[lam=0.7].gap -->", "says \u22120.018"),
        ("0.018 ± 0.023<!-- = r.json gaps[lam=0.7].gap -->", "says 0.023"),
        ("1234 (1 to 2)<!-- = r.json gaps[lam=0.95].gap -->", "the file has None"),
        ("7<!-- = r.json gaps[other=sum].cost -->", "2 entries have"),
        ("7<!-- = r.json gaps[lam=0.7].cost -->", "there is no .cost"),
        ("7<!-- = r.json gaps[lam=0.7].gap.seeds -->", "is no number"),
        ("7<!-- = none.json x -->", "No such file"),
        ("0.3<!-- = t.md [a] gold -->", "2 rows"),
        ("a figure <!-- = r.json gaps -->", "1 of 1 marks follow no figure"),
        ("<!-- rows = t.md -->\n\n| a | 0.2 | 0.4 |\n", "has no row"),
        ("<!-- rows = t.md -->\n\nno table", "stand over no table"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, text: str, complaint: str) -> None:
    assert complaint in " ".join(unfounded(text, folder))


def test_a_path_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(Unfounded, match="is no \\[row\\] column"):
        look_up(folder / "t.md", "gold")
