"""Verdicts and grades to figures: plain values that go into ``results.json`` and, as tables, into ``report.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar, get_args

import jinja2
import numpy as np

from tlcr.config.judging import JudgeConfig
from tlcr.evaluation.bootstrap import CONFIDENCE
from tlcr.judging.formats import QuestionId
from tlcr.judging.statistics import agreement, bootstrap_interval, length_controlled, wilson_interval
from tlcr.judging.verdicts import FAILURES, Comparison, Grade, Ruling

__all__ = ["Label", "comparison_results", "grade_results", "render"]

RowT = TypeVar("RowT", Comparison, Grade)
Label = tuple[QuestionId, int, str]
"""Question, turn (from 1) and winner, as someone else saw it."""

RULINGS: tuple[Ruling, ...] = get_args(Ruling)
POINTS = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}
SEED = 0
"""Of the bootstrap: the same verdicts give the same intervals."""
HARDLY_ANY = 0.2
"""A kappa up to here is called slight agreement (Landis and Koch 1977)."""


def comparison_results(
    comparisons: Sequence[Comparison], cfg: JudgeConfig, labels: Mapping[str, Sequence[Label]]
) -> dict[str, Any]:
    """All figures of a comparison of two models, one comparison or more, from model_a's side.

    Comparisons of which an order could not be read are counted, and stand in no figure but the lengths. labels: others'
    verdicts on these comparisons, by where they come from.
    """
    judged = [comparison for comparison in comparisons if comparison.winner is not None]
    rulings = Counter[str](ruling for each in comparisons for ruling in (each.ruling_ab, each.ruling_ba))
    readable = sum(rulings[name] for name in RULINGS)
    winners = [each.winners for each in judged if each.winners is not None]
    return {
        "comparisons": len(comparisons),
        "judged": len(judged),
        "rulings": rulings.total(),
        "failures": {name: rulings[name] for name in FAILURES},
        **_outcomes(judged),
        "length_controlled": _length_controlled(judged, cfg) if judged else None,
        "mean_length": {
            "model_a": _mean([each.length_a for each in comparisons]),
            "model_b": _mean([each.length_b for each in comparisons]),
        },
        "orders": {
            **asdict(agreement([ab for ab, _ in winners], [ba for _, ba in winners])),
            "inconsistent": sum(ab != ba for ab, ba in winners),
            "said": {name: rulings[name] / readable if readable else None for name in RULINGS},
        },
        "categories": _by(judged, lambda each: each.category, _outcomes),
        "turns": _by(judged, lambda each: each.turn, _outcomes),
        "labels": {source: _against(judged, theirs) for source, theirs in labels.items()},
    }


def grade_results(grades: Sequence[Grade], cfg: JudgeConfig) -> dict[str, Any]:
    """All figures of one model's grades. Replies without a grade are counted, and stand in no figure but the length."""
    graded = [grade for grade in grades if grade.grade not in FAILURES]
    return {
        "replies": len(grades),
        "judged": len(graded),
        "failures": {name: sum(grade.grade == name for grade in grades) for name in FAILURES},
        **_grades(graded, cfg),
        "mean_length": _mean([grade.length for grade in grades]),
        "categories": _by(graded, lambda each: each.category, lambda rows: _grades(rows, cfg)),
        "turns": _by(graded, lambda each: each.turn, lambda rows: _grades(rows, cfg)),
    }


def _outcomes(rows: Sequence[Comparison]) -> dict[str, Any]:
    counts = Counter(each.winner for each in rows)
    found = {"wins": counts["model_a"], "ties": counts["tie"], "losses": counts["model_b"]}
    if not rows:
        return {**found, "win_rate": None}
    value = _mean(_points(rows))
    questions = len({each.question_id for each in rows})
    return {**found, "win_rate": {"value": value, "interval": wilson_interval(value, questions, CONFIDENCE)}}


def _length_controlled(rows: Sequence[Comparison], cfg: JudgeConfig) -> dict[str, Any]:
    points = np.array(_points(rows))
    lengths_a = np.array([each.length_a for each in rows], dtype=float)
    lengths_b = np.array([each.length_b for each in rows], dtype=float)
    interval = bootstrap_interval(
        lambda drawn: length_controlled(points[drawn], lengths_a[drawn], lengths_b[drawn]).win_rate,
        [each.question_id for each in rows],
        resamples=cfg.resamples,
        confidence=CONFIDENCE,
        seed=SEED,
    )
    found = length_controlled(points, lengths_a, lengths_b)
    return {"value": found.win_rate, "interval": interval, "quality": found.quality, "length": found.length}


def _grades(rows: Sequence[Grade], cfg: JudgeConfig) -> dict[str, Any]:
    if not rows:
        return {"grades": 0, "grade": None}
    grades = np.array([each.grade for each in rows], dtype=float)
    interval = bootstrap_interval(
        lambda drawn: float(grades[drawn].mean()),
        [each.question_id for each in rows],
        resamples=cfg.resamples,
        confidence=CONFIDENCE,
        seed=SEED,
    )
    return {"grades": len(rows), "grade": {"value": float(grades.mean()), "interval": interval}}


def _against(rows: Sequence[Comparison], labels: Sequence[Label]) -> dict[str, Any]:
    """Agreement with others: every label of theirs beside our verdict on the same, so that several people may count."""
    ours = {(each.question_id, each.turn): str(each.winner) for each in rows}
    pairs = [(ours[question, turn], winner) for question, turn, winner in labels if (question, turn) in ours]
    found = asdict(agreement([our for our, _ in pairs], [their for _, their in pairs]))
    return {"labels": len(labels), **found}


def _points(rows: Sequence[Comparison]) -> list[float]:
    return [POINTS[str(each.winner)] for each in rows]


def _by(
    rows: Sequence[RowT], key: Callable[[RowT], Hashable], figures: Callable[[Sequence[RowT]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[RowT]] = {}
    for row in rows:
        groups.setdefault(str(key(row)), []).append(row)
    return {name: figures(groups[name]) for name in sorted(groups)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def render(results: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tlcr.judging"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("judged.md.j2").render(results=results, remarks=_remarks(results), total=sum)


def _remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    remarks = []
    failed = {name: count for name, count in results["failures"].items() if count}
    if failed:
        counts = ", ".join(f"{count} {name}" for name, count in failed.items())
        remarks.append(f"Not to be read as a verdict: {counts}. These stand in no figure but the lengths.")
    if "comparisons" not in results or not results["judged"]:
        return remarks
    for name, figure in (("", results["win_rate"]), ("length-controlled ", results["length_controlled"])):
        low, high = figure["interval"] or (figure["value"], figure["value"])
        if low <= 0.5 <= high:
            remarks.append(f"The {name}win rate does not tell the two models apart: one half is within its interval.")
    kappa = results["orders"]["kappa"]
    if kappa is not None and kappa <= HARDLY_ANY:
        remarks.append(
            f"Shown the replies in the other order, the judge agrees with itself hardly more than chance would "
            f"(kappa {kappa:.2f}): these verdicts are no measure of the replies."
        )
    return remarks
