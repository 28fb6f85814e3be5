"""Discriminators of many settings, each with several seeds, all evaluated on the same held-out pairs.

    python -m examples.discriminator_study.study examples/discriminator_study/study.yaml

The YAML file names a run's config, the knobs to vary and the seeds; see the one beside this file. Every discriminator
is trained by the recipe that `tlcr train discriminator` uses, on the SFT model of its seed, and kept in a folder that
`tlcr score --discriminator` reads. Finished parts are skipped, so that an interrupted study continues, and a
study can get further seeds and grids. Seeds share nothing: to work on several at a time, start this with `--seeds` for
each.

Writes below output_dir: seed-<k>/ (a run's folder: config, SFT model, and the discriminators in cells/), results.json
and results.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.discriminator_study import measures
from examples.study import command, values_of
from tlcr.config.loading import load_config
from tlcr.config.schema import RunConfig
from tlcr.data.labels import label_pair, label_pairs
from tlcr.errors import ConfigError
from tlcr.experiment import pipeline
from tlcr.experiment.opening import open_run
from tlcr.experiment.run_folder import RunFolder
from tlcr.files import atomic_write, write_json
from tlcr.models.discriminator import load_discriminator
from tlcr.models.loading import load_causal_lm
from tlcr.recipes.train_discriminator import train_discriminator
from tlcr.report import figures
from tlcr.report.page import number
from tlcr.report.results import mean_over_seeds, paired_difference, read_json
from tlcr.types import LabelledPair

logger = logging.getLogger("tlcr.study")

PAIRS = "pairs"
VARIED = ("discriminator.",)
"""Knobs that a grid may vary: those of the training itself, since all cells of a seed share data, labels and SFT."""
TOKEN_ALONE = "token-alone"
MEASURED = "measures.json"
MEASURES = 1
"""Increase it when `measures` changes: then all discriminators are measured again."""
TITLES = {
    "gold_content": "gold, content words",
    "gold_words": "gold, all words",
    "gold_answers": "gold, answers",
    "auc_positive_negative": "AUC + against -",
    "auc_negative_rest": "AUC - against rest",
    "auc_positive_rest": "AUC + against rest",
    "ece_before": "ECE as trained",
    "ece_after": "ECE calibrated",
    "temperature": "temperature",
    "preference_accuracy": "chosen over rejected",
    "length_correlation": "length correlation",
    "spill_before": "spill before an edit",
    "spill_after": "spill after an edit",
    "processor_seconds": "training, s",
}


@dataclass(frozen=True)
class Cell:
    """One setting of the discriminator: the knobs that a grid gave it, `pairs` among them, by name."""

    knobs: Mapping[str, Any]

    @property
    def pairs(self) -> int | None:
        """Number of training pairs; None for all."""
        pairs: int | None = self.knobs.get(PAIRS)
        return pairs

    @property
    def overrides(self) -> dict[str, Any]:
        return {name: value for name, value in self.knobs.items() if name != PAIRS}

    @property
    def name(self) -> str:
        """Its folder, named after what differs from the config, so that it stays the same when grids are added."""
        parts = [f"{name.removeprefix(VARIED[0])}-{value}" for name, value in sorted(self.knobs.items())]
        return "+".join(parts) or "as-configured"


@dataclass(frozen=True)
class Study:
    """The content of the YAML file."""

    output_dir: str
    config: str
    seeds: tuple[int, ...]
    grids: tuple[Mapping[str, Sequence[Any]], ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def run_config(self, seed: int, more: Mapping[str, Any] | None = None) -> RunConfig:
        """The config of one seed's folder, with a cell's knobs on top."""
        cfg = load_config(self.config, {**self.overrides, **(more or {})})
        return replace(cfg, seed=seed, seeds=(seed,), output_dir=str(Path(self.output_dir) / f"seed-{seed}"))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell of every grid, each once; a knob that has the config's own value is not named."""
        plain = self.run_config(self.seeds[0])
        found: dict[str, Cell] = {}
        for grid in self.grids:
            for values in itertools.product(*grid.values()):
                knobs = {
                    name: value
                    for name, value in zip(grid, values, strict=True)
                    if value != (None if name == PAIRS else _value(plain, name))
                }
                found.setdefault(Cell(knobs).name, Cell(knobs))
        for cell in found.values():
            self.run_config(self.seeds[0], cell.overrides)  # a value out of bounds raises here, not hours later
        return tuple(found.values())


def _value(cfg: RunConfig, knob: str) -> Any:
    section, _, name = knob.partition(".")
    return getattr(getattr(cfg, section), name, None)


