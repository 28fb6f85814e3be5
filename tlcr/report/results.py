"""From the files of a run to its figures: what every arm reached, at which KL, and how sure the seeds are of it.

Everything is read from the run's folder and nothing is trained or sampled here, so that a report can be made again
at any time. Gold is compared at matched KL, because at the same coefficient a reward of larger scale buys more of both.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import numpy as np
import yaml
from scipy import stats

from tlcr.config.schema.run import EvaluationConfig
from tlcr.config.stages import CONFIG, DONE, TRAINED
from tlcr.config.trials import folder_of, read_folder
from tlcr.errors import DataError, TlcrError
from tlcr.evaluation.evaluate import MEASURES
from tlcr.files import write_json
from tlcr.ppo.best import BEST, RECORD, Per
from tlcr.text.files import parse_json
from tlcr.training.metrics import read_metrics

logger = logging.getLogger(__name__)

Curve = Sequence[Mapping[str, Any]]
"""Evaluations, measure to value, in the order of training or of KL coefficients."""

LEVELS = (0.25, 0.5, 1.0)
"""Matched KL is looked at here, as shares of the KL that half of the arms reached."""
CONFIDENCE = 0.95
POWER = 0.75
"""Between two points gold is read on a line that is straight in this power of the KL. A small change of a policy moves
gold in proportion and KL as its square, hence the root of the KL (Gao et al. 2023, arXiv 2210.10760); early in training
gold follows the KL itself. This power is near the best in both cases (docs/results/reading.md, ours)."""


@dataclass(frozen=True)
class SeedRun:
    """One trained policy: its arm and seed, what it was before and after, and the evaluations made on the way.

    kl_coef: None where its arm was tried at a single coefficient.
    """

    arm: str
    kl_coef: float | None
    seed: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    curve: tuple[Mapping[str, float], ...]
    """Evaluations in the order of training, {"update": k, measure: value, ...}, the first and the last included."""
    best: Mapping[str, Any] | None = None
    """The record of the policy that ``ppo.keep_best`` kept (best.json); None where there is none."""
    place: PurePosixPath | None = None
    """Where it lies below ppo/; None: where its arm, coefficient and seed say."""

    @property
    def folder(self) -> PurePosixPath:
        """Where it lies below ppo/."""
        return self.place or folder_of(self.arm, self.kl_coef, self.seed)


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation (n - 1) over seeds, and the two-sided 95 % interval of Student's t for the mean.

    From a single seed there is neither deviation nor interval. Student's t and not a bootstrap, because resampling a
    handful of seeds gives intervals that are far too short.
    """

    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    seeds: int


def mean_over_seeds(values: Sequence[float]) -> Mean | None:
    """None where there is no value."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(mean, None, None, 1)
    sd = statistics.stdev(values)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stats.sem(values)) if sd else (mean, mean)
    return Mean(mean, sd, (float(low), float(high)), len(values))


# ---- gold at matched KL


def scaled(kl: Any, power: float) -> Any:
    """sign(kl) |kl|^power of a number or an array: a KL that was estimated from samples may lie a little below 0."""
    return np.sign(kl) * np.abs(kl) ** power


def gold_at_kl(
    curve: Sequence[Mapping[str, Any]],
    kl: float,
    *,
    measure: str = "gold_per_token",
    against: str = "kl_per_token",
    power: float = POWER,
) -> float | None:
    """Gold where training first reached this KL: between the evaluation before and the one that reached it, on a line
    that is straight in this power of the KL.

    None where the run never got there. A run that leaves the level again and comes back counts as it first passed,
    so that time spent over-optimising does not choose the best moment.
    """
    points = [
        (scaled(p[against], power), p[measure])
        for p in curve
        if p.get(against) is not None and p.get(measure) is not None
    ]
    if not points:
        return None
    place = scaled(kl, power)
    if points[0][0] >= place:
        return float(points[0][1])
    for (place_0, gold_0), (place_1, gold_1) in itertools.pairwise(points):
        if place_1 >= place:
            return float(gold_0 + (gold_1 - gold_0) * (place - place_0) / (place_1 - place_0))
    return None


def gold_at_matched_kl(
    curves: Mapping[int, Sequence[Mapping[str, Any]]],
    kl: float,
    *,
    measure: str = "gold_per_token",
    against: str = "kl_per_token",
) -> dict[int, float]:
    """Seed to gold at this KL, for the seeds whose run reached it."""
    found = {seed: gold_at_kl(curve, kl, measure=measure, against=against) for seed, curve in curves.items()}
    return {seed: gold for seed, gold in found.items() if gold is not None}


def reached_kl(runs: Iterable[SeedRun], against: str = "kl_per_token") -> float:
    """The KL that every seed's policies reached where training ended, at any of its coefficients; 0 without a run.

    What a policy passed through on its way and left again does not count: no row of the table has it.
    """
    ends: dict[int, float] = {}
    for run in runs:
        ends[run.seed] = max(ends.get(run.seed, 0.0), float(run.after.get(against) or 0.0))
    return min(ends.values(), default=0.0)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """Mean of ours - theirs over the seeds that both have, its sd, and the two-sided 95 % interval of Student's t.

    Seeds share their prompts and random numbers, so the difference is taken within a seed. None without a common seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    mean = mean_over_seeds([ours[s] - theirs[s] for s in seeds])
    if mean is None:
        return None
    found = _plain(mean)
    return {"difference": found["mean"], "sd": found["sd"], "interval": found["interval"], "seeds": seeds}


