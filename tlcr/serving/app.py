"""The application: routes, and the way of a request from its body to its answer.

body -> JSON -> rows, within limits (protocols, reading) -> queue and model (batching) -> JSON
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import starlette
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path

from tlcr.models.discriminator import Opinion
from tlcr.serving.access import Access
from tlcr.serving.batching import Batcher
from tlcr.serving.limits import MIB, Bodies, Refused, drain, parse_json
from tlcr.serving.metrics import Metrics
from tlcr.serving.model import ServedModel
from tlcr.serving.protocols import ROUTES, Route
from tlcr.serving.reading import Reader, Reading, Row
from tlcr.serving.settings import ServerSettings

__all__ = ["make_app"]

logger = logging.getLogger("tlcr")

CLIENT_LEFT = 499
"""The status that logs and metrics have for a client that left before its answer (nginx's)."""


class Service:
    """One worker: the model, its queue, and what its routes share."""

    def __init__(self, settings: ServerSettings, model: ServedModel, token: str | None) -> None:
        self.settings, self.model = settings, model
        self.access, self.metrics = Access(token), Metrics()
        self.bodies = Bodies(max_bytes=settings.max_body_mib * MIB, seconds=settings.io_seconds)
        # tokens of the longest row: the model's positions, or the queue where the model knows no end
        longest = min(model.positions or settings.queue_tokens, settings.queue_tokens)
        self.reader = Reader(model.tokenizer, model.vocabulary, max_items=settings.max_items, longest_row=longest)
        # a tokenizer is not to be used by two threads at once
        self.reading = ThreadPoolExecutor(1, thread_name_prefix="tlcr-read")

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Starts the queue, and stops it after the last answer."""
        self.batcher = Batcher(
            self.model.opinions,
            self.metrics,
            batch_tokens=self.settings.batch_tokens,
            window_seconds=self.settings.window_ms / 1000,
            queue_tokens=self.settings.queue_tokens,
        )
        self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.stop()
            self.reading.shutdown(wait=False, cancel_futures=True)

    # ---- scoring

    async def score(self, request: Request) -> Response:
        """Any of ``ROUTES``."""
        route = ROUTES[request.scope["path"]]
        if self.batcher.held >= self.batcher.queue_tokens:
            await drain(request, self.settings.io_seconds)
            raise self.batcher.full()
        async with self.bodies.of(request) as raw:
            body = parse_json(raw)
            rows = await _while_connected(request, self._read(route, body, request.query_params))
            form = route.form(body)
        del raw, body  # a request that waits is its rows, which the queue counts
        opinions = await _while_connected(request, self.batcher.submit([row.encoded for row in rows]))
        self._require_finite(opinions)
        self.metrics.answers.inc(len(rows))
        self.metrics.tokens_scored.inc(sum(len(opinion.rewards_T) for opinion in opinions))
        answer = route.answer(self.model, form, rows, opinions)
        return Response(json.dumps(answer, separators=(",", ":")), media_type="application/json")

    async def _read(self, route: Route, body: Mapping[str, Any], query: Mapping[str, str]) -> list[Row]:
        """The rows of a request. Other requests are read in between, and a client that left is read no further."""
        reading = Reading(route.rows(self.reader, body, query), most_tokens=self.settings.queue_tokens)
        while await asyncio.get_running_loop().run_in_executor(self.reading, reading.go_on):
            pass
        return reading.rows

    def _require_finite(self, opinions: Sequence[Opinion]) -> None:
        for number, opinion in enumerate(opinions):
            if not bool(opinion.logits_TC.isfinite().all()):
                raise Refused(
                    500,
                    f"the discriminator {self.model.name!r} gives answer {number} logits that are not finite; its "
                    "weights are broken, or too large for its dtype",
                )

    # ---- the rest

    async def health(self, request: Request) -> Response:
        """200 while the worker takes requests."""
        works = self.batcher.works
        return JSONResponse({"status": "ok" if works else "not working"}, 200 if works else 503)

    async def info(self, request: Request) -> Response:
        """What clients have to know."""
        settings = self.settings
        facts = dict(self.model.facts())
        facts["max_tokens"] = self.reader.longest_row
        facts["versions"] |= {"starlette": starlette.__version__, "uvicorn": uvicorn.__version__}
        facts["limits"] = {
            "items": settings.max_items,
            "body_bytes": settings.max_body_mib * MIB,
            "request_tokens": settings.queue_tokens,
        }
        return JSONResponse(facts)

    async def figures(self, request: Request) -> Response:
        """The page of Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _while_connected(request: Request, work: Any) -> Any:
    """The result of ``work``, which is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Guard:
    """ASGI around the routes: the token before them, and the metrics of every request."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, began, status = Request(scope, receive), time.monotonic(), CLIENT_LEFT

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self.service.access.check(scope["path"], request.headers)
            except Refused:
                await drain(request, self.service.settings.io_seconds)
                raise
            await self.app(scope, receive, sent)
        except Refused as refused:
            await _refusal(refused)(scope, receive, sent)
        except ClientDisconnect:
            status = CLIENT_LEFT  # starlette has answered 500, which nobody was there to read
        finally:
            route = scope["path"] if scope["path"] in KNOWN else "other"
            self.service.metrics.requests.labels(route, status).inc()
            self.service.metrics.request_seconds.labels(route).observe(time.monotonic() - began)


KNOWN = (*ROUTES, "/health", "/v1/info", "/metrics")


def _refusal(refused: Refused) -> Response:
    headers = {}
    if refused.retry_after is not None:
        headers["retry-after"] = str(refused.retry_after)
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": " ".join(str(refused).split())}, refused.status, headers)


async def _refused(request: Request, error: Any) -> Response:
    return _refusal(error)


async def _no_route(request: Request, error: Any) -> Response:
    return _refusal(
        Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}; see docs/serving.md")
    )


async def _crashed(request: Request, error: Exception) -> Response:
    """The client hears the kind of error; uvicorn's log has it whole."""
    return _refusal(Refused(500, f"the server failed on this request with {type(error).__name__}; its log says where"))


def make_app(settings: ServerSettings, model: ServedModel, token: str | None) -> Any:
    """The ASGI application of one worker.

    Args:
        settings: its limits.
        model: the discriminator, loaded.
        token: what clients must send; None: nothing.

    Returns:
        An application for uvicorn.
    """
    service = Service(settings, model, token)
    app = Starlette(
        routes=[
            *(Path(path, service.score, methods=["POST"]) for path in ROUTES),
            Path("/health", service.health),
            Path("/v1/info", service.info),
            Path("/metrics", service.figures),
        ],
        lifespan=service.lifespan,
        exception_handlers={Refused: _refused, HTTPException: _no_route, Exception: _crashed},
    )
    return Guard(app, service)