def read_study(path: Path) -> Study:
    """Read the YAML file. Raises ConfigError with what is missing, unknown or cannot be varied."""
    values = values_of(path, Study)
    for name in ("seeds", "grids"):
        if not isinstance(values[name], list) or not values[name]:
            raise ConfigError(f"{path}: {name} is {values[name]!r}; wanted a list of at least one")
    for grid in values["grids"]:
        if not isinstance(grid, Mapping):
            raise ConfigError(f"{path}: a grid is {grid!r}; wanted knobs with a list of values each")
        for name, listed in grid.items():
            if name != PAIRS and not name.startswith(VARIED):
                raise ConfigError(f"{path}: a grid varies {name}; it may vary pairs and knobs of discriminator")
            if not isinstance(listed, list) or not listed:
                raise ConfigError(f"{path}: {name} is {listed!r} in a grid; wanted a list of values")
    return Study(**{**values, "seeds": tuple(values["seeds"]), "grids": tuple(values["grids"])})


@dataclass(frozen=True, eq=False)
class Seed:
    """What all cells of a seed share."""

    run: RunFolder

    @cached_property
    def labelled(self) -> tuple[list[LabelledPair], list[LabelledPair]]:
        """Labelled edits: to train on, and held out."""
        cfg, edits = self.run.cfg, self.run.edits
        train, held_out = (
            label_pairs(pairs, self.run.tokenizer, cfg.data, cfg.labels)[0] for pairs in (edits.train, edits.held_out)
        )
        return train, held_out

    @cached_property
    def backbone(self) -> Any:
        return load_causal_lm(self.run.policy_source)

    @cached_property
    def held_out(self) -> measures.HeldOut:
        """The held-out data that measure all cells."""
        cfg, run = self.run.cfg, self.run
        whole = [
            label_pair(
                pair,
                run.tokenizer,
                max_prompt_tokens=cfg.data.max_prompt_tokens,
                max_answer_tokens=sys.maxsize,
                end_of_sequence=cfg.labels.end_of_sequence,
            )
            for pair in run.edits.held_out
        ]
        return measures.HeldOut(run.tokenizer, cfg.data, self.labelled[1], whole, run.comparisons, run.embedded)

    def folder(self, cell: Cell) -> Path:
        return self.run.path / "cells" / cell.name


def open_seed(study: Study, seed: int) -> Seed:
    """The seed's folder, its SFT model trained."""
    cfg = study.run_config(seed)
    if cfg.sft.enabled:
        pipeline.stage(cfg, "sft", resume=True)
    return Seed(open_run(cfg, resume=True, whole=False))


def train(study: Study, seed: Seed, cell: Cell) -> None:
    """Trains one discriminator in its folder, unless it exists."""
    run, folder = seed.run, seed.folder(cell)
    cfg = study.run_config(run.cfg.seed, cell.overrides)

    def work() -> Mapping[str, Any]:
        labelled, held_out = seed.labelled
        if cell.pairs is not None and cell.pairs > len(labelled):
            raise ConfigError(f"{cell.name} asks for {cell.pairs} of {len(labelled)} training pairs; name fewer")
        started = time.process_time()
        trained = train_discriminator(
            cfg,
            backbone=seed.backbone,
            tokenizer=run.tokenizer,
            train=labelled[: cell.pairs],
            held_out=held_out,
            folder=folder,
            resume=True,
        )
        return {**trained.metrics, "processor_seconds": time.process_time() - started}

    settings = {**run.settings("model", "data", "sft", "labels"), "discriminator": cfg.discriminator, PAIRS: cell.pairs}
    run.once(folder, settings, work)


def measure(study: Study, seed: Seed, cell: Cell) -> None:
    """The measures of a trained discriminator, beside it in measures.json."""
    folder = seed.folder(cell)

    def work() -> Mapping[str, Any]:
        model, _ = load_discriminator(folder, seed.run.cfg.model)
        return measures.of_model(model, seed.held_out, seed.run.cfg.discriminator.batch_size)

    run_once(seed, folder, work)


def measure_token_alone(seed: Seed) -> None:
    """The reward that depends on a token but not on its context, as a row to compare with."""
    run_once(
        seed, seed.run.path / "cells" / TOKEN_ALONE, lambda: measures.of_token_alone(seed.labelled[0], seed.held_out)
    )


def run_once(seed: Seed, folder: Path, work: Callable[[], Mapping[str, Any]]) -> None:
    seed.run.once(folder, {**seed.run.settings("data", "labels"), "measures": MEASURES}, work, MEASURED, again=True)


def work_on(study: Study, seeds: Iterable[int]) -> None:
    for seed in (open_seed(study, seed) for seed in seeds):
        measure_token_alone(seed)
        for cell in study.cells:
            train(study, seed, cell)
            measure(study, seed, cell)


# ---- results