def paths(runs: Iterable[SeedRun]) -> dict[str, dict[int, Curve]]:
    """For each arm and seed, the way of its policies away from the reference, as evaluations in their order.

    An arm that was tried at several KL coefficients: the reference, then where training ended under each coefficient,
    the largest first. An arm with a single one: that run's evaluations on its way. "stop" numbers the points of a way.
    """
    grouped: dict[str, dict[int, list[SeedRun]]] = {}
    for run in runs:
        grouped.setdefault(run.arm, {}).setdefault(run.seed, []).append(run)
    return {
        arm: {
            seed: _way(own, [run.kl_coef for runs in by_seed.values() for run in runs]) for seed, own in by_seed.items()
        }
        for arm, by_seed in grouped.items()
    }


def _way(own: Sequence[SeedRun], kl_coefs: Sequence[float | None]) -> Curve:
    """The way of one seed. kl_coefs: of all seeds of its arm, so that a stop is the same coefficient for all."""
    if own[0].kl_coef is None:
        return [{**point, "stop": point["update"]} for point in own[0].curve]
    stops = {coef: stop for stop, coef in enumerate(sorted({c for c in kl_coefs if c is not None}, reverse=True), 1)}
    ends = [{**run.after, "stop": stops[run.kl_coef]} for run in own if run.kl_coef is not None]
    return [{**own[0].before, "stop": 0}, *sorted(ends, key=lambda point: point["stop"])]


def frontier(runs: Iterable[SeedRun], *, per: Per = "token") -> dict[str, Any] | None:
    """Arms compared by gold at matched KL, both per token or per answer, along their `paths`.

    levels: each arm's gold over its seeds at shares of the KL that half of the arms reached (`reached_kl`); None for an
    arm that did not reach a level with every seed, because those that did would be a selection.
    comparisons: the first arm against each other one, at the largest KL that both reached.
    None where no run has gold at a KL above 0.
    """
    measure, against = f"gold_per_{per}", f"kl_per_{per}"
    runs = list(runs)
    curves = {
        arm: measured
        for arm, by_seed in paths(runs).items()
        if (measured := {s: c for s, c in by_seed.items() if any(p.get(measure) is not None for p in c)})
    }
    if not curves:
        return None
    reached = {
        arm: reached_kl([run for run in runs if run.arm == arm and run.seed in by_seed], against)
        for arm, by_seed in curves.items()
    }

    def at(arm: str, kl: float) -> dict[int, float]:
        return gold_at_matched_kl(curves[arm], kl, measure=measure, against=against)

    half = statistics.median_low(reached.values())
    levels = [
        {
            "kl": share * half,
            "arms": {
                arm: _plain_mean(list(at(arm, share * half).values())) if reached[arm] >= share * half else None
                for arm in curves
            },
        }
        for share in LEVELS
        if half > 0
    ]
    first, *others = curves
    comparisons = []
    for other in others:
        kl = min(reached[first], reached[other])
        if kl > 0:
            ours, theirs = at(first, kl), at(other, kl)
            paired = paired_difference(ours, theirs) or {
                "difference": None,
                "sd": None,
                "interval": None,
                "seeds": [],
            }
            comparisons.append(
                {
                    "arm": first,
                    "other": other,
                    "kl": kl,
                    # over the seeds of the difference, that the row adds up; a run in progress has more of one arm
                    "arm_gold": _plain_mean([ours[seed] for seed in paired["seeds"] or ours]),
                    "other_gold": _plain_mean([theirs[seed] for seed in paired["seeds"] or theirs]),
                    **paired,
                }
            )
    if not levels and not comparisons:
        return None
    return {"measure": measure, "against": against, "reached": reached, "levels": levels, "comparisons": comparisons}


