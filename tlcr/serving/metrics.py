"""What a server did, in the text format of Prometheus. Workers that share a port are summed.

With several workers ``processes`` names a folder in ``PROMETHEUS_MULTIPROC_DIR`` before this module is imported, and
each worker writes its figures there; whichever of them is asked reads all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

__all__ = ["Metrics"]

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counters of one worker. Names and meanings stand in docs/serving.md."""

    def __init__(self) -> None:
        self.shared = os.environ.get(SHARED_FOLDER)
        self.registry = CollectorRegistry()
        here: Any = {"registry": self.registry}
        self.requests = Counter("tlcr_requests", "Requests by route and status", ["route", "status"], **here)
        self.request_seconds = Histogram(
            "tlcr_request_seconds", "Seconds from a request's head to its answer", ["route"], buckets=SECONDS, **here
        )
        self.answers = Counter("tlcr_answers", "Answers that were scored", **here)
        self.tokens_scored = Counter("tlcr_tokens_scored", "Answer tokens with a reward", **here)
        self.tokens_read = Counter("tlcr_tokens_read", "Tokens that the model read, prompts included", **here)
        self.tokens_padding = Counter("tlcr_tokens_padding", "Padding that the model read beside them", **here)
        self.batch_rows = Histogram("tlcr_batch_rows", "Answers of a forward pass", buckets=ROWS, **here)
        self.batch_seconds = Histogram("tlcr_batch_seconds", "Seconds of a forward pass", buckets=SECONDS, **here)
        self.queue_tokens = Gauge(
            "tlcr_queue_tokens", "Tokens accepted and not answered", multiprocess_mode="livesum", **here
        )

    def of_batch(self, rows: int, tokens: int, cells: int, seconds: float) -> None:
        """Counts one forward pass over ``rows`` of together ``tokens``, padded to ``cells``."""
        self.tokens_read.inc(tokens)
        self.tokens_padding.inc(cells - tokens)
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        if self.shared is None:
            return generate_latest(self.registry)
        for pid in {int(file.stem.rpartition("_")[2]) for file in Path(self.shared).glob("gauge_live*_*.db")}:
            if not psutil.pid_exists(pid):
                mark_process_dead(pid, self.shared)
        together = CollectorRegistry()
        MultiProcessCollector(together, self.shared)
        return generate_latest(together)
