"""Makes the page on the benchmarks from result files: a template gives the text, `figures` draws the plots.

Every number of the page comes from a result file. The sentences are those of templates/benchmarks.md.j2, and `tables`
computes the numbers in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.report import figures, tables
from benchmarks.report.rows import AXES, ResultFile
from tlcr.files import atomic_write

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Page:
    """The text and the plots to write."""

    text: str
    plots: Mapping[str, Callable[[], str]]
    """Maps the path of an SVG file, from the page's folder, to the function that draws it."""


def write(page: Page, path: Path) -> None:
    """The text, its plots, and no plot of an earlier page that this one does not show."""
    for name, draw in page.plots.items():
        with atomic_write(path.parent / name) as aside:
            aside.write_text(draw(), encoding="utf-8")
    with atomic_write(path) as aside:
        aside.write_text(page.text, encoding="utf-8")
    shown = {path.parent / name for name in page.plots}
    for old in path.with_suffix("").glob("*.svg"):
        if old not in shown and figures.DIGEST in old.read_text(encoding="utf-8"):
            old.unlink()


def render(files: Sequence[ResultFile], *, folder: str) -> Page:
    """The page on these results; its plots lie in `folder` beside it."""
    plots: dict[str, Callable[[], str]] = {}

    def keep(name: str, draw: Callable[..., str], *arguments: Any) -> str:
        """The path of a plot, which is kept under it."""
        plots[f"{folder}/{name}.svg"] = partial(draw, *arguments)
        return f"{folder}/{name}.svg"

    rounds = [ppo_section(files, on_gpu, keep) for on_gpu in (False, True)]
    text = (
        environment()
        .get_template("benchmarks.md.j2")
        .render(
            ops=[ops_section(file, keep) for file in files if file.kind == "ops"],
            rounds=[section for section in rounds if section["tasks"]],
            gpu_ops=any(file.kind == "ops" and file.on_gpu for file in files),
            gpu_rounds=any(file.kind == "ppo_step" and file.on_gpu for file in files),
            rerun=any(file.command != file.command_today for file in files),
            axes=AXES,
            phases=tables.PHASES,
            beyond_noise=tables.BEYOND_NOISE,
            confidence=tables.CONFIDENCE,
        )
    )
    return Page(text.rstrip() + "\n", plots)


def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for function in (
        *(
            tables.duration,
            tables.between,
            tables.binary,
            tables.bandwidth,
            tables.ratio,
            tables.percent,
            tables.significant,
        ),
        *(tables.shape_text, tables.task_text, tables.task_title, cell),
    ):
        made.filters[function.__name__] = function
    return made


def cell(text: str) -> str:
    """As it can stand in a cell of a Markdown table: in one line, without a bar."""
    return " ".join(str(text).split()).replace("|", "\\|")


def ppo_section(files: Sequence[ResultFile], on_gpu: bool, keep: Callable[..., str]) -> dict[str, Any]:
    """What the template shows of the rounds of PPO on one kind of device."""
    device = "GPU" if on_gpu else "CPU"
    own = [file for file in files if file.kind == "ppo_step" and file.on_gpu == on_gpu and file.sides]
    tasks = [(file, file.sides[0]["task"], tables.sides(file)) for file in own]
    bars = [(tables.task_title(task), sides) for _, task, sides in tasks]
    return {
        "device": device,
        "tasks": tasks,
        "plot": keep(f"ppo-{device.lower()}", figures.ppo_plot, bars) if bars else None,
    }


def ops_section(file: ResultFile, keep: Callable[..., str]) -> dict[str, Any]:
    """What the template shows of one file of ops."""
    stem = Path(file.name).stem
    palette = figures.implementations(file)
    speeds, memories, growths = tables.speeds(file), tables.memories(file), tables.growths(file)
    pivots, bandwidths = tables.pivots(file), tables.bandwidths(file)
    return {
        "file": file,
        "speeds": speeds,
        "speed_plot": keep(f"{stem}-speed", figures.speed_plot, file, speeds, palette) if speeds else None,
        "contested": tables.contested(file),
        "slower": tables.slower(file),
        "pivots": pivots,
        "clock_rows": tables.clock_rows(file) if len(file.clocks) > 1 else [],
        "memories": memories,
        "memory_plot": keep(f"{stem}-memory", figures.memory_plot, memories, palette) if memories else None,
        "bandwidths": bandwidths,
        "bandwidth_plot": keep(f"{stem}-bandwidth", figures.bandwidth_plot, file) if bandwidths else None,
        "growths": [found for found in growths if tables.is_ours(file, found.series)],
        "faster_than_linear": [found for found in growths if found.faster_than_linear],
        "axis_ranges": tables.axis_ranges([found for found in growths if tables.is_ours(file, found.series)]),
        "scaling_plots": {
            pivot.op: keep(f"{stem}-{pivot.op}", figures.scaling_plot, file, pivot.op, palette)
            for pivot in pivots
            if figures.scaling_panels(file, pivot.op)
        },
        "not_run": tables.not_run(file),
    }