def _plain(mean: Mean) -> dict[str, Any]:
    interval = None if mean.interval is None else list(mean.interval)
    return {"mean": mean.mean, "sd": mean.sd, "interval": interval, "seeds": mean.seeds}


def _plain_mean(values: Sequence[float]) -> dict[str, Any] | None:
    mean = mean_over_seeds(values)
    return None if mean is None else _plain(mean)


# ---- a run's folder


def read_runs(folder: Path) -> list[SeedRun]:
    """The PPO runs of a folder that have been evaluated: arms in the order of the config, coefficients from the
    smallest, seeds in theirs.

    Of an arm that was tried at several coefficients, a run in a folder that names none has the coefficient of its
    record; where that has a folder of its own, it is left out, and said so. So are runs that were evaluated with other
    settings than the config's, where there are some with those.
    """
    found: list[SeedRun] = []
    judged: dict[PurePosixPath, Mapping[str, Any]] = {}
    for path in (folder / "ppo").glob("**/seed-*/evaluation.json"):
        evaluation = read_json(path)
        place = PurePosixPath(path.parent.relative_to(folder / "ppo"))
        arm, kl_coef, seed = read_folder(place)
        metrics = path.with_name("metrics.jsonl")
        rows = read_metrics(metrics) if metrics.exists() else []
        ends = {when: with_exact_kl(evaluation[when]) for when in ("before", "after")}
        record = path.parent / BEST / RECORD
        best = read_json(record) if record.exists() else None
        if evaluation.get("settings") != evaluation.get("on_the_way"):
            logger.warning(
                "%s: evaluated again with %s, and during training with %s; the report has its ends alone",
                path.parent,
                evaluation["settings"],
                evaluation["on_the_way"],
            )
            rows, best = [{"step": row["step"]} for row in rows], None
        found.append(SeedRun(arm, kl_coef, seed, ends["before"], ends["after"], _curve(rows, ends), best, place))
        if "settings" in evaluation:  # earlier versions recorded none
            judged[place] = evaluation["settings"]
    unlike = _judged_otherwise(folder, judged)
    found = [run for run in found if run.folder not in unlike]
    found = _with_coefficients(found, folder / "ppo")
    order = {name: place for place, name in enumerate(_arm_order(folder))}
    return sorted(found, key=lambda run: (order.get(run.arm, len(order)), run.arm, run.kl_coef or 0.0, run.seed))


def _judged_otherwise(folder: Path, judged: Mapping[PurePosixPath, Mapping[str, Any]]) -> set[PurePosixPath]:
    """The runs whose figures may not stand beside the others': scorers differ in scale, and prompts in difficulty."""
    if all(settings == next(iter(judged.values())) for settings in judged.values()):
        return set()
    config = read_config(folder).get("evaluation") or {}

    def wanted(settings: Mapping[str, Any]) -> bool:
        return all(settings.get(name) == config.get(name) for name in EvaluationConfig().judged_by)

    alike = {place for place, settings in judged.items() if wanted(settings)}
    if not alike:
        raise DataError(
            f"the runs in {folder / 'ppo'} were evaluated with several settings, none of them those of {CONFIG}; "
            "evaluate them alike by 'tlcr evaluate', and then make the report"
        )
    unlike = set(judged) - alike
    for place in sorted(unlike):
        logger.warning(
            "%s is left out of the report: it was evaluated with %s, and the config has others; 'tlcr evaluate' with a "
            "config that has this run evaluates it again",
            folder / "ppo" / place,
            dict(judged[place]),
        )
    return unlike


