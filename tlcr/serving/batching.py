"""A bounded queue of rows before one model, which takes them in batches of like length.

The model works in a thread of its own, on one batch at a time. While it works, rows come in; the next batch is made of
what waits then. Only a model that was idle waits a moment for company. Every batch has the row that has waited longest
and those whose lengths are nearest to its own, so that little is padding and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tlcr.models.discriminator import Opinion
from tlcr.serving.limits import Refused
from tlcr.serving.metrics import Metrics
from tlcr.types import EncodedAnswer

__all__ = ["Batcher"]

logger = logging.getLogger("tlcr")

LOOKED_AT = 2048
"""How many of the rows that have waited longest a batch is chosen from."""


@dataclass(eq=False)
class Job:
    """The rows of one request, answered together."""

    answer: asyncio.Future[list[Opinion]]
    opinions: list[Opinion | None]
    left: int


@dataclass(eq=False)
class Waiting:
    """One row of a job."""

    row: EncodedAnswer
    job: Job
    index: int
    since: float = field(default_factory=time.monotonic)

    @property
    def length(self) -> int:
        return len(self.row.ids)


class Batcher:
    """Gathers rows of many requests into batches for ``score``, and gives each request its own back, in its order."""

    def __init__(
        self,
        score: Callable[[Sequence[EncodedAnswer]], list[Opinion]],
        metrics: Metrics,
        *,
        batch_tokens: int,
        window_seconds: float,
        queue_tokens: int,
    ) -> None:
        self._score, self._metrics = score, metrics
        self.batch_tokens, self.window_seconds, self.queue_tokens = batch_tokens, window_seconds, queue_tokens
        self._waiting: list[Waiting] = []
        self._held = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tlcr-model")
        self._tokens_per_second = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to work, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends the work; what still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for one in self._waiting:
            one.job.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def works(self) -> bool:
        """Whether rows that are submitted will be read."""
        return self._task is not None and not self._task.done()

    @property
    def held(self) -> int:
        """Tokens of all rows that were accepted and not answered."""
        return self._held

    async def submit(self, rows: Sequence[EncodedAnswer]) -> list[Opinion]:
        """The opinions of a request's rows, in their order. Cancelled, its rows leave the queue.

        Args:
            rows: at least one, with no more tokens than the queue holds.

        Returns:
            One opinion for each row.

        Raises:
            Refused: the rows do not fit into the queue now (429), or nothing works on it (503).
        """
        if not self.works:
            raise Refused(503, "the server is not working on requests; its log says why", 5)
        tokens = sum(len(row.ids) for row in rows)
        if self._held + tokens > self.queue_tokens:
            raise self.full()
        job = Job(asyncio.get_running_loop().create_future(), [None] * len(rows), len(rows))
        self._held += tokens
        self._waiting += [Waiting(row, job, index) for index, row in enumerate(rows)]
        self._metrics.queue_tokens.set(self._held)
        self._arrived.set()
        try:
            return await job.answer
        finally:
            if job.left:  # cancelled, or a batch failed: what still waits of it would be held until the next batch
                self._waiting = [one for one in self._waiting if one.job is not job]
            self._held -= tokens
            self._metrics.queue_tokens.set(self._held)

    def full(self) -> Refused:
        """The refusal of a request that finds no room. It may come again when half of the queue is worked off."""
        speed = self._tokens_per_second or self.batch_tokens
        seconds = min(max(math.ceil(self._held / 2 / speed), 1), 60)
        return Refused(429, "the server has as much to do as it holds; come again later", seconds)

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                await self._arrived.wait()
                await self._wait_for_company()
            batch = self._next_batch()
            if batch:
                await self._work(batch)
            if not self._waiting:
                self._arrived.clear()

    async def _wait_for_company(self) -> None:
        while self._waiting and sum(one.length for one in self._waiting) < self.batch_tokens:
            left = self._waiting[0].since + self.window_seconds - time.monotonic()
            if left <= 0:
                break
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        self._arrived.set()

    def _next_batch(self) -> list[Waiting]:
        """The oldest row and those nearest to it in length, as many as fit; rows whose client is gone are dropped."""
        self._waiting = [one for one in self._waiting if not one.job.answer.done()]
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        longest, batch = oldest.length, [oldest]
        others = sorted(self._waiting[1:LOOKED_AT], key=lambda one: abs(one.length - oldest.length))
        for one in others:
            if max(longest, one.length) * (len(batch) + 1) > self.batch_tokens:
                break
            longest = max(longest, one.length)
            batch.append(one)
        taken = set(map(id, batch))
        self._waiting = [one for one in self._waiting if id(one) not in taken]
        return batch

    async def _work(self, batch: list[Waiting]) -> None:
        began = time.monotonic()
        try:
            opinions = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._score, [one.row for one in batch]
            )
        except Exception as error:
            logger.exception("a batch of %d rows failed", len(batch))
            for one in batch:
                if not one.job.answer.done():
                    one.job.answer.set_exception(
                        Refused(500, f"the discriminator failed on this request: {type(error).__name__}: {error}")
                    )
            return
        seconds, tokens = time.monotonic() - began, sum(one.length for one in batch)
        # a mean over the last ten batches or so
        weight = 0.1 if self._tokens_per_second else 1.0
        self._tokens_per_second += weight * (tokens / max(seconds, 1e-6) - self._tokens_per_second)
        self._metrics.of_batch(len(batch), tokens, len(batch) * max(one.length for one in batch), seconds)
        for one, opinion in zip(batch, opinions, strict=True):
            job = one.job
            job.opinions[one.index] = opinion
            job.left -= 1
            if job.left == 0 and not job.answer.done():
                job.answer.set_result([found for found in job.opinions if found is not None])
