"""Processes of ``tlcr serve``: one, or several that share the port, each with a model of its own on a GPU of its own.

uvicorn accepts connections, and starts a worker anew that died. A request that such a worker had accepted is lost with
its connection, which its client sees at once; nothing else is touched.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from filelock import FileLock, Timeout
from uvicorn.supervisors import Multiprocess

from tlcr.errors import ConfigError, TlcrError
from tlcr.serving.limits import TimedProtocol
from tlcr.serving.settings import LOOPBACK, TOKEN_VARIABLE, ServerSettings, read_token
from tlcr.training.distributed import process_device

__all__ = ["serve"]

logger = logging.getLogger("tlcr")

HEALTH_SECONDS = 60
"""How long a worker may not answer its parent, as while it loads a model, before it is taken for hung."""

FAILED = "failed"
"""The file by which a worker that cannot start says so to its parent."""


def serve(settings: ServerSettings) -> None:
    """Serves until it is told to stop by SIGTERM or SIGINT; what was accepted by then is answered.

    Args:
        settings: what to serve, and how.

    Raises:
        ConfigError: the folder holds no discriminator, the address is taken, or the token cannot be read.
    """
    token = read_token(settings, dict(os.environ))
    if token is None and settings.host not in LOOPBACK:
        logger.warning(
            "the server listens on %s and asks for no token: whoever reaches it can use it. Set %s or --token-file, or "
            "keep it in a network of your own",
            settings.host,
            TOKEN_VARIABLE,
        )
    with _listen(settings) as listening:
        if settings.workers == 1:
            app = _app(settings, token, process_device())
            _announce(settings, listening)
            uvicorn.Server(_config(settings, app)).run(sockets=[listening])
        else:
            _serve_together(settings, token, listening)


def _serve_together(settings: ServerSettings, token: str | None, listening: socket.socket) -> None:
    with tempfile.TemporaryDirectory(prefix="tlcr-serve-") as folder:
        # read by prometheus_client when a worker imports it
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        app = functools.partial(_app_of_worker, settings, token, folder)
        _announce(settings, listening)
        try:
            Multiprocess(_config(settings, app, factory=True), [listening]).run()
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
        failed = Path(folder, FAILED)
        if failed.exists():
            raise ConfigError(failed.read_text(encoding="utf-8"))


def _config(settings: ServerSettings, app: Any, *, factory: bool = False) -> uvicorn.Config:
    protocol = functools.partial(_protocol, settings.io_seconds)
    return uvicorn.Config(
        app,
        factory=factory,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        workers=settings.workers,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=int(settings.io_seconds) + 1,
        timeout_graceful_shutdown=int(settings.stop_seconds) + 1,
        timeout_worker_healthcheck=HEALTH_SECONDS,
    )


def _protocol(seconds: float, *arguments: Any, **named: Any) -> TimedProtocol:
    made = TimedProtocol(*arguments, **named)
    made.seconds = seconds
    return made


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; name another --port"
        ) from error
    listening.set_inheritable(True)
    return listening


def _announce(settings: ServerSettings, listening: socket.socket) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logger.info("serving %s on http://%s:%d", settings.discriminator, host, listening.getsockname()[1])


def _app(settings: ServerSettings, token: str | None, device: torch.device) -> Any:
    from tlcr.serving.app import make_app
    from tlcr.serving.model import ServedModel

    return make_app(settings, ServedModel(settings.discriminator, dtype=settings.dtype, device=device), token)


# ---- a worker of several


def _app_of_worker(settings: ServerSettings, token: str | None, folder: str) -> Any:
    """The application in a worker's process. One that cannot start says why, and stops all: the next would fail too.

    uvicorn would start it anew for ever, also where a GPU has no memory for one more model.
    """
    logging.basicConfig(format="tlcr: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    _end_with_parent(folder)
    try:
        return _app(settings, token, _device(settings, folder))
    except Exception as error:
        said = str(error)
        if not isinstance(error, TlcrError):
            logger.exception("a worker cannot start")
            said = f"a worker of {settings.discriminator!r} cannot start: {type(error).__name__}: {error}"
        Path(folder, FAILED).write_text(said, encoding="utf-8")
        os.kill(os.getppid(), signal.SIGTERM)
        sys.exit(3)


def _device(settings: ServerSettings, folder: str) -> torch.device:
    """The GPU of this worker, or its share of the processor. A slot is free again when its worker is dead."""
    device = process_device()
    for slot in range(settings.workers):
        lock = FileLock(Path(folder, f"slot-{slot}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        _held.append(lock)
        break
    else:
        raise ConfigError(f"all {settings.workers} slots of workers are taken; start the server again")
    if device.type == "cuda":
        return torch.device("cuda", slot % torch.cuda.device_count())
    torch.set_num_threads(max(torch.get_num_threads() // settings.workers, 1))
    return device


_held: list[FileLock] = []
"""The lock of this process's slot, held as long as the process lives."""


def _end_with_parent(folder: str) -> None:
    """Ends this process when its parent is gone, which was killed if its folder is still there."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="tlcr-parent", daemon=True).start()