def coefficient_of(folder: Path, run: SeedRun) -> float:
    """The KL coefficient that a run of this folder was trained at, also where its arm has no other. DataError where it
    was evaluated and not yet recorded."""
    if run.kl_coef is not None:
        return run.kl_coef
    record = folder / "ppo" / run.folder / TRAINED
    if not record.exists():
        raise DataError(f"{record} is not there: the run did not end; go on with it, or leave it out")
    return float(read_json(record)["config"]["kl"]["coef"])


def _with_coefficients(runs: Sequence[SeedRun], folder: Path) -> list[SeedRun]:
    """Names the coefficient of a run that was its arm's only one, where the arm has others too."""
    named = [run for run in runs if run.kl_coef is not None]
    several, taken = {run.arm for run in named}, {(run.arm, run.kl_coef, run.seed) for run in named}
    found = []
    for run in runs:
        if run.kl_coef is not None or run.arm not in several:
            found.append(run)
            continue
        record = folder / run.folder / TRAINED
        coef = coefficient_of(folder.parent, run) if record.exists() else None
        if coef is not None and (run.arm, coef, run.seed) not in taken:
            found.append(replace(run, kl_coef=coef))
        else:
            logger.warning("%s is left out of the report: its KL coefficient has a folder of its own", record.parent)
    return found


