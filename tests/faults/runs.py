"""The tiny run that is attacked: its stages, the folder before and after each of them, and what has to be equal.

Every stage takes about a second. The whole run is on the embedded task, with revisions that a real server made.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.chat.chat_server import ChatServer, completion, rejected_of, revision, serving
from tests.faults.children import finish, serve_in_a_process
from tests.http_server import Reply

STAGES: dict[str, list[str]] = {
    "revisions": ["revise", "run.yaml"],
    "sft": ["train", "sft", "run.yaml", "--resume"],
    "reward_model": ["train", "reward-model", "run.yaml", "--resume"],
    "dpo": ["train", "dpo", "run.yaml", "--resume"],
    "labels": ["label", "run.yaml"],
    "discriminator": ["train", "discriminator", "run.yaml", "--resume"],
    "ppo": ["train", "ppo", "run.yaml", "--resume"],
    "evaluation": ["evaluate", "run.yaml"],
    "analysis": ["analyse", "run"],
    "report": ["report", "run"],
    "two policies side by side": ["run", "parallel.yaml", "--resume"],
}
"""In their order, each with the command that begins it and that goes on with it."""
WORKERS = ("two policies side by side",)
"""What starts processes of its own, which takes long."""
ALL = tuple(stage for stage in STAGES if stage not in WORKERS)
TRAININGS = ("sft", "reward_model", "dpo", "discriminator", "ppo")
STEPS = 4
"""Of every training, about."""

SETTINGS: dict[str, Any] = {
    "output_dir": "run",
    "data": {"embedded_pairs": 20, "max_prompt_tokens": 40, "max_answer_tokens": 40, "held_out": 0.2},
    "reviser": {
        "backend": "endpoint",
        "max_new_tokens": 100,
        "endpoint": {"model": "m", "retries": 1, "concurrency": 2},
    },
    **{
        name: {"epochs": 1, "batch_size": 4, "save_every": 1}
        for name in ("sft", "reward_model", "dpo", "discriminator")
    },
    "rollout": {"max_new_tokens": 6},
    "ppo": {"updates": 3, "batch_size": 4, "minibatch_size": 4, "save_every": 1, "learning_rate": 1e-3},
    "evaluation": {"prompts": 3, "samples": 1},
    "arms": [{"name": "continuous"}],
}
PARALLEL: dict[str, Any] = {"seeds": [0, 1, 2], "parallel": 2}
NOT_COMPARED = {"log.txt", "config.yaml", "started.json"}
"""Logs and times."""
VARIES = {"time", "seconds", "saved_at", "versions", "machine", "requests", "cost", "checksums"}
"""Entries of records that differ from one run to the next."""


class Server(ChatServer):
    """Its revisions depend on the request alone: one word less. Some questions it declines, and then it repeats the key
    that it was sent, as some servers do."""

    def handle(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        words = rejected_of(request).split()
        if len(words) % 5 == 0:
            message = f"no: {request['model']} may not be asked with {headers.get('Authorization')}"
            return Reply({"error": {"message": message}}, 400)
        return Reply(completion(revision(" ".join([*words[:-2], *words[-1:]]))))


def _serve(say: Callable[[str], None]) -> None:
    with serving(Server()) as server:
        say(server.address)
        threading.Event().wait()


@contextmanager
def bench(folder: Path, stages: Sequence[str] = ALL) -> Iterator[Bench]:
    """A bench in a folder, with its reference of these stages; what it started ends with it."""
    pid, address = serve_in_a_process(_serve)
    try:
        made = Bench(folder, address)
        made.make_reference(stages)
        yield made
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Bench:
    """The uninterrupted run: a copy of its folder before each stage, and the digests after it."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address
        self.before: dict[str, Path] = {}
        self.after: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.said = ""
        self._cases = 0

    def make_reference(self, stages: Sequence[str]) -> None:
        """Runs each stage once."""
        whole = self.new_folder("reference")
        self.write_config(whole)
        for stage in stages:
            self.before[stage] = self.folder / f"before-{stage}"
            shutil.copytree(whole, self.before[stage])
            ended = finish(STAGES[stage], whole, _note_modules)
            _import_what(whole)
            if not ended.done:
                raise RuntimeError(f"the uninterrupted {stage} failed: {ended.said}")
            self.seconds[stage] = ended.seconds
            self.said += ended.said
            self.after[stage] = digests(whole / "run")
        self.finished = whole

    def write_config(self, folder: Path, **changes: Any) -> None:
        settings = {**SETTINGS, **changes}
        settings["reviser"] = {**SETTINGS["reviser"]}
        settings["reviser"]["endpoint"] = {**SETTINGS["reviser"]["endpoint"], "base_url": self.address}
        for name, own in (("run.yaml", settings), ("parallel.yaml", settings | PARALLEL)):
            (folder / name).write_text(yaml.safe_dump(own), encoding="utf-8")

    def new_folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True)
        return path

    @contextmanager
    def case(self, stage: str, *, into: Path | None = None) -> Iterator[Path]:
        """A folder of its own that stands before ``stage``; into: a folder that is there, such as a small disk."""
        self._cases += 1
        path = into or self.folder / f"case-{self._cases}"
        shutil.copytree(self.before[stage], path, dirs_exist_ok=True)
        try:
            yield path
        finally:
            if into is None:
                shutil.rmtree(path, ignore_errors=True)

    def differences(self, stage: str, folder: Path) -> list[str]:
        """What of a folder is not as it was after ``stage``, by name; empty: bit for bit equal."""
        wanted, found = self.after[stage], digests(folder / "run")
        return [
            f"{name} {'is missing' if name not in found else 'is left over' if name not in wanted else 'differs'}"
            for name in sorted({*wanted, *found})
            if wanted.get(name) != found.get(name)
        ]


def _note_modules() -> None:
    """Has this process write at its end what it imported."""
    end = os._exit

    def write_and_end(code: int) -> None:
        Path("modules.txt").write_text("\n".join(sys.modules), encoding="utf-8")
        end(code)

    os._exit = write_and_end  # type: ignore[assignment]


def _import_what(folder: Path) -> None:
    """Imports here what a child imported, so that those to come need not: a second of each attack is saved."""
    for name in (folder / "modules.txt").read_text(encoding="utf-8").splitlines():
        if name.split(".")[0] in ("tlcr", "torch", "transformers", "matplotlib", "scipy", "safetensors", "openai"):
            with suppress(Exception):
                importlib.import_module(name)
    (folder / "modules.txt").unlink()


def leaks(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold a secret, by their paths; in any coding that a grep finds."""
    forms = (secret.encode(), secret.encode("utf-16-le"), base64.b64encode(secret.encode())[:-4])
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [str(path.relative_to(folder)) for path in files if any(form in path.read_bytes() for form in forms)]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder by its path, without what two equal runs do not share."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED and not path.name.startswith(("answers.sqlite", ".lock")):
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(_compared(path)).hexdigest()
    return found


def _compared(path: Path) -> bytes:
    try:
        return _as_record(path)
    except ValueError:  # a damaged one
        return path.read_bytes()


def _as_record(path: Path) -> bytes:
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return json.dumps([_lasting(row) for row in rows]).encode()
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return json.dumps(_lasting(json.loads(path.read_text(encoding="utf-8")))).encode()
    return path.read_bytes()


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _lasting(v) for k, v in value.items() if k not in VARIES and not k.startswith("time/")}
    return [_lasting(item) for item in value] if isinstance(value, list) else value
