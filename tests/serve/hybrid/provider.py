"""An OpenAI-compatible service on loopback that does what a test scripts, and records all that reaches it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.loopback import Handler, serving

KEY = "sk-secret-of-the-test"


def event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One chunk of an answer as it goes over the wire."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "big", "choices": [choice]}
    return f"data: {json.dumps(chunk | more)}\n\n".encode()


def usage(prompt: int, completion: int) -> bytes:
    """The last chunk, which has no choice."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return event(choices=[], usage=counts)


DONE = b"data: [DONE]\n\n"
Step = bytes | float
"""Bytes are sent, seconds are waited."""


@dataclass(frozen=True)
class Script:
    """What one request gets: a status with headers, then steps, then a connection that ends or breaks."""

    steps: Sequence[Step] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(*words: str, said: tuple[int, int] | None = None) -> Script:
    """A whole answer, with `said` as its usage."""
    counted = [usage(*said)] if said else []
    return Script([event(""), *map(event, words), event(finish="stop"), *counted, DONE])


@dataclass
class Provider:
    """Scripts are used up in order of arrival, the last one again and again; or `choose` picks one by the request."""

    scripts: list[Script] = field(default_factory=list)
    choose: Callable[[Any], Script] | None = None
    url: str = ""
    requests: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, request: Any, headers: dict[str, str]) -> Script:
        """Record a request; its script."""
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
            if self.choose:
                return self.choose(request)
            return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]


class _Completions(Handler):
    def do_POST(self) -> None:
        body = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(body) < length:
            return  # whoever asked has gone
        script = self.state.next(json.loads(body), {name.lower(): value for name, value in self.headers.items()})
        self.send_response(script.status)
        for name, value in (
            {"Content-Type": "text/event-stream", "Connection": "close"} | dict(script.headers)
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        try:
            for step in script.steps:
                if isinstance(step, bytes):
                    self.wfile.write(step)
                    self.wfile.flush()
                else:
                    time.sleep(step)
        except OSError:
            self.state.closed.set()


@contextmanager
def provider(*scripts: Script, choose: Callable[[Any], Script] | None = None) -> Iterator[Provider]:
    """A running service."""
    with serving(_Completions, Provider(list(scripts), choose)) as state:
        yield state
