"""Further measures of a comparison, from its stored answers: other scorers, and repetition and diversity of the text.

    python examples/measures.py runs/imdb_comparison --scorer examples/imdb_reviews/classifier.py:positive

prints Markdown: each arm's held-out answers before and after PPO. Gold at matched KL is in the run's own report and
results.md. Needs a run with `evaluation.samples` at least as large as `evaluation.prompts`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tlcr.errors import DataError
from tlcr.report.page import number
from tlcr.report.results import Mean, SeedRun, mean_over_seeds, read_runs
from tlcr.rewards.sources import import_function

Measure = Callable[[Sequence[str], Sequence[str]], float]
"""(prompts, responses) of one policy to one figure."""


def figure(mean: Mean | None, digits: int = 3) -> str:
    """Mean [interval]; a dash where there is none."""
    if mean is None:
        return number(None)
    bounds = f" [{number(mean.interval[0], digits)}, {number(mean.interval[1], digits)}]" if mean.interval else ""
    return number(mean.mean, digits) + bounds


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
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


def tables(folder: Path, scorers: Sequence[str]) -> str:
    """What the command prints. DataError where the folder holds no evaluated run."""
    runs = read_runs(folder)
    if not runs:
        raise DataError(f"{folder} holds no evaluated PPO run; name the output_dir of 'tlcr run'")
    own = {path.rpartition(":")[2]: mean_of(import_function(path, "--scorer")) for path in scorers}
    head = f"Answers to {runs[0].before['answers']} held-out prompts; mean [95 % interval of Student's t] over seeds."
    return "\n\n".join([head, measured(folder, runs, {**own, **TEXT_MEASURES})])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument(
        "--scorer", action="append", default=[], help="'file.py:function', as for evaluation.scorer; may be repeated"
    )
    options = parser.parse_args(arguments)
    sys.stdout.write(tables(options.run, options.scorer) + "\n")


if __name__ == "__main__":
    main()
