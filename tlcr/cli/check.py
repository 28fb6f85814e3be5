"""``tlcr run CONFIG --check``: a dry run on the CPU of this machine, without weights, data or network.

The architecture is made on the meta device, shared out as on the GPUs that are named, and the steps are counted. Then a
model of the same architecture, 64 wide, really goes through every stage, one optimiser step each, on gloo processes
where the run has several. The reviser, the analysis of the discriminator and the report are left out.

All of it happens in processes of their own (``tlcr/cli/rehearse.py``). They come from a server that has imported once
what takes long to import; this process imports none of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tlcr.config.schema import RunConfig
from tlcr.config.stages import DONE, stages_of
from tlcr.errors import ConfigError, TlcrError
from tlcr.experiment.architecture import GPUS_OF_A_NODE
from tlcr.experiment.preflight import knobs_alone, refuse

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
    stages = [stage for stage in stages_of(cfg) if stage not in ("revisions", "analysis")]
    # of the config as it is: the small run has data held out, one policy at a time and no refresh
    found = knobs_alone(cfg, stages, processes=processes)
    refuse(found)
    say(f"1. settings: they go together on {processes} GPU{'' if processes == 1 else 's'}")
    for finding in found:
        say(f"   {finding.level}: {finding}")
    folder = Path(tempfile.mkdtemp(prefix="tlcr-check-"))
    try:
        small = _plan(cfg, stages, processes, folder, say)
    except BaseException:
        shutil.rmtree(folder)
        raise
    for line in _rehearse(folder, stages, small):
        say(f"   {line}")
    trained = ", ".join(stage.replace("_", " ") for stage in stages if stage != "labels")
    say(
        f"The check passed in {time.monotonic() - began:.0f} s: {trained} run with these settings; 'tlcr doctor' with "
        "this config says what data and weights lack, and what memory the run takes."
    )


class Small(NamedTuple):
    """What takes the steps: processes, how many of them stand for a node, and the width of the model."""

    processes: int
    of_a_node: int
    width: int


def _plan(cfg: RunConfig, stages: list[str], processes: int, folder: Path, say: Say) -> Small:
    """Steps 2 to 5 up to the small run, whose config and model are then in the folder; says their lines."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_planning, args=(sender, cfg, stages, processes, folder))
    process.start()
    sender.close()
    try:
        while isinstance(said := receiver.recv(), str):
            say(said)
    except EOFError as error:
        process.join()
        raise TlcrError(f"the check failed: its process ended with code {process.exitcode}") from error
    finally:
        process.kill()
        process.join()
    if isinstance(said, TlcrError):
        raise said
    return Small(*said)


def _planning(sender: Connection, cfg: RunConfig, stages: list[str], processes: int, folder: Path) -> None:
    """What the process of ``_plan`` does: it sends lines, and at the end a ``Small`` or an error."""
    from tlcr.cli import rehearse

    try:
        sender.send(rehearse.plan(cfg, stages, processes, folder, sender.send))
    except TlcrError as error:
        sender.send(error)


def _rehearse(folder: Path, stages: list[str], small: Small) -> Iterator[str]:
    """Runs everything small, and yields what each stage did. Where that fails its log stays."""
    began = time.monotonic()
    _run_together(folder, stages, small)
    for stage in stages:
        for record in sorted((folder / "run" / stage).rglob(DONE)):
            metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
            shown = [f"{name} {metrics[name]:.3g}" for name in SHOWN if isinstance(metrics.get(name), (int, float))]
            where = record.parent.relative_to(folder / "run")
            yield f"{where}: {', '.join(shown) or 'done'}"
    yield f"in {time.monotonic() - began:.0f} s"
    shutil.rmtree(folder)


SHOWN = ("loss", "train/loss", "eval/loss", "policy/loss", "policy/grad_norm", "value/grad_norm", "kl/per_token")


def _context() -> Any:
    own = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(own)
    context.set_forkserver_preload(["tlcr.cli.rehearse"])
    return context


def _run_together(folder: Path, stages: list[str], small: Small) -> None:
    """Runs the stages in processes of their own."""
    context, port = _context(), _free_port()
    _log(folder, 0).parent.mkdir()
    started = [
        context.Process(target=_running, args=(rank, small, port, folder, stages)) for rank in range(small.processes)
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
        raise TlcrError(_why(folder, small, failed))


def _why(folder: Path, small: Small, codes: list[int | None]) -> str:
    """The sentence of the process that failed first, or the last line that any wrote."""
    logs = [_log(folder, rank) for rank in range(small.processes)]
    lines = [line for log in logs if log.is_file() for line in log.read_text(encoding="utf-8").splitlines() if line]
    said = [line.partition(ERROR)[2] for line in lines if line.startswith(ERROR)]
    what = said[-1] if said else f"a process ended with code {codes[0]}: {lines[-1] if lines else 'it said nothing'}"
    return f"the check failed, with a model of width {small.width}: {what} (its log: {logs[0].parent})"


def _log(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"process-{rank}.txt"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _running(rank: int, small: Small, port: int, folder: Path, stages: list[str]) -> None:
    """What each process of the small run does: the stages, as if a launcher had started it. Its output is a file."""
    with _log(folder, rank).open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TLCR_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false"}
    if small.processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(small.processes),
            "LOCAL_RANK": str(rank % small.of_a_node),
            "LOCAL_WORLD_SIZE": str(small.of_a_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    from tlcr.cli import rehearse, together

    try:
        if small.processes > 1:
            together.begin()
        rehearse.run(folder, stages)
    except TlcrError as error:
        together.fail(1, error, f"{ERROR}{' '.join(str(error).split())}\n")
    except Exception as error:
        if small.processes > 1:
            together.crash(error, "it is a fault of tlcr, or of code that the config names")
        raise
    if small.processes > 1:
        together.end(0)
