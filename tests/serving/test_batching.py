"""Batches of like length out of many requests: each request gets its own rewards, whatever shares its batch."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.serving.conftest import running
from tlcr.hosts.client import RewardClient
from tlcr.hosts.contract import Item
from tlcr.models.discriminator import Opinion
from tlcr.serving.batching import Batcher
from tlcr.serving.metrics import Metrics
from tlcr.serving.model import ServedModel
from tlcr.types import EncodedAnswer


def row(length: int, first: int = 0) -> EncodedAnswer:
    return EncodedAnswer((first, *[7] * (length - 1)), 0, complete=False)


class Recorder:
    """A model whose opinion of a row is its first id, and which keeps the lengths of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, rows: Sequence[EncodedAnswer]) -> list[Opinion]:
        self.batches.append([len(one.ids) for one in rows])
        return [Opinion(torch.zeros(1, 2), torch.tensor([float(one.ids[0])])) for one in rows]


def run(jobs: Sequence[Sequence[EncodedAnswer]], **changes: Any) -> tuple[list[list[float]], list[list[int]]]:
    """The opinions of jobs that arrive together, and the batches that they were read in."""
    recorder = Recorder()

    async def all_of_them() -> list[list[float]]:
        settings = {"batch_tokens": 100, "window_seconds": 0.0, "queue_tokens": 10**6, **changes}
        batcher = Batcher(recorder, Metrics(), **settings)
        waiting = [asyncio.ensure_future(batcher_submit(batcher, job)) for job in jobs]
        await asyncio.sleep(0)
        batcher.start()
        await asyncio.sleep(0)
        found = await asyncio.gather(*waiting)
        assert batcher.held == 0
        await batcher.stop()
        return found

    async def batcher_submit(batcher: Batcher, job: Sequence[EncodedAnswer]) -> list[float]:
        while not batcher.works:
            await asyncio.sleep(0)
        return [one.rewards_T.item() for one in await batcher.submit(job)]

    return asyncio.run(all_of_them()), recorder.batches


def test_jobs_get_their_own_rows_back_in_their_order() -> None:
    generator = random.Random(0)
    jobs = [[row(generator.randint(1, 40), 100 * j + i) for i in range(generator.randint(1, 9))] for j in range(50)]
    found, batches = run(jobs)
    assert found == [[100.0 * j + i for i in range(len(job))] for j, job in enumerate(jobs)]
    assert sum(map(len, batches)) == sum(map(len, jobs)) and len(batches) < 100


def test_a_batch_has_rows_of_like_length_and_never_too_many_cells() -> None:
    generator = random.Random(1)
    rows = [row(generator.choice([3, 4, 5, 60, 64])) for _ in range(200)]
    _, batches = run([rows], batch_tokens=200)
    for batch in batches:
        assert max(batch) * len(batch) <= 200
        assert max(batch) <= 5 or min(batch) >= 60 or batch == batches[-1] or len(batches[-1]) < 3
    cells, tokens = sum(max(batch) * len(batch) for batch in batches), sum(map(sum, batches))
    assert cells < 1.2 * tokens


def test_a_row_longer_than_a_batch_goes_alone() -> None:
    _, batches = run([[row(5), row(300), row(6)]], batch_tokens=100)
    assert [300] in batches and sorted(map(len, batches)) == [1, 2]


def test_the_oldest_row_is_in_the_next_batch() -> None:
    """Short rows that keep coming do not let a long one wait."""
    _, batches = run([[row(90)], *[[row(2)] for _ in range(500)]])
    assert 90 in batches[0]


def test_a_window_gathers_what_arrives_in_it() -> None:
    recorder = Recorder()

    async def three_in_a_row() -> None:
        batcher = Batcher(recorder, Metrics(), batch_tokens=100, window_seconds=300.0, queue_tokens=1000)
        batcher.start()
        first = asyncio.ensure_future(batcher.submit([row(40)]))
        await asyncio.sleep(0.02)
        second = asyncio.ensure_future(batcher.submit([row(40)]))
        await asyncio.sleep(0.02)
        assert recorder.batches == []
        await asyncio.gather(first, second, batcher.submit([row(20)]))  # 100 tokens: no need to wait any longer
        await batcher.stop()

    asyncio.run(asyncio.wait_for(three_in_a_row(), 60))
    assert [sum(batch) for batch in recorder.batches] == [80, 20]


def test_64_clients_each_get_their_own(served: ServedModel) -> None:
    """Requests of every size from many threads, ids and text, small batches: each reward is checked against its own."""
    generator = random.Random(2)
    requests = [
        [
            Item(
                [generator.randrange(3, 400) for _ in range(generator.randint(0, 40))],
                [generator.randrange(3, 400) for _ in range(generator.randint(0, 40))],
            )
            for _ in range(generator.randint(1, 6))
        ]
        for _ in range(64 * 4)
    ]
    encoded = [
        [EncodedAnswer((*one.prompt_ids, *one.response_ids), len(one.prompt_ids), False) for one in request]
        for request in requests
    ]
    wrong: list[Any] = []
    with running(served, batch_tokens=512, max_items=4) as server:
        client = RewardClient(server.url)

        def score(part: int) -> None:
            for number in range(part, len(requests), 64):
                rewards = client.token_rewards(requests[number])
                for found, alone in zip(rewards, encoded[number], strict=True):
                    wanted = served._opinions([alone])[0].rewards_T.tolist() if len(alone.answer_ids) else []
                    if found != pytest.approx(wanted, abs=2e-6):
                        wrong.append((number, found, wanted))
                answered.append(number)

        answered: list[int] = []
        threads = [threading.Thread(target=score, args=(part,)) for part in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong == [] and sorted(answered) == list(range(len(requests)))
        sizes = server.app.service.metrics.batch_rows._sum.get()
        assert sizes > len(answered)
