"""``tlcr doctor``: checks the installation, this machine and whether a config fits it, and gives remedies."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tlcr import ops
from tlcr.config.schema import RunConfig
from tlcr.config.trials import trials_of
from tlcr.distribution import requirements
from tlcr.errors import ConfigError
from tlcr.experiment.architecture import Architecture, Machine, build_on_meta
from tlcr.experiment.memory import Estimate, checkpoint_of, estimate_run
from tlcr.experiment.preflight import Finding, Level, existing, preflight, settings
from tlcr.experiment.remedy import remedy
from tlcr.training.disk import PROBE, in_words, write_seconds

__all__ = ["examine", "machine", "memory_table"]

STYLES: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "blocked": "bold red"}

GPU_MEMORY = 80 * 10**9
"""What a GPU has, in bytes, where ``--gpus`` names no other."""
USABLE_SHARE = 0.9
"""Share of the free memory that an estimate may fill: allocators and other programs need the rest."""


def examine(
    cfg: RunConfig,
    *,
    named: bool,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    write_rate: float | None = None,
    console: Console | None = None,
) -> bool:
    """Prints every finding; returns whether something prevents a run.

    named: whether the user named a config or knobs. If so, memory is estimated and models and sources are looked at.
    gpus: judge the settings, and estimate the memory, for this many GPUs, a process on each, instead of this machine.
    gpu_memory: of each, in GiB; None: an 80 GB GPU.
    write_rate: of the disk of ``output_dir``, in GiB a second; None: measured, if memory is estimated.
    """
    console = console or Console(highlight=False)
    found = list(machine(cfg))
    if named:
        found += preflight(cfg, processes=gpus)
        found += _memory(cfg, found, _place(gpus, gpu_memory), write_rate, console)
    else:
        found += settings(cfg)
    console.print(_table(found))
    blocked = [finding for finding in found if finding.level == "blocked"]
    if blocked:
        console.print(f"[bold red]{len(blocked)} of these must be put right before a run.[/bold red]")
    else:
        # a folder that holds a run is no fault: the command may be given --resume
        how = ", with --resume" if any(finding.subject == "output_dir" for finding in found) else ""
        console.print(f"[green]Nothing stands in the way of a run{how}.[/green]")
    return bool(blocked)


def machine(cfg: RunConfig) -> Iterator[Finding]:
    """All findings on this machine and on what is installed."""
    yield from _packages()
    yield from _processor(cfg)
    yield from _accelerators(cfg)
    yield from _build()
    yield from _implementations()
    yield from _disk(cfg)


@dataclass(frozen=True)
class _Place:
    """Where a run is to fit: the machine that its steps are simulated for, and the memory of one of its processes."""

    machine: Machine
    name: str
    free: int


def _place(gpus: int | None, gpu_memory: float | None) -> _Place:
    if gpus is not None:
        memory = GPU_MEMORY if gpu_memory is None else int(gpu_memory * 2**30)
        return _Place(Machine(gpu=True, processes=gpus), "one GPU" if gpus == 1 else f"each of {gpus} GPUs", memory)
    if _runs_on_gpu():
        return _Place(Machine(gpu=True), "GPU 0", torch.cuda.mem_get_info(0)[0])
    return _Place(Machine(gpu=False), "this machine", _free_memory())


def _memory(
    cfg: RunConfig, found: Sequence[Finding], place: _Place, write_rate: float | None, console: Console
) -> Iterator[Finding]:
    """Prints the estimate, and yields whether it fits; nothing where the model's config cannot be read."""
    try:
        architecture = Architecture(build_on_meta(cfg.model))
    except ConfigError as error:
        if not any(finding.level == "blocked" and finding.subject.startswith("model.") for finding in found):
            yield Finding.of("model.path", error)
        return
    estimates = estimate_run(cfg, architecture, place.machine)
    console.print(memory_table(estimates, cfg))
    yield from _fits(cfg, architecture, place, estimates)
    yield from _checkpoint_times(cfg, architecture, [estimate.stage for estimate in estimates], write_rate)


def _packages() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    good = []
    for requirement in requirements():
        problem = _package_problem(requirement)
        if problem is None:
            # The metadata of torch may lack the label of its build, cpu or cu130.
            found = torch.__version__ if requirement.name == "torch" else version(requirement.name)
            good.append(f"{requirement.name} {found}")
        else:
            yield Finding(
                "blocked", requirement.name, problem, f"pip install '{requirement.name}{requirement.specifier}'"
            )
    yield Finding("ok", "packages", ", ".join(good))
    try:
        yield Finding("ok", "triton", version("triton"))
    except PackageNotFoundError:
        yield Finding("note", "triton", "not installed; only kernels on a GPU would use it")


