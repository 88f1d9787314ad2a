"""A web server over a folder, on loopback, that misbehaves as asked: what stands between a phone and its bundle."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tests.loopback import Handler, serving


@dataclass
class Request:
    """One request as the server saw it, and the body bytes that it answered with."""

    path: str
    start: int
    sent: int = 0


@dataclass
class Web:
    """The folder served and the faults in force; a test changes them while the server runs."""

    root: Path
    cut: Callable[[], int] | None = None  # break every answer after so many bytes
    statuses: list[int] = field(default_factory=list)  # answer these first
    ranges: bool = True  # honour Range
    corrupt: set[str] = field(default_factory=set)  # flip a bit of these paths
    endless: set[str] = field(default_factory=set)  # send these paths again and again, without a length
    headers: dict[str, str] = field(default_factory=dict)  # these besides, or in place of the right ones
    redirect: str | None = None  # send everyone there
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def to(self, part: str) -> list[Request]:
        """Requests whose path contains `part`."""
        return [request for request in self.requests if part in request.path]


class _Handler(Handler):
    def do_GET(self) -> None:  # noqa: PLR0911 (one answer for each fault)
        web, path = self.state, self.path.lstrip("/")
        start = self.start
        self.seen = Request(path, start)
        web.requests.append(self.seen)
        if web.statuses:
            return self._answer(web.statuses.pop(0), {"Retry-After": "0"}, b"")
        if web.redirect:
            return self._answer(302, {"Location": web.redirect}, b"")
        if not (web.root / path).is_file():
            return self._answer(404, {}, b"")
        data = bytearray((web.root / path).read_bytes())
        if path in web.corrupt:
            data[len(data) // 2] ^= 1
        if path in web.endless:
            return self._endless(bytes(data))
        if web.ranges and start >= len(data):
            return self._answer(416, {}, b"")
        if not web.ranges or not start:
            return self._answer(200, {}, bytes(data))
        return self._answer(206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, bytes(data[start:]))

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        web = self.state
        self.seen.sent = self.send(status, headers | web.headers, body, web.cut() if web.cut else None)

    def _endless(self, data: bytes) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(data)
                self.seen.sent += len(data)
        except OSError:  # the client has what it wants
            pass


def serve(root: Path) -> AbstractContextManager[Web]:
    """Serve `root` until the block ends."""
    return serving(_Handler, Web(root))
