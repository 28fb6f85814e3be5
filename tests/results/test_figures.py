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
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8").count(" = ") >= 9


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


def stated(*lines: str) -> str:
    """A sentence with the figures of these lines, and the comment that says where they come from."""
    said = " and ".join(line.partition(" = ")[0] for line in lines)
    return f"- One.\n- It is {said}.\n  <!-- from\n  " + "\n  ".join(lines) + "\n  -->\n"


@pytest.mark.parametrize(
    "text",
    [
        stated("0.018 (\u22120.003 to 0.040) = r.json gaps[lam=0.7, other=sum].gap"),
        stated("0.02 = r.json gaps[lam=0.7].gap"),  # fewer decimals, without its interval
        stated("1,234.5 = r.json gaps[lam=0.95].gap", "7 = r.json gaps[lam=0.95].cost"),
        stated("0.40 (0.35 to \u22120.10) = t.md [a, 0.1] gold", "0.3 = t.md [*, 0.2] gold"),
        stated("2.0 = t.md [a] KL"),
        stated("0.018 ± 0.022 = r.json gaps[lam=0.7].gap").replace("018 ±", "018\n  ±", 1),  # a line of text ends there
        "<!-- rows = t.md -->\n\n| a | 0.2 | 0.3 |\n| a | 2 |\n",
    ],
)
def test_what_is_right_passes(folder: Path, text: str) -> None:
    assert not list(unfounded(text, folder))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (stated("0.019 (\u22120.003 to 0.040) = r.json gaps[lam=0.7].gap"), "says 0.019"),
        (stated("0.018 (0.003 to 0.040) = r.json gaps[lam=0.7].gap"), "says 0.003"),
        (stated("\u22120.018 = r.json gaps[lam=0.7].gap"), "says \u22120.018"),
        (stated("0.018 ± 0.023 = r.json gaps[lam=0.7].gap"), "says 0.023"),
        (stated("1234 (1 to 2) = r.json gaps[lam=0.95].gap"), "the file has None"),
        (stated("7 = r.json gaps[other=sum].cost"), "2 entries have"),
        (stated("7 = r.json gaps[lam=0.7].cost"), "there is no .cost"),
        (stated("7 = r.json gaps[lam=0.7].gap.seeds"), "is no number"),
        (stated("7 = none.json x"), "No such file"),
        (stated("0.3 = t.md [a] gold"), "2 rows"),
        (stated("a figure = r.json gaps"), "is no figure with a file and a path"),
        (stated("2.0 = t.md [a] KL").replace("It is 2.0", "It is 3.0"), "the text above does not say so"),
        ("It is \u22122.0.\n<!-- from\n2.0 = t.md [a] KL\n-->\n", "the text above does not say so"),
        ("It is 12.0.\n<!-- from\n2.0 = t.md [a] KL\n-->\n", "the text above does not say so"),
        ("It is 2.05.\n<!-- from\n2.0 = t.md [a] KL\n-->\n", "the text above does not say so"),
        ("2.0\n\nIt is.\n<!-- from\n2.0 = t.md [a] KL\n-->\n", "the text above does not say so"),
        ("2.0 <!-- = t.md [a] KL -->", "1 of 1 marks have no lines with figures"),
        ("<!-- rows = t.md -->\n\n| a | 0.2 | 0.4 |\n", "has no row"),
        ("<!-- rows = t.md -->\n\nno table", "stand over no table"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, text: str, complaint: str) -> None:
    assert complaint in " ".join(unfounded(text, folder))


def test_a_path_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(Unfounded, match="is no \\[row\\] column"):
        look_up(folder / "t.md", "gold")
