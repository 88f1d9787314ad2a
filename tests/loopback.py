"""A web server on loopback for tests: whatever a handler answers, over one state that the test changes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, TypeVar


class _Addressed(Protocol):
    url: str


State = TypeVar("State", bound=_Addressed)


class Handler(BaseHTTPRequestHandler):
    """Base of handlers: HTTP/1.1 without logs or delays, with `state` at hand."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def state(self) -> Any:
        """What `serving` was given."""
        return self.server.state  # type: ignore[attr-defined]

    @property
    def start(self) -> int:
        """The first byte that is asked for."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])

    @property
    def end(self) -> int | None:
        """Behind the last byte that is asked for, if one is named."""
        last = self.headers.get("Range", "bytes=0-").rpartition("-")[2]
        return int(last) + 1 if last else None

    def send(self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None) -> int:
        """Answer; break the connection after `cut` bytes of the body. Returns how many bytes of it were sent."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return 0
        part = body if cut is None else body[: max(cut, 0)]
        self.wfile.write(part)
        self.close_connection |= cut is not None and len(part) < len(body)
        return len(part)


@contextmanager
def serving(handler: type[Handler], state: State) -> Iterator[State]:
    """Run a server until the block ends; `state.url` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.state = state  # type: ignore[attr-defined]
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
