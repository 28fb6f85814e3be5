"""A model behind a server that speaks the OpenAI chat protocol: many requests at a time, within rates, caps and time.

The client's own retries are off, because every attempt must pass the rate limits and the caps; tenacity repeats
requests instead. An answer is in the store, with its cost, before it is delivered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

from tlcr.chat.budget import Budget
from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, Deliver, NoAnswer, Question
from tlcr.config.schema import EndpointConfig
from tlcr.credentials import SHORTEST_IN_ANSWERS, refuse_credentials, without_secrets
from tlcr.distribution import install_command
from tlcr.errors import BackendUnavailable, ConfigError, EndpointError
from tlcr.text.files import unicode_problem
from tlcr.training.interrupt import StopSignals

try:
    import openai
    from aiolimiter import AsyncLimiter
    from tenacity import (
        AsyncRetrying,
        RetryCallState,
        retry_if_exception_type,
        stop_after_attempt,
        wait_random_exponential,
    )
except ImportError as error:
    raise BackendUnavailable(f"an endpoint needs {error.name} ({error}): {install_command('openai')}") from error

logger = logging.getLogger(__name__)

__all__ = ["Endpoint"]

ResultT = TypeVar("ResultT")

FAILURES_IN_A_ROW = 10
"""So many failures in a row mean that the server is down or refuses all our requests."""
LONGEST_WAIT_S = 600.0
"""If a server asks to wait longer (a daily limit, say), the run ends."""
BACKOFF = wait_random_exponential(multiplier=1, max=60)
"""Seconds before a request is repeated: random, below 1, 2, 4, ... 60, or longer where the server asks for it."""
MOST_TOKENS = 2**31
"""A count above this is an error of the server: it would be stored, and paid for in the caps."""
REFUSED_BY_THE_ACCOUNT = (401, 402, 404)
"""Statuses about key, credit, address or model name: every request would fail the same way."""


class Endpoint:
    """A ``ChatModel`` behind a server. ``cfg.model`` must be set."""

    def __init__(self, cfg: EndpointConfig, store: AnswerStore) -> None:
        self._cfg, self._store = cfg, store
        self._extra: dict[str, Any] = json.loads(cfg.extra_body) if cfg.extra_body else {}
        self.takes_schema = True
        self._budget = Budget(cfg, store)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Name and further fields. Not the address: the same model at another port gives the same answers."""
        return {"endpoint": self._cfg.model, "extra_body": self._extra}

    @property
    def spent(self) -> float | None:
        return self._budget.spent

    def answer_all(self, questions: Sequence[Question], deliver: Deliver) -> None:
        """See ``ChatModel``.

        Args:
            questions: the questions.
            deliver: takes the number of a question and its answer.

        Raises:
            ConfigError: there is no API key, and no ``base_url`` of a server that may need none.
            BudgetExhausted: a cap is reached. Requests under way have been delivered.
            EndpointError: the server refuses the account, or ``FAILURES_IN_A_ROW`` questions failed.
        """
        with StopSignals() as signals:
            end = _run(self._answer_all(questions, deliver, signals))
        if end is not None:
            raise end

    async def _answer_all(
        self, questions: Sequence[Question], deliver: Deliver, signals: StopSignals
    ) -> BaseException | None:
        refuse_credentials("OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL"), self._cfg.key_variable)
        self._budget = Budget(self._cfg, self._store)
        async with openai.AsyncOpenAI(
            api_key=self._key(), base_url=self._cfg.base_url, timeout=self._cfg.timeout, max_retries=0
        ) as client:
            return await _Session(self, client, self._cfg, self._budget, signals).answer_all(questions, deliver)

    def _key(self) -> str:
        if self._cfg.lacks_key():
            raise ConfigError(
                f"the environment variable {self._cfg.key_variable} is not set; put the API key there, or name another "
                "variable in endpoint.key_variable, or a server without keys in endpoint.base_url"
            )
        return os.environ.get(self._cfg.key_variable) or "none"  # the client requires one

    def without_key(self, text: object) -> str:
        """What the server, or an error about it, says, without the key that it was sent."""
        return without_secrets(str(text), os.environ.get(self._cfg.key_variable))

    def answer_without_key(self, text: str, question: Question) -> str:
        """The text of an answer, which is data: a key that is a word stays in it.

        Servers without keys are given one such as "ollama". A key is a word where the question has it too, or where it
        is as short as words are (``SHORTEST_IN_ANSWERS``).
        """
        key = os.environ.get(self._cfg.key_variable) or ""
        if len(key) < SHORTEST_IN_ANSWERS or any(key in message.content for message in question.messages):
            return text
        return self.without_key(text)

    def fields(self, question: Question, *, schema: bool) -> dict[str, Any]:
        """The request's keyword arguments."""
        fields: dict[str, Any] = {
            "model": self._cfg.model,
            "messages": [asdict(message) for message in question.messages],
            self._cfg.length_field: question.max_new_tokens,
        }
        if question.temperature is not None:
            fields["temperature"] = question.temperature
        if question.top_p < 1:
            fields["top_p"] = question.top_p
        if schema and question.schema is not None:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": question.schema["title"], "strict": True, "schema": dict(question.schema)},
            }
        if self._extra:
            fields["extra_body"] = self._extra
        return fields