def _package_problem(requirement: Requirement) -> str | None:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return f"not installed; tlcr needs {requirement.specifier}"
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{installed} is installed; tlcr needs {requirement.specifier}"


def _processor(cfg: RunConfig) -> Iterator[Finding]:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{in_words(memory.total)}, of which {in_words(_free_memory())} free")
    if threads > cores:
        remedy = f"export OMP_NUM_THREADS={cores}"
        yield Finding("warning", "processor", f"{cores} cores, but torch uses {threads} threads", remedy)
    else:
        yield Finding("ok", "processor", f"{cores} cores, torch uses {threads} threads")
    native = {"avx512_bf16", "amx_bf16"} & {name for name, there in torch.cpu.get_capabilities().items() if there}
    if native or platform.machine() != "x86_64":
        yield Finding("ok", "bfloat16", f"on the CPU: {', '.join(sorted(native)) or 'not known for this processor'}")
    elif cfg.model.dtype == "bfloat16" and not _runs_on_gpu():
        fact = "this CPU has no bfloat16 instructions: it will be slow"
        yield Finding("warning", "bfloat16", fact, "model.dtype: float32, or a machine with AVX-512 BF16, AMX or a GPU")
    else:
        yield Finding("note", "bfloat16", "this CPU has no bfloat16 instructions; model.dtype float32 is faster on it")


