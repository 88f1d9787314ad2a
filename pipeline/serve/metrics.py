"""What Prometheus reads: requests, tokens, times, the line, memory."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.machine import resident_memory
from pipeline.serve.engine import Piece

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

Reading = tuple[str, Callable[[], float]]
"""What a gauge says, and the function that reads it when Prometheus asks."""


class Metrics:
    """One server's figures."""

    def __init__(self, gauges: Mapping[str, Reading]):
        """`gauges`: by name, more to show."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pipeline_requests", "Chats asked, by status; 499: the client went.", ["model", "status"], registry=registry
        )
        self._prompt = Counter(
            "pipeline_prompt_tokens", "Tokens of prompts answered to the end.", ["model"], registry=registry
        )
        self._completion = Counter(
            "pipeline_completion_tokens", "Tokens of answers, those cut off too.", ["model"], registry=registry
        )
        self._first, self._whole = (
            Histogram(f"pipeline_{name}_seconds", text, ["model"], registry=registry, buckets=_SECONDS)
            for name, text in (
                ("first_piece", "From a request to its first token, the line included."),
                ("answer", "From a request to the end of its answer."),
            )
        )
        private = ("Bytes of memory that no file backs.", lambda: float(resident_memory()[0]))
        for name, (text, read) in {**gauges, "private_bytes": private}.items():
            Gauge(f"pipeline_{name}", text, registry=registry).set_function(read)

    async def watched(self, model: str, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """The same pieces, counted."""
        start, first = time.monotonic(), True
        async for piece in pieces:
            if first:
                self._first.labels(model).observe(time.monotonic() - start)
            first = False
            self._completion.labels(model).inc()
            if piece.finish_reason:
                self._whole.labels(model).observe(time.monotonic() - start)
                self._prompt.labels(model).inc(piece.usage.prompt if piece.usage else 0)
            yield piece

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)
