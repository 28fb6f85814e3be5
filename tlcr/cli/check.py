"""``tlcr run CONFIG --check``: a dry run on the CPU of this machine, without weights, data or network.

The architecture is made on the meta device, shared out as on the GPUs that are named, and the steps are counted. Then a
model of the same architecture, 64 wide, really goes through every stage, one optimiser step each, on gloo processes
where the run has several. The reviser, the analysis of the discriminator and the report are left out.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig
from tlcr.config.stages import DONE, stages_of
from tlcr.config.trials import trials_of
from tlcr.errors import ConfigError, TlcrError
from tlcr.experiment.memory import (
    GPUS_OF_A_NODE,
    Architecture,
    Machine,
    build_on_meta,
    shards_of,
)
from tlcr.experiment.rehearsal import in_small, processes_in_small
from tlcr.experiment.simulation import held_of_shards
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.loading import check_fits
from tlcr.models.miniature import WIDTH

__all__ = ["check"]

Say = Callable[[str], None]
SECONDS_TO_END = 10.0
"""How long the others have to notice that a process failed, before they are ended."""
ERROR = "tlcr: error: "


def check(cfg: RunConfig, *, gpus: int | None, say: Say) -> None:
    """Tries a config, and says step by step what was done; the last sentence is the result.

    Args:
        cfg: the run.
        gpus: on how many GPUs it is to run, a process on each; None: one, where nothing is sharded.
        say: is given each line.

    Raises:
        TlcrError: what would stop the run, with the knob and what to set.
    """
    began = time.monotonic()
    if gpus is None and cfg.sharding.kind != "none":
        raise ConfigError(
            f"sharding.kind is {cfg.sharding.kind!r}, and --check does not know among how many GPUs; add --gpus, such "
            f"as --gpus {GPUS_OF_A_NODE}"
        )
    processes = gpus or 1
    _processes(cfg, processes)
    say(f"1. settings: they go together on {_gpus(processes)}")
    architecture = Architecture(build_on_meta(cfg.model))
    for line in _architecture(cfg, architecture, processes):
        say(line)
    stages = [stage for stage in stages_of(cfg) if stage not in ("revisions", "analysis")]
    for line in _plan(cfg, stages, processes):
        say(line)
    small, of_a_node = processes_in_small(cfg, processes)
    say(f"5. the same architecture, {WIDTH} wide, on {_several(small, 'CPU process', 'es')}: one step of each stage")
    for line in _rehearse(cfg, architecture, stages, small, of_a_node):
        say(f"   {line}")
    trained = ", ".join(stage.replace("_", " ") for stage in stages if stage != "labels")
    say(
        f"The check passed in {time.monotonic() - began:.0f} s: {trained} run with these settings; 'tlcr doctor' with "
        "this config says what data and weights lack, and what memory the run takes."
    )


def _processes(cfg: RunConfig, processes: int) -> None:
    problem = cfg.ppo.size_problem(processes) or cfg.sharding.problem(processes, min(processes, GPUS_OF_A_NODE))
    if problem is not None:
        raise ConfigError(problem)


def _architecture(cfg: RunConfig, architecture: Architecture, processes: int) -> Iterator[str]:
    model, machine = architecture.model, Machine(gpu=True, processes=processes)
    longest = cfg.data.max_prompt_tokens + max(cfg.data.max_answer_tokens, cfg.rollout.max_response_tokens)
    check_fits(model, longest, "a prompt with an answer, each as long as the config allows,")
    make_top_layers_bidirectional(model, cfg.discriminator.bidirectional_layers)
    layers = model.config.get_text_config().num_hidden_layers
    size = architecture.size.parameters
    yield f"2. model: {type(model).__name__}, {size / 1e9:.2f}B parameters in {layers} layers, on the meta device"
    shards = shards_of(cfg, machine)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    if cfg.lora.rank is not None:
        size = architecture.adapter(cfg.lora)
        yield f"3. adapters: {size / 1e6:.1f}M parameters each, for {', '.join(cfg.lora.roles)}"
    elif shards is None:
        yield "3. shards: none, every process holds whole models"
    else:
        held, units = held_of_shards(model, shards, getattr(torch, cfg.sharding.reduce_dtype))
        groups = f" in {shards[0]} groups" if len(shards) > 1 else ""
        yield f"3. shards: {units} units among {processes} processes{groups}, {held / whole:.3f} of the model in each"


def _plan(cfg: RunConfig, stages: list[str], processes: int) -> Iterator[str]:
    yield "4. plan, for each process:"
    for stage in stages:
        if stage == "labels":
            continue
        settings = getattr(cfg, stage)
        batch = cfg.ppo.minibatch_size if stage == "ppo" else settings.batch_size
        share = math.ceil(batch / processes)
        passes = math.ceil(share / min(settings.micro_batch_size or share, share))
        what = "answers" if stage == "ppo" else "examples"
        line = f"   {stage.replace('_', ' ')}: a step is {share} of {batch} {what}, in {_several(passes, 'pass', 'es')}"
        if stage == "ppo":
            steps = cfg.ppo.batch_size // batch * cfg.ppo.epochs
            rounds = f"{_several(cfg.ppo.updates, 'round')} of {_several(steps, 'step')}"
            line += f"; {rounds} for {_several(len(trials_of(cfg)), 'policy', plural='policies')}"
        yield line


def _gpus(processes: int) -> str:
    return _several(processes, "GPU")


def _several(number: int, name: str, ending: str = "s", *, plural: str | None = None) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {plural or name + ending}"


# ---- the small run


def _rehearse(
    cfg: RunConfig, architecture: Architecture, stages: list[str], processes: int, of_a_node: int
) -> Iterator[str]:
    """Runs everything small, and yields what each stage did. Where that fails its log stays."""
    folder = Path(tempfile.mkdtemp(prefix="tlcr-check-"))
    small = in_small(cfg, architecture.model.config, folder, processes=processes)
    config = folder / "config.yaml"
    config.write_text(dump_config(small), encoding="utf-8")
    began = time.monotonic()
    _run_together(config, folder, processes, of_a_node, stages)
    for stage in stages:
        for record in sorted((folder / "run" / stage).rglob(DONE)):
            metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
            shown = [f"{name} {metrics[name]:.3g}" for name in SHOWN if isinstance(metrics.get(name), (int, float))]
            where = record.parent.relative_to(folder / "run")
            yield f"{where}: {', '.join(shown) or 'done'}"
    yield f"in {time.monotonic() - began:.0f} s"
    shutil.rmtree(folder)


SHOWN = ("loss", "train/loss", "eval/loss", "policy/loss", "policy/grad_norm", "value/grad_norm", "kl/per_token")


def _run_together(config: Path, folder: Path, processes: int, of_a_node: int, stages: list[str]) -> None:
    """Runs the stages in processes of their own. They come from a server that has imported what takes long."""
    own = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(own)
    context.set_forkserver_preload(["tlcr.cli.check", "tlcr.experiment.pipeline"])
    port = _free_port()
    _log(folder, 0).parent.mkdir()
    started = [
        context.Process(target=_process, args=(rank, processes, of_a_node, port, str(config), str(folder), stages))
        for rank in range(processes)
    ]
    try:
        for process in started:
            process.start()
        waiting = {process.sentinel: process for process in started}
        until: float | None = None
        while waiting and (until is None or time.monotonic() < until):
            for sentinel in connection.wait(list(waiting), timeout=0.5):
                if waiting.pop(sentinel).exitcode and until is None:
                    until = time.monotonic() + SECONDS_TO_END
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()
    failed = [process.exitcode for process in started if process.exitcode]
    if failed:
        raise TlcrError(_why(folder, processes, failed))


def _why(folder: Path, processes: int, codes: list[int | None]) -> str:
    """The sentence of the process that failed first, or the last line that any wrote."""
    logs = [_log(folder, rank) for rank in range(processes)]
    lines = [line for log in logs if log.is_file() for line in log.read_text(encoding="utf-8").splitlines() if line]
    said = [line.partition(ERROR)[2] for line in lines if line.startswith(ERROR)]
    what = said[-1] if said else f"a process ended with code {codes[0]}: {lines[-1] if lines else 'it said nothing'}"
    return f"the check failed, with a model of width {WIDTH}: {what} (its log: {logs[0].parent})"


def _log(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"process-{rank}.txt"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _process(rank: int, processes: int, of_a_node: int, port: int, config: str, folder: str, stages: list[str]) -> None:
    """What each process does: the stages one by one, as if a launcher had started them, with its output in a file."""
    log = _log(Path(folder), rank)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TLCR_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false"}
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank % of_a_node),
            "LOCAL_WORLD_SIZE": str(of_a_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(1)
    from tlcr.cli import together
    from tlcr.experiment import pipeline

    logging.basicConfig(format="tlcr: %(message)s", level=logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        if processes > 1:
            together.begin()
        for stage in stages:
            pipeline.stage(load_config(config), stage, resume=True)
    except TlcrError as error:
        together.fail(1, error, f"{ERROR}{' '.join(str(error).split())}\n")
    except Exception as error:
        if processes > 1:
            together.crash(error, "it is a fault of tlcr, or of code that the config names")
        raise
    if processes > 1:
        together.end(0)
