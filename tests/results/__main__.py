"""Runs every study behind docs/results at a tiny size: ``python -m tests.results`` (``make results-check``).

The commands are those of the pages and so is the code; only data, updates, prompts, coefficients and seeds are few.
What each writes must have the tables of its page's file: the same columns, and where rows are arms at least its rows (a
config may have got arms since). Then the figures of the pages are held against their files. Exit code 1 where something
differs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.results.figures import RESULTS, unfounded

ROOT = Path(__file__).parents[2]
SMALL_RUN = {
    "parallel": 1,
    "models_per_seed": False,
    "data": {"embedded_pairs": 60},
    "sft": {"epochs": 1},
    "reward_model": {"epochs": 1},
    "dpo": {"epochs": 1},
    "discriminator": {"epochs": 1},
    "ppo": {"updates": 2, "batch_size": 4, "minibatch_size": 4, "epochs": 1, "evaluate_every": 1},
    "evaluation": {"prompts": 6},
}
MANY = 8
"""Arms: a run with so many gets one seed."""
COEFS = 2
"""Coefficients of a reward at this size: two, so that its line has a way."""


@dataclass(frozen=True)
class Study:
    """A config of examples/, how to make it small, the command for it, and the file that holds its tables."""

    config: str
    small: Callable[[dict[str, Any]], dict[str, Any]]
    command: tuple[str, ...]
    kept: str


def _run(config: dict[str, Any]) -> dict[str, Any]:
    """A config of `tlcr run`: two seeds where it has few arms, one where it has many."""
    small = _merged(config, SMALL_RUN) | {"seeds": [0, 1] if len(config["arms"]) < MANY else [0]}
    arms = [{**arm, "kl_coefs": arm["kl_coefs"][:COEFS]} if "kl_coefs" in arm else arm for arm in config["arms"]]
    return {**small, "arms": arms, "kl_coefs": config.get("kl_coefs", [])[:COEFS]}


def _discriminators(config: dict[str, Any]) -> dict[str, Any]:
    overrides = {**config["overrides"], "data.embedded_pairs": 60, "sft.epochs": 1, "discriminator.epochs": 1}
    return {**config, "seeds": [0, 1], "overrides": overrides, "grids": [config["grids"][0], {"pairs": [20]}]}


def _credit(config: dict[str, Any]) -> dict[str, Any]:
    flat = {
        f"{s}.{k}": v for s, own in SMALL_RUN.items() if isinstance(own, dict) for k, v in own.items() if s != "dpo"
    }
    overrides = {**config["overrides"], **flat}
    return {
        **config,
        "overrides": overrides,
        "lengths": {16: 12},
        "lams": [0.7],
        "values": {"policy": {}},
    }


STUDIES = {
    "quickstart": Study("quickstart.yaml", _run, ("-m", "tlcr", "run"), "quickstart/results.md"),
    "rewards": Study("reward_comparison.yaml", _run, ("-m", "tlcr", "run"), "reward_comparison/results.md"),
    "discriminators": Study(
        "discriminator_study/study.yaml",
        _discriminators,
        ("-m", "examples.discriminator_study.study"),
        "discriminator_study/results.md",
    ),
    "length": Study("credit_study/study.yaml", _credit, ("-m", "examples.credit_study.study"), "length/results.md"),
}


def check(name: str, folder: Path) -> Iterator[str]:
    """Runs a study at a tiny size; yields what is not as in the file that its page shows."""
    study = STUDIES[name]
    config = yaml.safe_load((ROOT / "examples" / study.config).read_text(encoding="utf-8"))
    small = study.small(config) | {"output_dir": str(folder / name)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(small, sort_keys=False), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, *study.command, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        yield f"{name}: exit code {ended.returncode}: {ended.stderr[-2000:]}"
        return
    if not (RESULTS / study.kept).is_file():
        yield f"{name}: docs/results/{study.kept} is not there; keep the results.md of a whole run in it"
        return
    made, kept = (tables(p.read_text(encoding="utf-8")) for p in (folder / name / "results.md", RESULTS / study.kept))
    for columns in made.keys() | kept.keys():
        if columns not in made or columns not in kept:
            where = "the run" if columns in made else study.kept
            yield f"{name}: only {where} has a table with the columns {' | '.join(columns)}"
        elif columns[0] == "arm" and not set(kept[columns]) <= set(made[columns]):
            gone = ", ".join(sorted(set(kept[columns]) - set(made[columns])))
            yield f"{name}: the run has no row for {gone} in its table with the column {columns[1]}"


def tables(text: str) -> dict[tuple[str, ...], list[str]]:
    """The tables of a Markdown text: columns (numbers in their names left out) to the first cell of each row."""
    found: dict[tuple[str, ...], list[str]] = {}
    columns: tuple[str, ...] | None = None
    for line in text.splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = tuple(re.sub(r"[\d.]+", "#", cell) for cell in cells)
            found.setdefault(columns, [])
        elif not set(line) <= set("|-: "):
            found[columns].append(cells[0])
    return found


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in changes.items():
        merged[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="these studies only")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "results-check", help="where the runs are made anew"
    )
    options = parser.parse_args(arguments)
    wrong = 0
    for name in options.only:
        began = time.monotonic()
        shutil.rmtree(options.folder / name, ignore_errors=True)
        options.folder.mkdir(parents=True, exist_ok=True)
        complaints = list(check(name, options.folder))
        sys.stdout.write(
            f"{name}: {'as its page says' if not complaints else 'differs'} ({time.monotonic() - began:.0f} s)\n"
        )
        wrong += len(complaints)
        sys.stdout.writelines(f"  {complaint}\n" for complaint in complaints)
    for page in (RESULTS.with_suffix(".md"), *sorted(RESULTS.glob("*.md"))):
        for complaint in unfounded(page.read_text(encoding="utf-8")):
            wrong += 1
            sys.stdout.write(f"{page.name}: {complaint}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
