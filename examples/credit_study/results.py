"""The tables and the figure of the study, from the files of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.credit_study import theory
from examples.study import with_interval
from tlcr.files import atomic_write, write_json
from tlcr.report import figures
from tlcr.report.page import number
from tlcr.report.results import (
    SeedRun,
    gold_at_matched_kl,
    mean_over_seeds,
    paired_difference,
    reached_kl,
    read_runs,
)
from tlcr.training.metrics import read_metrics

SEPARATOR = "+"
DENSE = "continuous"
"""What the other placements are compared with."""
PER_MILLION = 1e6


def name_of(placement: str, lam: float, value: str) -> str:
    """The folder of the PPO runs of a placement with a lambda and a value model; `read_name` is the inverse."""
    return SEPARATOR.join((placement, f"lam-{lam}", value))


def read_name(name: str) -> tuple[str, float, str]:
    placement, lam, value = name.split(SEPARATOR)
    return placement, float(lam.removeprefix("lam-")), value


def collect(folder: Path, lengths: Sequence[int]) -> dict[str, Any]:
    """Everything that the tables show.

    ends: a row for each length, placement, lambda and value model: gold per token, KL and length where training ended,
    and gold gained for a million sampled tokens, each over seeds. best: for each length, placement and lambda the value
    model that ends with the most gold, chosen on the same runs. gaps: continuous less each other placement, each with
    the value model that is best for it, at the largest KL that all runs of both reached.
    """
    ends, best, gaps = [], [], []
    for tokens in lengths:
        place = folder / f"length-{tokens}"
        grouped: dict[tuple[str, float, str], list[SeedRun]] = {}
        for run in read_runs(place):
            grouped.setdefault(read_name(run.arm), []).append(run)
        rows = [
            {"length": tokens, "placement": placement, "lam": lam, "value": value, **_summary(place, runs)}
            for (placement, lam, value), runs in sorted(grouped.items())
        ]
        ends += rows
        chosen = _best(rows)
        best += chosen.values()
        for (placement, lam), row in chosen.items():
            if placement != DENSE and (DENSE, lam) in chosen:
                ours = grouped[DENSE, lam, chosen[DENSE, lam]["value"]]
                gaps.append(
                    {"length": tokens, "lam": lam, "other": placement}
                    | _gap(ours, grouped[placement, lam, row["value"]])
                )
    return {"ends": ends, "best": best, "gaps": gaps}


def _summary(folder: Path, runs: Sequence[SeedRun]) -> dict[str, Any]:
    def over_seeds(values: Iterable[float]) -> dict[str, Any]:
        return asdict(mean_over_seeds(list(values)))  # type: ignore[arg-type]  # there is a run

    def gain(run: SeedRun) -> float:
        sampled = sum(
            row["length/tokens"] for row in read_metrics(folder / "ppo" / run.folder / "metrics.jsonl") if row["step"]
        )
        return PER_MILLION * (run.after["gold_per_token"] - run.before["gold_per_token"]) / sampled

    return {
        "seeds": [run.seed for run in runs],
        "gold": over_seeds(run.after["gold_per_token"] for run in runs),
        "kl": over_seeds(run.after["kl_per_token"] for run in runs),
        "tokens": over_seeds(run.after["length"] for run in runs),
        "gain_per_million": over_seeds(map(gain, runs)),
    }


def _best(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, float], Mapping[str, Any]]:
    """For each placement and lambda the row of the value model with the most gold, among those with the most seeds."""
    found: dict[tuple[str, float], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["placement"], row["lam"])
        rank = (len(row["seeds"]), row["gold"]["mean"])
        if key not in found or rank > (len(found[key]["seeds"]), found[key]["gold"]["mean"]):
            found[key] = row
    return found


def _gap(ours: Sequence[SeedRun], theirs: Sequence[SeedRun]) -> dict[str, Any]:
    kl = min(reached_kl(ours), reached_kl(theirs))
    mine, others = ({run.seed: run.curve for run in runs} for runs in (ours, theirs))
    dense, other = (gold_at_matched_kl(curves, kl) for curves in (mine, others))
    ends = paired_difference(*({run.seed: run.after["gold_per_token"] for run in runs} for runs in (ours, theirs)))
    return {"kl": kl, "at_kl": paired_difference(dense, other), "at_end": ends}


def write(folder: Path, lengths: Sequence[int]) -> None:
    """results.json, results.md, gap.svg and theory.svg."""
    found = collect(folder, lengths)
    write_json(folder / "results.json", found)
    texts = {"results.md": as_markdown(found), "gap.svg": plot(found["gaps"]), "theory.svg": plot_theory(lengths)}
    for name, text in texts.items():
        with atomic_write(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")


def as_markdown(found: Mapping[str, Any]) -> str:
    """The tables of results.md: means and 95 % intervals (Student's t) over seeds."""
    lines = [
        "| tokens | placement | lambda | value model | gold per token | KL, nats per token | tokens an answer | "
        "gold for a million sampled tokens | seeds |",
        "|---" * 9 + "|",
    ]
    lines += [
        f"| {row['length']} | {row['placement']} | {row['lam']} | {row['value']} | {_cell(row['gold'])} | "
        f"{_cell(row['kl'])} | {_cell(row['tokens'])} | {_cell(row['gain_per_million'])} | {len(row['seeds'])} |"
        for row in found["ends"]
    ]
    lines += [
        "",
        "| tokens | lambda | continuous less | at equal KL | KL | where training ended |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {gap['length']} | {gap['lam']} | {gap['other']} | {_difference(gap['at_kl'])} | {number(gap['kl'])} | "
        f"{_difference(gap['at_end'])} |"
        for gap in found["gaps"]
    ]
    return "\n".join(lines) + "\n"


def _cell(mean: Mapping[str, Any]) -> str:
    return with_interval(mean["mean"], mean["interval"])


def _difference(found: Mapping[str, Any] | None) -> str:
    return "\u2013" if found is None else _cell({"mean": found["difference"], "interval": found["interval"]})


def plot(gaps: Sequence[Mapping[str, Any]]) -> str:
    """Gold of the reward at every token less that of its sum at the end, against length, a line for each lambda."""
    lams = sorted({gap["lam"] for gap in gaps})
    ticks = sorted({gap["length"] for gap in gaps})
    with figures.style():
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.subplots(1, 2, sharex=True)
        for axis, key, title in zip(axes, ("at_kl", "at_end"), ("at equal KL", "where training ended"), strict=True):
            for index, lam in enumerate(lams):
                aside = 1.05 ** (index - (len(lams) - 1) / 2)  # so that no interval hides another
                points = [
                    (aside * gap["length"], gap[key]["difference"], gap[key]["interval"])
                    for gap in gaps
                    if gap["lam"] == lam and gap["other"] == "sum-at-end" and gap[key] is not None
                ]
                if not points:
                    continue
                x, y, intervals = zip(*sorted(points), strict=True)
                error = [0.0 if interval is None else (interval[1] - interval[0]) / 2 for interval in intervals]
                look = {"color": figures.arm_colour(index), "marker": figures.arm_marker(index)}
                axis.errorbar(x, y, error, label=f"lambda {lam}", markersize=4.5, capsize=2, **look)
            axis.axhline(0, color=figures.INK, alpha=0.5, linestyle=(0, (4, 4)))
            axis.set(xscale="log", xlabel="tokens of a mean answer", title=title)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
        axes[0].set_ylabel("gold per token,\ncontinuous less sum at the end")
        axes[0].legend(loc="best", fontsize=9)
        return figures.svg_file(
            figure, "Gold of a reward for every token less that of its sum at the end, against length"
        )


def plot_theory(lengths: Sequence[int], lams: Sequence[float] = (0.7, 0.95, 1.0)) -> str:
    """The share of the advantage's variance that is about its token, against length: at every token, and as a sum."""
    with figures.style():
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        panels = figure.subplots(1, len(lams), sharey=True)
        for axis, lam in zip(panels, lams, strict=True):
            for index, known in enumerate((1.0, 0.5, 0.1, 0.0)):
                label = "at every token" if known == 1 else f"sum at the end, {known:.0%} known"
                shares = [theory.squared_correlation([tokens], lam, known=known) for tokens in lengths]
                look = {"color": figures.arm_colour(index), "marker": figures.arm_marker(index)}
                axis.plot(lengths, shares, label=label, markersize=4.5, **look)
            axis.set(xscale="log", yscale="log", xlabel="tokens of an answer", title=f"lambda {lam}", ylim=(5e-5, 1))
            axis.set_xticks(lengths, [str(tick) for tick in lengths])
            axis.minorticks_off()
        panels[0].set_ylabel("share of the advantage\nthat is about its token")
        panels[-1].legend(loc="lower left", fontsize=8)
        return figures.svg_file(figure, "Squared correlation of a token's advantage with its own reward, by the theory")
