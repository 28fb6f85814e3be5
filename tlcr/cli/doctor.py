"""``tlcr doctor``: checks the installation, this machine and whether a config fits it, and gives remedies."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tlcr import ops
from tlcr.cli.memory import Estimate, ModelSize, advice, estimate_run, measure_model
from tlcr.config.schema import RunConfig
from tlcr.config.trials import trials_of
from tlcr.distribution import install_command, requirements
from tlcr.errors import ConfigError

__all__ = ["Finding", "Level", "examine", "findings"]

Level = Literal["ok", "note", "warning", "blocked"]
STYLES: dict[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "blocked": "bold red"}

USABLE_SHARE = 0.9
"""Share of the free memory that an estimate may fill: allocators and other programs need the rest."""


@dataclass(frozen=True)
class Finding:
    """One fact, its severity, and its remedy if it is a problem."""

    level: Level
    subject: str
    fact: str
    remedy: str = ""


def examine(cfg: RunConfig, *, memory: bool, console: Console | None = None) -> bool:
    """Print every finding, and with ``memory`` the estimate of the config; returns whether something prevents a run."""
    console = console or Console(highlight=False)
    size, found = None, list(findings(cfg))
    if memory:
        try:
            size = measure_model(cfg.model)
        except ConfigError as error:
            found.append(Finding("blocked", "model", str(error)))
    if size is not None:
        estimates = estimate_run(cfg, size)
        console.print(_memory_table(estimates, cfg))
        found += _fits(cfg, size, estimates)
        found += _checkpoints_fit(cfg, estimates[-1])
    console.print(_table(found))
    blocked = [finding for finding in found if finding.level == "blocked"]
    if blocked:
        console.print(f"[bold red]{len(blocked)} of these must be put right before a run.[/bold red]")
    else:
        console.print("[green]Nothing stands in the way of a run.[/green]")
    return bool(blocked)


def findings(cfg: RunConfig) -> Iterator[Finding]:
    """All findings that do not need the model."""
    yield from _packages()
    yield from _extras(cfg)
    yield from _reviser(cfg)
    yield from _processor(cfg)
    yield from _accelerators(cfg)
    yield from _build()
    yield from _implementations()
    yield from _sources(cfg)
    yield from _disk(cfg)


def _packages() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    good = []
    for requirement in requirements():
        problem = _package_problem(requirement)
        if problem is None:
            good.append(f"{requirement.name} {version(requirement.name)}")
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


def _extras(cfg: RunConfig) -> Iterator[Finding]:
    wanted = {"tensorboard": cfg.tracker == "tensorboard", "wandb": cfg.tracker == "wandb"}
    wanted["gguf"] = cfg.model.gguf_file is not None
    for name, needed in wanted.items():
        if needed and importlib.util.find_spec(name) is None:
            knob = "model.gguf_file" if name == "gguf" else "tracker"
            yield Finding("blocked", name, f"{knob} needs it, and it is not installed", f"pip install {name}")


def _reviser(cfg: RunConfig) -> Iterator[Finding]:
    if cfg.reviser.backend != "endpoint":
        return
    missing = [name for name in ("openai", "tenacity", "aiolimiter") if importlib.util.find_spec(name) is None]
    if missing:
        fact = f"reviser.backend endpoint needs {', '.join(missing)}, and that is not installed"
        yield Finding("blocked", "reviser", fact, install_command("openai"))
    endpoint = cfg.reviser.endpoint
    if endpoint.lacks_key():
        fact = f"the environment variable {endpoint.key_variable} holds no API key"
        remedy = "set it, or reviser.endpoint.base_url of a server without keys"
        yield Finding("blocked", "reviser", fact, remedy)
    if endpoint.prompt_price is None:
        remedy = "reviser.endpoint.prompt_price, answer_price and max_cost, if the server is paid"
        yield Finding("note", "reviser", "no prices are named, so no cost is shown and none is capped", remedy)


def _processor(cfg: RunConfig) -> Iterator[Finding]:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{_gib(memory.total)}, of which {_gib(_free_memory())} free")
    if threads > cores:
        remedy = f"export OMP_NUM_THREADS={cores}"
        yield Finding("warning", "processor", f"{cores} cores, but torch uses {threads} threads", remedy)
    else:
        yield Finding("ok", "processor", f"{cores} cores, torch uses {threads} threads")
    native = {"avx512_bf16", "amx_bf16"} & {name for name, there in torch.cpu.get_capabilities().items() if there}
    if native or platform.machine() != "x86_64":
        yield Finding("ok", "bfloat16", f"on the CPU: {', '.join(sorted(native)) or 'not known for this processor'}")
    elif cfg.model.dtype == "bfloat16" and not torch.cuda.is_available():
        fact = "this CPU has no bfloat16 instructions: it will be slow"
        yield Finding("warning", "bfloat16", fact, "model.dtype: float32, or a machine with AVX-512 BF16, AMX or a GPU")
    else:
        yield Finding("note", "bfloat16", "this CPU has no bfloat16 instructions; model.dtype float32 is faster on it")


def _accelerators(cfg: RunConfig) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is a {'CUDA' if torch.version.cuda else 'CPU'} build"
        yield Finding("note", "GPU", f"none that torch can use; {built}")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"GPU {index}", f"{name}, {_gib(total)}, of which {_gib(free)} free")
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


def _sources(cfg: RunConfig) -> Iterator[Finding]:
    sources = {f"data.{name}": getattr(cfg.data, name) for name in ("preferences", "edits", "prompts")}
    for name, source in {**sources, "reviser.files": cfg.reviser.files}.items():
        # A name without a suffix may be a dataset of the hub; a path with one is a file.
        if source is not None and Path(source).suffix and not Path(source).exists():
            yield Finding("blocked", name, f"there is no file {source}", f"correct {name}")


def _disk(cfg: RunConfig) -> Iterator[Finding]:
    folder = _existing(Path(cfg.output_dir))
    if not os.access(folder, os.W_OK):
        yield Finding("blocked", "output_dir", f"{folder} cannot be written to", "name another output_dir")
    else:
        free = shutil.disk_usage(folder).free
        yield Finding("ok", "output_dir", f"{cfg.output_dir}, {_gib(free)} free")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(there for there in (folder, *folder.parents) if there.exists())


def _checkpoints_fit(cfg: RunConfig, ppo: Estimate) -> Iterator[Finding]:
    """While a checkpoint is saved, each PPO run has keep_checkpoints + 1 of them, with weights and optimiser states."""
    trained = sum(role.weights + role.optimizer for role in ppo.roles if role.optimizer)
    runs = len(trials_of(cfg))
    need = trained * (cfg.ppo.keep_checkpoints + 1) * runs
    free = shutil.disk_usage(_existing(Path(cfg.output_dir))).free
    if need > free:
        fact = f"checkpoints of {runs} PPO runs may take {_gib(need)}, {_gib(free)} are free"
        yield Finding("blocked", "disk", fact, "lower ppo.keep_checkpoints, or name an output_dir on a larger disk")


def _free_memory() -> int:
    """Memory that this process may still use: free memory, limited by its control group."""
    free = psutil.virtual_memory().available
    groups = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit, used in groups:
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max":
            free = min(free, int(text) - int(Path(used).read_text()))
    return free


def _fits(cfg: RunConfig, size: ModelSize, estimates: list[Estimate]) -> Iterator[Finding]:
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info(0)[0] if on_gpu else _free_memory()
    where = "GPU 0" if on_gpu else "this machine"
    limit = int(free * USABLE_SHARE)
    for estimate in estimates:
        at_a_time = min(cfg.parallel, len(trials_of(cfg))) if estimate.stage == "ppo" else 1
        need = estimate.total * at_a_time
        times = f" ({at_a_time} at a time)" if at_a_time > 1 else ""
        fact = f"{estimate.stage}{times} needs about {_gib(need)}; {where} has {_gib(free)} free"
        if need <= limit:
            yield Finding("ok", "fit", fact)
            continue
        remedies = [
            f"{change} (then {_gib(peak)})" for change, peak in advice(cfg, size, estimate.stage, limit // at_a_time)
        ]
        if at_a_time > 1:
            remedies.insert(0, "parallel: 1")
        yield Finding("blocked", "fit", fact, "one or more of: " + "; ".join(remedies or ["a smaller model"]))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


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


def _memory_table(estimates: list[Estimate], cfg: RunConfig) -> Table:
    table = Table(
        title=f"Memory of one process, {escape(cfg.model.path)} in {cfg.model.dtype}; activations are estimated",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("")
    for name in ("parameters", "weights", "gradients", "optimiser", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in estimates:
        table.add_row(f"[bold]{estimate.stage}[/bold]", "", "", "", "", f"[bold]{_gib(estimate.total)}[/bold]")
        for role in estimate.roles:
            parts = [_gib(part) if part else "" for part in (role.weights, role.gradients, role.optimizer, role.total)]
            table.add_row(f"  {role.name}", f"{role.parameters:,}", *parts)
        peak = max(estimate.phases.values())
        for phase, need in estimate.phases.items():
            aside = "" if need == peak else " [dim](not added)[/dim]"
            table.add_row(f"  {phase}{aside}", "", "", "", "", _gib(need))
        table.add_section()
    return table
