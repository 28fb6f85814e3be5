"""A reward that notes which process was asked for which answers, and fails in one of them where a file says so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "TLCR_TEST_FOLDER"


def reward(*, prompts: Sequence[str], response_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The tokens of each answer. ``fail`` in the folder: {"rank": 1, "calls": 3, "how": "raise" or "kill"}."""
    folder, rank = Path(os.environ[FOLDER]), int(os.environ["RANK"])
    calls = folder / f"calls-{os.environ['ATTEMPT']}-{rank}.jsonl"
    with calls.open("a", encoding="utf-8") as file:
        file.write(json.dumps(list(prompts)) + "\n")
    plan = folder / f"fail-{os.environ['ATTEMPT']}"
    if plan.exists():
        fail = json.loads(plan.read_text())
        if (fail["rank"], fail["calls"]) == (rank, len(calls.read_text().splitlines())):
            if fail["how"] == "raise":
                raise LookupError("no answer like this")
            os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(ids)) for ids in response_ids]
