"""A hub on loopback: enough of the Hub's HTTP interface for the real huggingface_hub, with faults on request.

Large files are redirected to a second path as the Hub redirects to its CDN, with `X-Linked-ETag` and `X-Linked-Size`.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from tests.loopback import Handler, serving

REPO = "acme/tiny"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    """One request as the server saw it, with the number of body bytes it sent back."""

    method: str
    path: str
    start: int
    authorization: str | None
    sent: int = 0


@dataclass
class Hub:
    """The repository served and the faults in force; tests change both while the server runs."""

    files: dict[str, bytes]
    dataset: bool = False  # served as a dataset repository, which has addresses of its own
    card: dict[str, Any] = field(default_factory=lambda: {"license": "apache-2.0"})
    served: dict[str, bytes] = field(default_factory=dict)  # other bytes than the declared ones
    linked_size: dict[str, int] = field(default_factory=dict)  # another size in HEAD than the declared one
    drop_at: dict[str, int] = field(default_factory=dict)  # break the connection after this many bytes …
    drops: int = 0  # … this many times
    api_fault: tuple[int, str | None] | None = None  # status and X-Error-Code of the model's description
    file_fault: tuple[int, str | None] | None = None  # the same for every file
    token: str | None = None  # if set, files need it
    api_body: bytes | None = None  # answer this instead of the description
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".parquet"))

    def description(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if self.lfs(name):
                sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": REPO, "sha": REVISION, "siblings": siblings, "cardData": self.card, "tags": []}

    def transfers(self, name: str) -> list[Request]:
        """The GET requests that carried `name`'s bytes."""
        ends = (f"/resolve/{REVISION}/{name}", f"/cdn/{name}")
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(ends)]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(Handler):
    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.state, urlparse(self.path).path
        start = self.start
        self.seen = Request(self.command, path, start, self.headers.get("Authorization"))
        hub.requests.append(self.seen)
        if path.startswith(f"/api/{'datasets' if hub.dataset else 'models'}/"):
            self._describe(hub, path)
        elif path.startswith("/cdn/"):
            self._send_file(hub, path.removeprefix("/cdn/"), start)
        else:
            self._resolve(hub, path, start)

    def _describe(self, hub: Hub, path: str) -> None:
        if hub.api_fault:
            return self._fail(*hub.api_fault)
        if f"/{REPO}/" not in path:
            return self._fail(404, "RepoNotFound")
        if not path.endswith((f"/revision/{REVISION}", "/revision/main")):
            return self._fail(404, "RevisionNotFound")
        body = hub.api_body if hub.api_body is not None else json.dumps(hub.description()).encode()
        return self._send(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, hub: Hub, path: str, start: int) -> None:
        name = path.removeprefix(f"/{'datasets/' * hub.dataset}{REPO}/resolve/{REVISION}/")
        if hub.file_fault:
            return self._fail(*hub.file_fault)
        if hub.token and self.seen.authorization != f"Bearer {hub.token}":
            return self._fail(401 if self.seen.authorization is None else 403, "GatedRepo")
        if name not in hub.files:
            return self._fail(404, "EntryNotFound")
        if not hub.lfs(name):
            return self._send_file(hub, name, start)
        size = hub.linked_size.get(name, len(hub.files[name]))
        return self._send(
            302,
            {
                "Location": f"{hub.url}/cdn/{name}",
                "X-Repo-Commit": REVISION,
                "X-Linked-ETag": f'"{sha256(hub.files[name])}"',
                "X-Linked-Size": str(size),
            },
            b"",
        )

    def _send_file(self, hub: Hub, name: str, start: int) -> None:
        data = hub.served.get(name, hub.files[name])
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{git_sha1(hub.files[name])}"', "Accept-Ranges": "bytes"}
        if start >= len(data) > 0:
            return self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        data = data[: self.end]
        ranged = bool(start) or self.end is not None
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        drop = hub.drop_at.get(name)
        if self.command == "GET" and drop is not None and hub.drops > 0:
            hub.drops -= 1
            return self._send(206 if ranged else 200, headers, data[start:], cut=drop - start)
        return self._send(206 if ranged else 200, headers, data[start:])

    def _fail(self, status: int, code: str | None) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.seen.sent = self.send(status, headers, body, cut)


def serve(hub: Hub) -> AbstractContextManager[Hub]:
    """Run `hub` until the block ends; `hub.url` is its endpoint."""
    return serving(_Handler, hub)