def _accelerators(cfg: RunConfig) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is a {'CUDA' if torch.version.cuda else 'CPU'} build"
        yield Finding("note", "GPU", f"none that torch can use; {built}")
        return
    if not _runs_on_gpu():
        yield Finding("note", "GPU", "left alone: ACCELERATE_USE_CPU keeps a run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"GPU {index}", f"{name}, {in_words(total)}, of which {in_words(free)} free")
    if cfg.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("warning", "bfloat16", "this GPU only emulates it", "model.dtype: float32")


def _build() -> Iterator[Finding]:
    """The compiled kernels of tlcr; if this machine could use more, the command that builds them."""
    info = ops.build_info()
    if info["problem"] is not None:
        yield Finding("warning", "build", info["problem"], info["rebuild"])
    elif info["extension"] is None:
        yield Finding("note", "build", f"no compiled kernels: {info['remark']}", info["rebuild"])
    else:
        what = f"compiled for torch {info['torch']} by {info['compiler']}; on this CPU {info['instruction_set']} code"
        if info["extension"] == "cuda":
            yield Finding("ok", "build", f"{what}; CUDA {info['cuda']} code for {info['arch_list']}")
        elif torch.cuda.is_available():
            yield Finding("warning", "build", f"{what}; no CUDA code: {info['remark']}", info["rebuild"])
        else:
            yield Finding("ok", "build", f"{what}; no CUDA code: {info['remark']}")


def _implementations() -> Iterator[Finding]:
    """Ops with equal findings share a line."""
    said: dict[str, list[str]] = {}
    for status in ops.available():
        why = "; ".join(f"{impl}: {reason}" for impl, reason in status.reasons.items())
        fact = f"'auto' takes {status.auto} on {status.device}" + (f" ({why})" if why else "")
        said.setdefault(fact, []).append(status.op)
    for fact, names in said.items():
        yield Finding("ok", "ops", f"{', '.join(names)}: {fact}")


def _disk(cfg: RunConfig) -> Iterator[Finding]:
    there = existing(Path(cfg.output_dir))
    yield Finding("ok", "disk", f"{in_words(shutil.disk_usage(there).free)} free for {cfg.output_dir}")


def _runs_on_gpu() -> bool:
    """Whether a run would take a GPU: there is one, and ACCELERATE_USE_CPU does not keep it on the CPU."""
    if not torch.cuda.is_available():
        return False
    from tlcr.training.distributed import process_device  # takes accelerate, and seconds

    return process_device().type == "cuda"


def _free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still use: free memory, limited by its control group.

    groups: where the system mounts control groups, of version 2 or 1.
    """
    free = psutil.virtual_memory().available
    versions = (
        (groups, "memory.max", "memory.current", "inactive_file"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder, limit, used, cached in versions:
        if (folder / limit).exists() and (text := (folder / limit).read_text().strip()) != "max":
            # files that were read lie in memory until something else needs it, and are counted as used
            freed = _statistic(folder / "memory.stat", cached)
            free = min(free, int(text) - max(0, int((folder / used).read_text()) - freed))
    return max(0, free)


def _statistic(path: Path, name: str) -> int:
    """A number of a control group's memory.stat; 0 where it has none of this name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _fits(cfg: RunConfig, architecture: Architecture, place: _Place, estimates: list[Estimate]) -> Iterator[Finding]:
    limit = int(place.free * USABLE_SHARE)
    for estimate in estimates:
        # what `parallel` trains side by side: policies, and the other models where each seed has its own
        jobs = len(trials_of(cfg)) if estimate.stage == "ppo" else len(cfg.seeds) if cfg.models_per_seed else 1
        at_a_time = min(cfg.parallel, jobs)
        need = estimate.total * at_a_time
        times = f" ({at_a_time} at a time)" if at_a_time > 1 else ""
        fact = f"{estimate.stage}{times} needs about {in_words(need)}; {place.name} has {in_words(place.free)} free"
        if need <= limit:
            yield Finding("ok", "fit", fact)
            continue
        settings = ["parallel: 1"] if at_a_time > 1 else []
        if at_a_time > 1 and estimate.total <= limit:
            yield Finding("blocked", "fit", fact, f"{settings[0]} (then {in_words(estimate.total)})")
            continue
        found = remedy(cfg, architecture, place.machine, estimate.stage, limit)
        settings += found.settings
        yield Finding("blocked", "fit", fact, _what_to_set(settings, found.peak, fits=found.fits))


def _checkpoint_times(
    cfg: RunConfig, architecture: Architecture, stages: Sequence[str], write_rate: float | None
) -> Iterator[Finding]:
    """How long a checkpoint of each stage is written, at a rate that is named or measured."""
    if write_rate is not None:
        rate, source = write_rate * 2**30, "as --write_rate has it"
    else:
        folder = existing(Path(cfg.output_dir))
        try:
            seconds = write_seconds(folder)
        except OSError:
            return  # that the folder cannot be written to, or is full, is a finding of its own
        rate = PROBE / seconds
        source = f"measured: {in_words(PROBE)} written to {folder} and synced in {seconds:.2f} s, by one process"
    times = []
    for stage in stages:
        count = checkpoint_of(stage, cfg, architecture)
        every = getattr(cfg, stage.replace(" ", "_")).save_every
        often = f"every {every} steps" if every else "when it is stopped"
        times.append(f"{stage} {_seconds(count / rate)} ({in_words(count)}, {often})")
    yield Finding("ok", "checkpoint", f"written in about: {', '.join(times)}; at {in_words(int(rate))}/s, {source}")


def _seconds(count: float) -> str:
    return f"{count:.1f} s" if count < 10 else f"{count:.0f} s" if count < 600 else f"{count / 60:.0f} min"


def _what_to_set(settings: Sequence[str], peak: int, *, fits: bool) -> str:
    if fits:
        return f"{'; '.join(settings)} (then {in_words(peak)})"
    most = f"with {'; '.join(settings)} it takes {in_words(peak)}" if settings else f"it takes {in_words(peak)}"
    return f"a smaller model, or more memory: {most} at least"


def _table(found: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ("level", "subject", "fact"):
        table.add_column(name, overflow="fold", no_wrap=name != "fact")
    for finding in found:
        style = STYLES[finding.level]
        table.add_row(f"[{style}]{finding.level}[/{style}]", escape(finding.subject), escape(finding.fact))
        if finding.remedy:
            table.add_row("", "", f"[{style}]to do:[/{style}] {escape(finding.remedy)}")
    return table


def memory_table(estimates: Sequence[Estimate], cfg: RunConfig) -> Table:
    """What each stage takes of the memory of one process: its models, and the most of its phases."""
    table = Table(
        title=f"Memory of one process, {escape(cfg.model.path)} in {cfg.model.dtype}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # where the width does not do, names are folded: a figure that is cut loses its unit
    table.add_column("", overflow="fold")
    for name in ("parameters", "weights", "gradients", "optimiser", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in estimates:
        table.add_row(f"[bold]{estimate.stage}[/bold]", "", "", "", "", f"[bold]{in_words(estimate.total)}[/bold]")
        for role in estimate.roles:
            parts = [
                in_words(part) if part else "" for part in (role.weights, role.gradients, role.optimizer, role.total)
            ]
            table.add_row(f"  {role.name}", f"{role.parameters:,}", *parts)
        for phase in estimate.phases:
            aside = "" if phase == estimate.peak else "[dim](not added)[/dim]"
            table.add_row(f"  {phase.name}", aside, "", "", "", in_words(phase.allocated))
        table.add_section()
    return table
