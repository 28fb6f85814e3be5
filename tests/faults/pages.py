"""Scripts in what the report shows: every text of a finished run's files, one in each case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.case import Case
from tests.faults.children import finish

NASTY = "<script>alert('x')</script><img src=x onerror=y>"
ESCAPED = "&lt;script&gt;alert("
IN_A_NAME = "<img src=x onerror=y>"
FILES = ("analysis.json", "evaluation.json", "statistics.json", "samples.jsonl", "done.json", "arm.json")
UNSEEN = ("config", "checksums")
"""Parts of records that no page shows: it has the settings from config.yaml."""
FOLDER, CONFIG = "the run's folder", "config.yaml"


def fields(folder: Path) -> list[tuple[str, str]]:
    """The texts of a run's files as (name of the file, dotted path), after its folder's name and its config."""
    found = {
        (name, field)
        for name in FILES
        for path in folder.rglob(name)
        for value in _values(path)
        for field in _texts(value, "")
    }
    return [(FOLDER, ""), (CONFIG, ""), *sorted(found)]


def scripts(case: Case) -> None:
    """A text becomes a script: in the page it has to be text, or the file is refused. The case's seed names the text;
    met: the page shows it."""
    run, every = case.folder / "run", fields(case.folder / "run")
    name, field = every[case.outcome.seed % len(every)]
    before = {path: path.read_bytes() for path in run.rglob(name)}
    for path, data in before.items():
        if name == CONFIG:
            path.write_bytes(f"# {NASTY}\n".encode() + data)
        else:
            path.write_text("\n".join(json.dumps(_with_script(v, field)) for v in _values(path)), encoding="utf-8")
    if name == FOLDER:
        run = run.rename(case.folder / IN_A_NAME)
    ended = finish(["report", run.name], case.folder)
    case.take(ended)
    if ended.done:
        text = (run / "report.html").read_text(encoding="utf-8")
        case.outcome.met = ESCAPED in text or (name == FOLDER and "&lt;img src=x" in text)
        if "<script" in text or "<img src=x" in text:
            case.problem(f"{name} {field}: a script came into the report")
    run.rename(case.folder / "run")
    for path, data in before.items():
        path.write_bytes(data)
    case.go_on()


def _values(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def _texts(value: Any, path: str) -> set[str]:
    if isinstance(value, str):
        return {path}
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if path or key not in UNSEEN}
        return set().union(*(_texts(item, f"{path}.{key}") for key, item in kept.items()))
    return set().union(*(_texts(item, f"{path}.*") for item in value)) if isinstance(value, list) else set()


def _with_script(value: Any, field: str, path: str = "") -> Any:
    if isinstance(value, str):
        return NASTY + value if path == field else value
    if isinstance(value, dict):
        return {key: _with_script(item, field, f"{path}.{key}") for key, item in value.items()}
    return [_with_script(item, field, f"{path}.*") for item in value] if isinstance(value, list) else value