def with_exact_kl(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation with the exact KL in place of the sampled one, where it was saved.

    The sampled KL is a mean of log-ratios. Near the reference its noise is larger than itself, and it may be negative.
    The exact one is a mean over the same states of KL(policy || reference) over the whole vocabulary.
    """
    exact, length = evaluation.get("exact_kl_per_token"), evaluation.get("length")
    if exact is None or length is None:
        return dict(evaluation)
    return {**evaluation, "kl_per_token": exact, "kl_per_answer": exact * length}


def _arm_order(folder: Path) -> list[str]:
    """Arm names as the config lists them; none where it has a single, unnamed one."""
    config = read_config(folder)
    return [arm["name"] for arm in config.get("arms") or []]


def _curve(rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> tuple[Mapping[str, float], ...]:
    points: dict[int, dict[str, float]] = {}
    for row in rows:
        values = {name: row[f"eval/{name}"] for name in MEASURES if row.get(f"eval/{name}") is not None}
        if values:
            points[row["step"]] = {"update": row["step"], **with_exact_kl(values)}
    last = max((row["step"] for row in rows), default=1)
    # The first and the last evaluation are those of evaluation.json, whether or not training logged them.
    for step, when in ((0, "before"), (last, "after")):
        taken = {name: value for name in MEASURES if (value := evaluation[when].get(name)) is not None}
        points[step] = {"update": step, **taken}
    return tuple(points[step] for step in sorted(points))


def collect_results(folder: str | Path) -> dict[str, Any]:
    """Everything that results.json holds, from the files of a run.

    arms: for each, and each KL coefficient that it was tried at, its seeds' evaluations and curves, and mean, sd and
    interval over seeds before and after; the KL is the exact one where it was saved (`with_exact_kl`). best: the same
    of the policies that ``ppo.keep_best`` kept.
    per: what gold and KL are compared per, `evaluation.per` of the config.
    frontier: see `frontier`; paths: what it compares.
    stages: the metrics of SFT, reward models, DPO and discriminator (done.json), the statistics of the labels, of the
    first seed where each has models of its own; what was not run is absent. versions: of the libraries that trained.
    machines: the processors and numbers of threads that trained, each with its stages; see `machine` in
    tlcr/training/checkpoint.py.

    Raises DataError where the folder does not exist or holds no run, or a file in it is no JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no run folder {str(folder)!r}; name the output_dir of a run")
    # files of these names in any other folder are somebody else's, and would be replaced
    if not (folder / CONFIG).is_file() and not (folder / "ppo").is_dir():
        raise DataError(f"{str(folder)!r} holds no run (no {CONFIG}, no ppo); name the output_dir of a run")
    runs = read_runs(folder)
    arms = []
    for name, kl_coef in dict.fromkeys((run.arm, run.kl_coef) for run in runs):
        own = [run for run in runs if (run.arm, run.kl_coef) == (name, kl_coef)]
        summary = {
            when: {
                measure: _plain_mean([v for r in own if (v := getattr(r, when).get(measure)) is not None])
                for measure in MEASURES
            }
            for when in ("before", "after")
        }
        seeds = [
            {
                "seed": r.seed,
                "folder": str(r.folder),
                "before": dict(r.before),
                "after": dict(r.after),
                "curve": [dict(p) for p in r.curve],
                "best": r.best,
            }
            for r in own
        ]
        arms.append({"name": name, "kl_coef": kl_coef, **summary, "best": _best(own), "seeds": seeds})
    stages: dict[str, Any] = {}
    models = models_folder(folder)
    ended = [
        (stage, read_json(done))
        for stage in ("sft", "reward_model", "q_model", "dpo", "discriminator")
        if (done := models / stage / DONE).exists()
    ]
    for stage, record in ended:
        stages[stage] = {"metrics": record.get("metrics", {}), "seconds": record.get("seconds")}
    labels = models / "labels" / "statistics.json"
    if labels.exists():
        stages["labels"] = read_json(labels)
    ended += [("ppo", read_json(done)) for done in sorted((folder / "ppo").glob(f"**/seed-*/{DONE}"))]
    versions: dict[str, Any] = {}
    for _, record in ended:
        versions.update(record.get("versions") or {})
    per = compared_per(read_config(folder))
    return {
        "arms": arms,
        "per": per,
        "frontier": frontier(runs, per=per),
        "paths": paths(runs),
        "stages": stages,
        "versions": versions,
        "machines": _machines(ended),
    }


def _best(runs: Sequence[SeedRun]) -> dict[str, Any] | None:
    """The kept policies of an arm's seeds: their updates, the ceiling, and each measure over them and over the last
    policies of the same seeds. None where no policy was kept."""
    kept = [(with_exact_kl(run.best["evaluation"]), run) for run in runs if run.best is not None]
    if not kept:
        return None

    def over_seeds(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        taken = list(evaluations)
        return {name: _plain_mean([v for e in taken if (v := e.get(name)) is not None]) for name in MEASURES}

    records = [run.best for _, run in kept if run.best is not None]
    return {
        "kept": over_seeds(evaluation for evaluation, _ in kept),
        "last": over_seeds(run.after for _, run in kept),
        "updates": [record["update"] for record in records],
        "max_kl": records[0]["max_kl"],
    }


def _machines(ended: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each machine that the records of (stage, done.json) name, with the stages that ran there, in their order."""
    found: list[dict[str, Any]] = []
    for stage, record in ended:
        machine = record.get("machine")
        if machine is None:  # a run of an older version
            continue
        known = next((entry for entry in found if entry["machine"] == machine), None)
        if known is None:
            found.append(known := {"machine": machine, "stages": []})
        if stage not in known["stages"]:
            known["stages"].append(stage)
    return found


def compared_per(config: Mapping[str, Any]) -> Per:
    """`evaluation.per` of a run's config, in plain values; its default depends on the scorer."""
    evaluation = config.get("evaluation") or {}
    per: Per = evaluation.get("per") or ("answer" if evaluation.get("scorer") else "token")
    return per


def models_folder(folder: Path) -> Path:
    """Where the stages before PPO of a run lie; those of the first seed, where each seed has its own."""
    seeded = sorted((folder / "models").glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
    return seeded[0] if seeded else folder


def write_results(folder: str | Path) -> dict[str, Any]:
    """Collect a run's results and write them to its results.json."""
    results = collect_results(folder)
    write_json(Path(folder) / "results.json", results)
    return results


def read_json(path: Path) -> Any:
    """A JSON file's value. DataError, naming the file, where it is none."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); delete it and run that stage again") from error


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """A file, or one in a folder, that is JSON and not in the form in which tlcr wrote it is named in a DataError."""
    try:
        yield
    except TlcrError:
        raise
    except (
        *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
        *(jinja2.TemplateError, yaml.YAMLError),
    ) as error:
        raise DataError(
            f"{path} is not, or holds what is not, as tlcr wrote it ({type(error).__name__}: {error}): damaged, or "
            "changed; put it back, or delete it and run that stage again"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run as plain values; empty where the folder has none."""
    path = folder / CONFIG
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
