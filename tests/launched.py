"""Checks that several processes make together. Starting them takes long, so all checks of a module share one start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_MADE = "not made: a check before it failed"


class Checks:
    """Functions of one module that every process calls, in the order in which they were defined.

    The module calls ``run`` where it is started, and ``launch`` starts it.
    """

    def __init__(self) -> None:
        self._functions: dict[str, Callable[[Path], None]] = {}

    def __call__(self, function: Callable[[Path], None]) -> Callable[[Path], None]:
        self._functions[function.__name__] = function
        return function

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    def run(self, folder: Path) -> None:
        """Makes the checks, which get ``folder``, and writes there how they ended on this process.

        The first that fails ends the process, and with it the launcher ends the others, which may wait for it.
        """
        outcomes = dict.fromkeys(self.names, NOT_MADE)
        try:
            for name, function in self._functions.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    function(folder)
                outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
            raise
        finally:
            (folder / f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(outcomes), encoding="utf-8")


class Outcomes:
    """How the checks ended on every process that could say so."""

    def __init__(self, of_processes: dict[int, dict[str, str]]) -> None:
        self._of_processes = of_processes

    def assert_passed(self, name: str) -> None:
        """Fails with what each process says of the check."""
        said = {rank: outcomes[name] for rank, outcomes in self._of_processes.items() if outcomes[name]}
        assert not said, "\n".join(f"process {rank}: {text}" for rank, text in said.items())


def launch(module: str, folder: Path, *, processes: int) -> Outcomes:
    """Starts ``python -m module folder`` on several gloo processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", module, str(folder)],
        cwd=ROOT,
        env={**os.environ, **ours, "TLCR_PROGRESS": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    files = {rank: folder / f"outcomes-{rank}.json" for rank in range(processes)}
    written = {rank: json.loads(file.read_text(encoding="utf-8")) for rank, file in files.items() if file.is_file()}
    assert written and (done.returncode != 0 or len(written) == processes), done.stdout + done.stderr
    return Outcomes(written)
