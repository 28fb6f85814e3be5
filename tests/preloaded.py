"""Fresh processes that have imported torch and nothing of tlcr, without the seconds that importing torch takes: one
process imports it, and each program runs in a fork of that, for two minutes at most."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SERVER = """
import json, os, signal, sys, traceback, warnings
import torch

def program(code, folder, options, variables, output):
    signal.alarm(120)
    os.dup2(os.open(output + ".out", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(output + ".err", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(folder)
    os.environ.update(variables)
    sys.path.insert(0, folder)
    for option in options:
        action, _, category = option.partition(":")
        warnings.simplefilter(action, getattr(__builtins__, category or "Warning"))
    status = 1
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        program(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(code: str, folder: Path, *filters: str, **environment: str) -> Done:
    """Run a program in `folder`, from which it imports first.

    Args:
        code: the program.
        folder: where it runs.
        filters: of warnings, as `error` or `error:RuntimeWarning`, before Python's own.
        environment: variables beside those of this process, as far as torch has not read them yet.

    Returns:
        Its exit status, and what it wrote.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "program"
        request = [code, str(folder), filters, environment, str(output)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        stdout, stderr = (output.with_suffix(end).read_text(encoding="utf-8") for end in (".out", ".err"))
    return Done(returncode, stdout, stderr)


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVER]
    # At the root, so that it finds no tlcr in its own folder.
    server = subprocess.Popen(command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
