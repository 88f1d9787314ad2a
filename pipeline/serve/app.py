"""The server's addresses: OpenAI's chat completions for any engines, and a page to try them."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from pipeline.errors import PipelineError, ResourceError
from pipeline.serve.engine import Busy, Engine, Piece, TooLong, Unsupported
from pipeline.serve.guard import Door, Guard
from pipeline.serve.hybrid.manager import Manager, Refused
from pipeline.serve.metrics import Metrics, Reading
from pipeline.serve.wire import END, Answer, ChatRequest, error, event

_PAGE = Path(__file__).with_name("page")
_FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_PUBLIC = frozenset([*_FILES, "/health"])
_GONE = 499  # nginx's status for a client that closed the connection
_log = logging.getLogger(__name__)


class _Gone(Exception):
    """The client closed the connection."""


def build(engines: Mapping[str, Engine], door: Door, gauges: Mapping[str, Reading] = MappingProxyType({})) -> FastAPI:
    """The application that serves `engines`, by the ids that requests name; `gauges` are shown in /metrics."""
    app = FastAPI(title="Bundles behind an OpenAI-compatible API", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, door=door, public=_PUBLIC)
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http)  # type: ignore[arg-type]
    metrics, started = Metrics(gauges), int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        known = body.model in engines
        response = await _chat(request, body, engines[body.model], metrics) if known else _unknown(body.model, engines)
        if not isinstance(response, StreamingResponse):
            metrics.requests.labels(body.model if known else "unknown", response.status_code).inc()
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, started) for name in engines]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return _model(name, started) if name in engines else _unknown(name, engines)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    for path, file in _FILES.items():
        app.add_api_route(path, lambda file=file: FileResponse(_PAGE / file), methods=["GET"], response_model=None)
    return app


async def _chat(request: Request, body: ChatRequest, engine: Engine, metrics: Metrics) -> Response:
    try:
        stream = _stream(engine, body)
    except Unsupported as problem:
        return _failed(problem)
    pieces = attended(request, metrics.watched(body.model, stream), stream)
    try:
        if not body.stream:
            async with aclosing(pieces):
                written = [piece async for piece in pieces]
            return JSONResponse(Answer(body).whole(written), headers=_who(written[-1]))
        first = await anext(pieces)
    except _Gone:
        return Response(status_code=_GONE)
    except Exception as problem:
        return _failed(problem)
    headers = {"cache-control": "no-store"} | _who(first)
    return StreamingResponse(_events(body, first, pieces, metrics), media_type="text/event-stream", headers=headers)


def _who(piece: Piece) -> dict[str, str]:
    """A header that says who answered, where the engine chose."""
    return {"x-origin": json.dumps(asdict(piece.origin))} if piece.origin else {}


def _stream(engine: Engine, body: ChatRequest) -> AsyncGenerator[Piece, None]:
    """The engine's answer. Raises Unsupported for a situation where nobody chooses who answers."""
    asked = body.plain(), body.settings(), body.x_tags
    if body.x_situation is None:
        return engine.stream(*asked)
    if not isinstance(engine, Manager):
        raise Unsupported("x_situation", "x_situation is not supported without --hybrid: it would be ignored")
    return engine.stream(*asked, body.x_situation)


async def _events(
    body: ChatRequest, first: Piece, pieces: AsyncGenerator[Piece, None], metrics: Metrics
) -> AsyncIterator[str]:
    """The rest of a stream that has begun: what fails now can only be said in it."""
    answer, status = Answer(body), _GONE
    try:
        async with aclosing(pieces):
            yield answer.chunk(first, True)
            async for piece in pieces:
                if text := answer.chunk(piece, False):
                    yield text
        status = 200
        yield END
    except _Gone:
        pass
    except Exception as problem:
        failed = _failed(problem)
        status = failed.status_code
        yield event(json.loads(bytes(failed.body)))
    finally:
        metrics.requests.labels(body.model, status).inc()


async def attended(
    request: Request, pieces: AsyncIterator[Piece], stream: AsyncGenerator[Piece, None]
) -> AsyncGenerator[Piece, None]:
    """Pieces of `stream` while their reader is there. One that reads slowly does not hold the engine up.

    Raises _Gone when the client is, once the generation has been ended.
    """
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()  # as long as an answer, at most

    async def fill() -> None:
        try:
            async with aclosing(stream):
                async for piece in pieces:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as problem:
            queue.put_nowait(problem)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        filling.cancel()
        queue.put_nowait(_Gone())

    filling = asyncio.create_task(fill())
    watching = asyncio.create_task(watch())
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        for task in (filling, watching):
            task.cancel()
        await asyncio.gather(filling, watching, return_exceptions=True)


def _failed(problem: Exception) -> JSONResponse:
    """An engine's error as OpenAI would say it."""
    match problem:
        case Busy():
            headers = {"retry-after": str(math.ceil(problem.retry_after))}
            return JSONResponse(error(str(problem), "rate_limit_error", "queue_full"), 429, headers)
        case TooLong():
            body = error(str(problem), "invalid_request_error", "context_length_exceeded", "messages")
            return JSONResponse(body, 400)
        case Unsupported():
            status, code = (403, "refused_by_policy") if isinstance(problem, Refused) else (400, "unsupported_value")
            return JSONResponse(error(str(problem), "invalid_request_error", code, problem.parameter), status)
        case ResourceError():
            return JSONResponse(error(str(problem), "server_error", "out_of_resources"), 503)
        case PipelineError():
            _log.error("%s", problem)
            return JSONResponse(error(str(problem), "server_error", "engine_error"), 500)
    _log.error("a chat failed", exc_info=problem)
    return JSONResponse(error("the server failed; its log says how", "server_error", "internal_error"), 500)


def _unknown(name: str, engines: Mapping[str, Engine]) -> JSONResponse:
    message = f"there is no model {name!r}; served are {', '.join(engines)}"
    return JSONResponse(error(message, "invalid_request_error", "model_not_found", "model"), 404)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "pipeline"}


async def _invalid(_request: Request, problem: RequestValidationError) -> JSONResponse:
    first = problem.errors()[0]
    # Beside the names of fields and places in lists, a place may say which member of a union was tried.
    place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    parameter = None if first["type"] == "json_invalid" else ".".join(place) or None
    code, message = "invalid_value", f"{parameter}: {first['msg']}"
    if parameter is None:
        message = f"the body must be a JSON object, sent as application/json: {first['msg']}"
    elif first["type"] == "extra_forbidden":
        code, message = "unsupported_parameter", f"{parameter} is not supported: it would be ignored"
    return JSONResponse(error(message, "invalid_request_error", code, parameter), 400)


async def _http(_request: Request, problem: HTTPException) -> JSONResponse:
    return JSONResponse(error(problem.detail, "invalid_request_error"), problem.status_code, problem.headers)
