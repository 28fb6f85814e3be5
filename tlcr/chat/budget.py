"""The cost of requests, and the caps that no request may exceed.

Before a request is sent, the store records its maximum cost; afterwards, its actual cost. So the caps hold through
retries, concurrency and kill -9: a request that may have been billed counts as billed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, Question
from tlcr.config.schema import EndpointConfig
from tlcr.errors import BudgetExhausted

__all__ = ["Budget", "Prices", "Reservation"]

PER_TOKENS = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in the currency of the user."""

    prompt: float
    answer: float

    @staticmethod
    def of(cfg: EndpointConfig) -> Prices | None:
        """None where the config names no price."""
        if cfg.prompt_price is None or cfg.answer_price is None:
            return None
        return Prices(cfg.prompt_price, cfg.answer_price)

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self.prompt + answer_tokens * self.answer) / PER_TOKENS


@dataclass(frozen=True)
class Reservation:
    """A request that is under way: its question, and its maximum cost."""

    number: int
    bound: float
    key: str
    question: Question


class Budget:
    """Grants requests while the caps allow it. Counts all requests in the store, earlier runs included."""

    def __init__(self, cfg: EndpointConfig, store: AnswerStore) -> None:
        self._prices, self._store, self._model = Prices.of(cfg), store, str(cfg.model)
        self._max_cost, self._max_requests = cfg.max_cost, cfg.max_requests
        self.requests, self._settled = store.totals()
        self._reserved = 0.0
        self._under_way = 0
        self._change = asyncio.Condition()

    @property
    def spent(self) -> float | None:
        """The cost of finished requests; None without prices."""
        return None if self._prices is None else self._settled

    async def reserve(self, key: str, question: Question) -> Reservation:
        """Reserves one more request. Waits while requests under way may turn out cheaper than their reservation.

        Raises BudgetExhausted where no request fits even if none is under way.
        """
        bound = self._cost(question.prompt_tokens_bound, question.max_new_tokens)
        async with self._change:
            while True:
                if self._max_requests is not None and self.requests >= self._max_requests:
                    raise BudgetExhausted(
                        f"{self.requests} requests were sent and max_requests is {self._max_requests}; what was "
                        "answered is kept: raise the cap and start again to go on"
                    )
                if self._max_cost is None or self._settled + self._reserved + bound <= self._max_cost:
                    break
                if not self._under_way:
                    raise BudgetExhausted(
                        f"{self._settled:.4f} was spent, the next request may cost {bound:.4f}, and max_cost is "
                        f"{self._max_cost:g}; what was answered is kept: raise the cap and start again to go on"
                    )
                await self._change.wait()
            number = self._store.open_request(key, bound)  # first: what raises here must not count as under way
            self.requests += 1
            self._under_way += 1
            self._reserved += bound
            return Reservation(number, bound, key, question)

    async def give_back(self, reservation: Reservation) -> None:
        """Cancels a request that was not sent."""
        try:
            self._store.drop_request(reservation.number)
            self.requests -= 1
        finally:  # a store that cannot be written must not leave others waiting for this request
            await self._settle(reservation, 0.0)

    async def settle(self, reservation: Reservation, *, billed: bool, answer: Answer | None = None) -> None:
        """Finishes the request. ``answer``, if there is one, is stored in the same transaction.

        billed: whether the server will, or may, charge for it. Where it reports no token counts, or nothing at all,
        the maximum cost counts.
        """
        cost = reservation.bound if billed else 0.0
        if answer is not None and answer.prompt_tokens is not None and answer.answer_tokens is not None:
            cost = self._cost(answer.prompt_tokens, answer.answer_tokens)
        try:
            self._store.settle_request(
                reservation.number,
                cost,
                key=reservation.key,
                answer=answer,
                template=reservation.question.template,
                model=self._model,
            )
        finally:  # as in give_back
            await self._settle(reservation, cost)

    async def _settle(self, reservation: Reservation, cost: float) -> None:
        async with self._change:
            self._settled += cost
            self._reserved -= reservation.bound
            self._under_way -= 1
            self._change.notify_all()

    def _cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        return 0.0 if self._prices is None else self._prices.cost(prompt_tokens, answer_tokens)