class _Transient(Exception):
    """A request failed for a temporary reason. retry_after: seconds that the server asks us to wait."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _Refused(Exception):
    """The server will always refuse this request."""


class _Stopped(Exception):
    """The run ended before this question was sent."""


class _Session:
    """One run of the event loop. ``_end`` keeps the first reason to end it: from then on no request is
    sent, but requests under way are waited for, because they will be billed."""

    def __init__(
        self,
        endpoint: Endpoint,
        client: openai.AsyncOpenAI,
        cfg: EndpointConfig,
        budget: Budget,
        signals: StopSignals,
    ) -> None:
        self._endpoint, self._client, self._cfg, self._budget, self._signals = endpoint, client, cfg, budget, signals
        # One token in the bucket: requests are evenly spaced, so that no minute has more than allowed.
        self._requests = AsyncLimiter(1, 60 / cfg.requests_per_minute) if cfg.requests_per_minute else None
        self._tokens = AsyncLimiter(cfg.tokens_per_minute, 60) if cfg.tokens_per_minute else None
        self._closed_until = 0.0
        self._end: BaseException | None = None
        self._ended = asyncio.Event()
        self._answered = self._failures = 0
        self._said_that_it_repeats = False

    async def answer_all(self, questions: Sequence[Question], deliver: Deliver) -> BaseException | None:
        """Returns the reason for an early end; None where every question was asked."""
        waiting = iter(enumerate(questions))

        async def work() -> None:
            for index, question in waiting:
                try:
                    deliver(index, self._counted(await self._answer(question)))
                except _Stopped:
                    return
                except Exception as error:
                    self._end_with(error)
                    raise
                if self._ended.is_set():
                    return

        watcher = asyncio.create_task(self._watch())
        workers = (work() for _ in range(min(self._cfg.concurrency, len(questions))))
        await asyncio.gather(*workers, return_exceptions=True)  # the first of which is the end of the session
        watcher.cancel()
        return self._end

    async def _watch(self) -> None:
        while not self._signals.received():
            await asyncio.sleep(0.1)
        self._end_with(KeyboardInterrupt("told to stop; what was answered is kept"))

    def _end_with(self, error: BaseException) -> None:
        self._end = self._end or error
        self._ended.set()

    def _counted(self, answer: Answer | NoAnswer) -> Answer | NoAnswer:
        """Ends the session after too many failures in a row. Refusals of single requests do not count once the server
        has answered others: some filters refuse many."""
        if isinstance(answer, Answer):
            self._answered, self._failures = self._answered + 1, 0
        elif not (answer.final and self._answered):
            self._failures += 1
            if self._failures >= FAILURES_IN_A_ROW:
                self._end_with(
                    EndpointError(
                        f"{self._failures} questions in a row got no answer from {self._client.base_url}, the last "
                        f"because: {answer.reason}; see to the server or the settings and start again: what was "
                        "answered is kept"
                    )
                )
        return answer

    async def _answer(self, question: Question) -> Answer | NoAnswer:
        again = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            stop=stop_after_attempt(self._cfg.retries + 1),
            wait=_wait,
            sleep=self._pause,
            before_sleep=self._say_that_it_repeats,
            reraise=True,
        )
        try:
            return await again(self._attempt, question)
        except _Transient as error:
            return NoAnswer(f"{error} ({self._cfg.retries + 1} times)", final=False)
        except _Refused as error:
            return NoAnswer(str(error), final=True)

    def _say_that_it_repeats(self, state: RetryCallState) -> None:
        """Once: a server that is not there shows only in minutes, when all attempts at many questions have failed."""
        if self._said_that_it_repeats or state.outcome is None:
            return
        self._said_that_it_repeats = True
        logger.warning(
            "%s gave no answer: %s; such a request is repeated up to %d times, with longer and longer waits",
            self._client.base_url,
            state.outcome.exception(),
            self._cfg.retries,
        )

    async def _pause(self, seconds: float) -> None:
        """Sleeps, but not beyond the end of the session."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise _Stopped

    async def _attempt(self, question: Question) -> Answer:
        """One request; a second one without the schema where the server refuses the schema."""
        if self._endpoint.takes_schema and question.schema is not None:
            try:
                return await self._request(question, schema=True)
            except _Refused:
                answer = await self._request(question, schema=False)
                self._endpoint.takes_schema = False
                return answer
        return await self._request(question, schema=False)

    async def _request(self, question: Question, *, schema: bool) -> Answer:
        await self._turn(question)
        reservation = await self._budget.reserve(question.key(self._endpoint.identity), question)
        if self._ended.is_set():
            await self._budget.give_back(reservation)
            raise _Stopped
        try:
            # The client's time-out restarts with every byte; this one does not.
            completion = await asyncio.wait_for(
                self._client.chat.completions.create(**self._endpoint.fields(question, schema=schema)),
                self._cfg.timeout,
            )
            answer = _read(completion)
            answer = replace(answer, text=self._endpoint.answer_without_key(answer.text, question))
        except openai.APIStatusError as error:
            await self._budget.settle(reservation, billed=False)
            raise self._sorted(error) from error
        except (asyncio.TimeoutError, openai.APITimeoutError) as error:
            await self._budget.settle(reservation, billed=True)
            raise _Transient(f"no answer within {self._cfg.timeout:g} s") from error
        except openai.APIConnectionError as error:
            await self._budget.settle(reservation, billed=_was_sent(error))
            why = self._endpoint.without_key(error.__cause__ or error)
            raise _Transient(f"the connection failed: {why}") from error
        # RecursionError: JSON that is nested a hundred thousand levels deep
        except (openai.APIResponseValidationError, ValueError, RecursionError) as error:
            await self._budget.settle(reservation, billed=True)
            raise _Transient(f"the response is no chat completion: {self._endpoint.without_key(error)}") from error
        await self._budget.settle(reservation, billed=True, answer=answer)
        return answer

    async def _turn(self, question: Question) -> None:
        """Waits until the rate limits and the server's last wait request allow one more request."""
        while (seconds := self._closed_until - time.monotonic()) > 0:
            await self._pause(seconds)
        if self._requests is not None:
            await self._unless_ended(self._requests.acquire())
        if self._tokens is not None:
            tokens = question.prompt_tokens_estimate + question.max_new_tokens
            await self._unless_ended(self._tokens.acquire(min(tokens, self._tokens.max_rate)))
        if self._ended.is_set():
            raise _Stopped

    async def _unless_ended(self, waiting: Coroutine[Any, Any, None]) -> None:
        first = asyncio.ensure_future(waiting)
        end = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({first, end}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            end.cancel()
        if not first.done():
            first.cancel()
            raise _Stopped
        first.result()

    def _sorted(self, error: openai.APIStatusError) -> Exception:
        """What an HTTP status means: the end of the run, a request to drop, or one to repeat."""
        reason = self._endpoint.without_key(error.message)[:300]  # which may be a whole page
        out_of_credit = error.code == "insufficient_quota"
        if error.status_code in REFUSED_BY_THE_ACCOUNT or out_of_credit:
            return EndpointError(
                f"{self._client.base_url} refuses: {reason}; check endpoint.model, base_url, the key in "
                f"{self._cfg.key_variable} and your credit. What was answered is kept"
            )
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            seconds = _retry_after(error.response.headers)
            if seconds is not None and seconds > LONGEST_WAIT_S:
                return EndpointError(
                    f"{self._client.base_url} asks to wait for {seconds:.0f} s ({reason}); start again then: what "
                    "was answered is kept"
                )
            if seconds is not None:
                self._closed_until = max(self._closed_until, time.monotonic() + seconds)
            return _Transient(reason, seconds)
        return _Refused(reason)


def _run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as beside:  # a notebook already runs an event loop, which cannot run a second one
        return beside.submit(asyncio.run, work).result()


def _wait(state: RetryCallState) -> float:
    """The wait that the server asks for, but at least the backoff: some servers always ask for 0 seconds."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, _Transient) else None
    return max(asked or 0.0, BACKOFF(state))


def _was_sent(error: openai.APIConnectionError) -> bool:
    """A connection that failed to open costs nothing; after one that broke, the server may have answered."""
    # By name: the client uses httpx or its successor, and both have this name.
    return type(error.__cause__).__name__ != "ConnectError"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait: a number, or a date; None if it is unreadable."""
    if (value := headers.get("retry-after")) is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _read(completion: object) -> Answer:
    """The answer in a response. Raises ValueError if it is not a chat completion: the client does not check this."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"no choices in {str(completion)[:200]!r}")
    choice = choices[0]
    message = getattr(choice, "message", None)
    refusal = getattr(message, "refusal", None)
    content = getattr(message, "content", None)
    if not isinstance(content, str) and not refusal and getattr(choice, "finish_reason", None) is None:
        raise ValueError(f"no text in the first choice: {str(choice)[:200]!r}")
    text = content if isinstance(content, str) else str(refusal or "")
    if (problem := unicode_problem(text)) is not None:
        raise ValueError(f"the text of the first choice {problem}")
    usage = getattr(completion, "usage", None)
    return Answer(
        text=text,
        finish=_finish(choice.finish_reason, refusal),
        prompt_tokens=_count(usage, "prompt_tokens"),
        answer_tokens=_count(usage, "completion_tokens"),
    )


def _finish(reason: object, refusal: object) -> Literal["stop", "length", "refusal"]:
    if refusal or reason == "content_filter":
        return "refusal"
    return "length" if reason == "length" else "stop"


def _count(usage: object, name: str) -> int | None:
    """The tokens that the server reports; None where it reports none, or what no answer can have."""
    value = getattr(usage, name, None)
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None
