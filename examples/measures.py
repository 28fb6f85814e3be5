"""Further measures of a comparison, from its stored answers: other scorers, and repetition and diversity of the text.

    python -m examples.measures runs/imdb_comparison --scorer examples/imdb_reviews/classifier.py:positive

prints Markdown: each arm's held-out answers before and after PPO, and each further scorer at matched KL. Gold at
matched KL is in the run's own report and results.md. Needs a run with `evaluation.samples` at least as large as
`evaluation.prompts`. With `--figures FOLDER` a line of each further scorer against KL is drawn, in FOLDER/NAME.svg,
and one of gold with `--along-training`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from examples.study import command, golds_at_equal_kl, markdown
from tlcr.errors import DataError
from tlcr.files import atomic_write
from tlcr.report import figures
from tlcr.report.page import frontier_figure, number
from tlcr.report.results import Mean, SeedRun, frontier, mean_over_seeds, paths, read_runs
from tlcr.rewards.sources import import_function

Measure = Callable[[Sequence[str], Sequence[str]], float]
"""(prompts, responses) of one policy to one figure."""


def figure(mean: Mean | None) -> str:
    """Mean [interval]; a dash where there is none."""
    return number(None) if mean is None else _figure(mean.mean, mean.interval)


def _figure(mean: float | None, interval: Sequence[float] | None) -> str:
    return number(mean) + (f" [{number(interval[0])}, {number(interval[1])}]" if interval else "")


def repeated_share(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """Share of words that occurred earlier in their answer; 0 without words."""
    words = [response.lower().split() for response in responses]
    total = sum(map(len, words))
    return (total - sum(len(set(own)) for own in words)) / total if total else 0.0


def distinct_pairs(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """distinct-2 (Li et al. 2016): the different ones among all pairs of neighbouring words of all answers, in [0, 1].

    Low where a policy gives the same answer to every prompt. 0 without pairs. It falls with the number of words too, so
    compare it between policies that answered the same prompts at about the same length.
    """
    pairs = [pair for response in responses for pair in pairwise(response.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def words_per_answer(prompts: Sequence[str], responses: Sequence[str]) -> float:
    return sum(len(response.split()) for response in responses) / len(responses)


TEXT_MEASURES: Mapping[str, Measure] = {
    "words repeated within an answer": repeated_share,
    "distinct pairs of words": distinct_pairs,
    "words an answer": words_per_answer,
}


def mean_of(scorer: Callable[[Sequence[str], Sequence[str]], Sequence[float]]) -> Measure:
    def measure(prompts: Sequence[str], responses: Sequence[str]) -> float:
        scores = list(scorer(prompts, responses))
        return sum(scores) / len(scores)

    return measure


def kept_answers(folder: Path, run: SeedRun, when: str) -> tuple[list[str], list[str]]:
    """Prompts and responses of a run, "before" or "after". DataError where it did not keep all of them."""
    path = folder / "ppo" / run.folder / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    own = [line for line in lines if line["when"] == when]
    evaluated = (run.before if when == "before" else run.after)["answers"]
    if len(own) != evaluated:
        raise DataError(
            f"{path} has {len(own)} answers of {evaluated}; set evaluation.samples to evaluation.prompts and run "
            "'tlcr evaluate' with the run's config"
        )
    return [line["prompt"] for line in own], [line["response"] for line in own]


def measured(folder: Path, runs: Sequence[SeedRun], measures: Mapping[str, Measure]) -> str:
    """Gold, KL and every measure, over seeds: of the reference as the first run found it, and of each arm after PPO."""

    def row(own: Sequence[SeedRun], when: str) -> list[str]:
        evaluations = [run.before if when == "before" else run.after for run in own]
        answers = [kept_answers(folder, run, when) for run in own]
        columns = [[evaluation[name] for evaluation in evaluations] for name in ("gold_per_answer", "kl_per_answer")]
        columns += [[measure(*texts) for texts in answers] for measure in measures.values()]
        return [figure(mean_over_seeds([value for value in column if value is not None])) for column in columns]

    by_arm: dict[str, list[SeedRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm if run.kl_coef is None else f"{run.arm} @ {run.kl_coef}", []).append(run)
    rows = [["before", *row(runs[:1], "before")], *([arm, *row(own, "after")] for arm, own in by_arm.items())]
    return markdown(["arm", "gold", "KL, nats", *measures], rows)


def judged(folder: Path, runs: Sequence[SeedRun], measure: Measure) -> list[SeedRun]:
    """The runs with this measure of their answers in place of gold. Only the ends of a run have their answers kept, so
    its curve is these two."""

    def ends(run: SeedRun) -> SeedRun:
        before, after = (
            {**evaluation, "gold_per_answer": measure(*kept_answers(folder, run, when))}
            for when, evaluation in (("before", run.before), ("after", run.after))
        )
        return replace(run, before=before, after=after, curve=({**before, "update": 0}, {**after, "update": 1}))

    return [ends(run) for run in runs]


def at_matched_kl(name: str, found: Mapping[str, Any]) -> str:
    """The tables of a `frontier`: gold per answer, under this name, at the KL that arms have in common."""
    levels = [
        [
            arm,
            *(
                _figure(None, None) if (m := level["arms"][arm]) is None else _figure(m["mean"], m["interval"])
                for level in found["levels"]
            ),
        ]
        for arm in found["reached"]
    ]
    pairs = [[*golds_at_equal_kl(pair), _figure(pair["difference"], pair["interval"])] for pair in found["comparisons"]]
    text = f"{name} at matched KL (nats per answer); a dash where not every seed got there:\n\n"
    text += markdown(["arm", *(number(level["kl"]) for level in found["levels"])], levels)
    if pairs:
        first = found["comparisons"][0]["arm"]
        text += f"\n\n{name} of {first} and of each other arm at the largest KL that all runs of both reached:\n\n"
        text += markdown(["against", "KL", first, "the other", "difference"], pairs)
    return text


def along_training(runs: Sequence[SeedRun], place: int) -> list[SeedRun]:
    """The runs of one coefficient of each arm, the `place`-th from the smallest, as if it were the only one: so that
    they are compared along their training, and not by where it ended under each coefficient.

    DataError where an arm has fewer.
    """
    coefs: dict[str, list[float]] = {}
    for run in runs:
        coefs.setdefault(run.arm, []).append(run.kl_coef or 0.0)
    ordered = {arm: sorted(set(own)) for arm, own in coefs.items()}
    if few := [arm for arm, own in ordered.items() if not 1 <= place <= len(own)]:
        raise DataError(f"--along-training is {place}, and the arms {', '.join(few)} have no coefficient of that place")
    return [replace(run, kl_coef=None) for run in runs if (run.kl_coef or 0.0) == ordered[run.arm][place - 1]]


def plot(name: str, runs: Sequence[SeedRun], found: Mapping[str, Any]) -> str:
    """Gold per answer of these runs, whose `frontier` is given, against KL, as their report draws it."""
    arms = [{"name": arm} for arm in found["reached"]]
    return figures.as_file(
        frontier_figure({"arms": arms, "per": "answer", "frontier": found, "paths": paths(runs)}, measure=name)
    )


def print_measures(
    folder: Path, scorers: Sequence[str], pictures: Path | None = None, along: int | None = None
) -> None:
    """Prints the tables; the figures of the scorers go to `pictures`. along: see `along_training`. DataError where the
    folder holds no evaluated run."""
    runs = read_runs(folder)
    if not runs:
        raise DataError(f"{folder} holds no evaluated PPO run; name the output_dir of 'tlcr run'")
    own = {path.rpartition(":")[2]: mean_of(import_function(path, "--scorer")) for path in scorers}

    def compare(name: str, of: Sequence[SeedRun]) -> None:
        found = frontier(of, per="answer")
        if found is None:  # no run moved
            return
        parts.append(at_matched_kl(name, found))
        if pictures is not None:
            with atomic_write(pictures / f"{name}.svg") as aside:
                aside.write_text(plot(name, of, found), encoding="utf-8")

    head = f"Answers to {runs[0].before['answers']} held-out prompts; mean [95 % interval of Student's t] over seeds."
    parts = [head, measured(folder, runs, {**own, **TEXT_MEASURES})]
    if along is not None:
        parts.append(f"Gold along training, with coefficient {along} of each arm:")
        compare("gold", along_training(runs, along))
    for name, measure in own.items():
        compare(name, judged(folder, runs, measure))
    sys.stdout.write("\n\n".join(parts) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument(
        "--scorer", action="append", default=[], help="'file.py:function', as for evaluation.scorer; may be repeated"
    )
    parser.add_argument("--figures", type=Path, help="folder for a figure of each scorer against KL")
    parser.add_argument(
        "--along-training",
        type=int,
        metavar="N",
        help="compare gold along the training of the runs with each arm's N-th coefficient too, 1 the smallest",
    )
    options = parser.parse_args(arguments)
    return command(lambda: print_measures(options.run, options.scorer, options.figures, options.along_training))


if __name__ == "__main__":
    raise SystemExit(main())