def collect(study: Study) -> list[dict[str, Any]]:
    """A row for each cell with a seed that is done, the token alone first: each measure over seeds, and its difference
    from the first cell, seed by seed."""
    cells = [(TOKEN_ALONE, {}), *((cell.name, dict(cell.knobs)) for cell in study.cells)]
    by_seed = {
        name: {
            seed: found
            for seed in study.seeds
            if (found := _of_seed(Path(study.output_dir) / f"seed-{seed}" / "cells" / name, name))
        }
        for name, _ in cells
    }
    reference = study.cells[0].name
    rows = []
    for name, knobs in cells:
        own = by_seed[name]
        if not own:
            continue
        summary, difference = {}, {}
        for measure_name in dict.fromkeys(key for found in own.values() for key in found):
            values = {seed: found[measure_name] for seed, found in own.items() if measure_name in found}
            others = {seed: f[measure_name] for seed, f in by_seed[reference].items() if measure_name in f}
            summary[measure_name] = asdict(mean_over_seeds(list(values.values())))  # type: ignore[arg-type]
            difference[measure_name] = None if name == reference else paired_difference(values, others)
        rows.append({"cell": name, "knobs": knobs, "seeds": sorted(own), "measures": summary, "difference": difference})
    return rows


def _of_seed(folder: Path, name: str) -> dict[str, float]:
    """All measures of one discriminator; nothing where it is not finished."""
    records = [folder / MEASURED] if name == TOKEN_ALONE else [folder / "done.json", folder / MEASURED]
    if not all(record.is_file() for record in records):
        return {}
    found = {key: value for record in records for key, value in read_json(record)["metrics"].items()}
    return {key: value for key, value in found.items() if value is not None}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of results.md: mean and half the width of the 95 % interval over seeds."""
    shown = {key: title for key, title in TITLES.items() if any(key in row["measures"] for row in rows)}
    lines = ["| discriminator | " + " | ".join(shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    for row in rows:
        figures_of_row = [_figure(row["measures"].get(key)) for key in shown]
        lines.append(f"| {row['cell']} | " + " | ".join(figures_of_row) + " |")
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    return "\n".join(lines) + f"\n\nMean and 95 % interval (Student's t) over seeds {', '.join(map(str, seeds))}.\n"


def _figure(mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return "\u2013"
    half = "" if mean["interval"] is None else f" ± {number((mean['interval'][1] - mean['interval'][0]) / 2)}"
    return number(mean["mean"]) + half


def plot(rows: Sequence[Mapping[str, Any]], measure_name: str) -> str:
    """A measure against the number of training pairs, a line for each of the other knobs' settings, as SVG."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    pairs_of_all = round(rows[0]["measures"]["training_pairs"]["mean"])
    for row in rows:
        mean = row["measures"].get(measure_name)
        if mean is None or row["cell"] == TOKEN_ALONE:
            continue
        others = {key.removeprefix(VARIED[0]): value for key, value in row["knobs"].items() if key != PAIRS}
        line = ", ".join(f"{key} {value}" for key, value in others.items()) or "as configured"
        half = 0.0 if mean["interval"] is None else (mean["interval"][1] - mean["interval"][0]) / 2
        lines.setdefault(line, []).append((row["knobs"].get(PAIRS) or pairs_of_all, mean["mean"], half))
    with figures.style():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for index, (line, points) in enumerate(lines.items()):
            x, y, error = zip(*sorted(points), strict=True)
            colour, marker = figures.arm_colour(index), figures.arm_marker(index)
            axes.errorbar(x, y, error, label=line, color=colour, marker=marker, markersize=4.5, capsize=2)
        alone = rows[0]["measures"].get(measure_name)
        if alone is not None:
            axes.axhline(alone["mean"], color=figures.INK, alpha=0.5, linestyle=(0, (4, 4)), label="token alone")
        axes.set(xlabel="training pairs", ylabel=TITLES[measure_name], xscale="log")
        ticks = sorted({x for points in lines.values() for x, _, _ in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(loc="best", fontsize=9)
        return figures.svg_file(figure, f"{TITLES[measure_name]} against the number of training pairs")


def write_results(study: Study) -> None:
    rows, folder = collect(study), Path(study.output_dir)
    write_json(folder / "results.json", rows)
    texts = {"results.md": as_markdown(rows)}
    for name in ("gold_content", "auc_positive_negative"):
        if any(name in row["measures"] for row in rows):
            texts[f"{name}.svg"] = plot(rows, name)
    for name, text in texts.items():
        with atomic_write(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    logger.info("wrote %s", folder / "results.md")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file such as the one beside this script")
    parser.add_argument("--seeds", type=int, nargs="+", help="work on these seeds of the study only")
    options = parser.parse_args(arguments)

    def work() -> None:
        study = read_study(options.study)
        if unknown := set(options.seeds or ()) - set(study.seeds):
            raise ConfigError(f"--seeds names {sorted(unknown)}; the study has {', '.join(map(str, study.seeds))}")
        work_on(study, options.seeds or study.seeds)
        write_results(study)

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
