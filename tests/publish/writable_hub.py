"""A Hub on loopback that can be written to: commits, LFS uploads and tags, as the real huggingface_hub asks."""

from __future__ import annotations

import base64
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import constants

from tests.checkpoint.hub_server import git_sha1, sha256
from tests.loopback import Handler, serving

REPO = "acme/demo-onnx"
LARGE = 10_000  # bytes; a larger file goes to LFS
TOKEN = "hf_secret"


@dataclass
class Hub:
    """One repository, commit by commit; the faults in force are changed while it runs."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = "0" * 40
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    loses: str | None = None  # the commit does not take this path
    status: tuple[str, int] | None = None  # requests whose path contains the first get the second
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.commits[self.head] = {".gitattributes": b"*.data filter=lfs\n"}

    def resolve(self, revision: str) -> str | None:
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, lines: list[dict[str, Any]]) -> str | None:
        """Apply a commit's lines; None if it was made on top of another than the head."""
        files = dict(self.commits[self.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value["parentCommit"] != self.head:
                return None
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
        files.pop(self.loses or "", None)
        self.head = f"{len(self.commits):040x}"
        self.commits[self.head] = files
        return self.head


class _Handler(Handler):
    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:  # noqa: PLR0911 (a table of addresses)
        hub, path = self.state, urlparse(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((method, path))
        if hub.status and hub.status[0] in path:
            return self._send(hub.status[1], {"error": "no"})
        if path.startswith("/lfs/"):
            return self._large(path, body)
        if method not in {"GET", "HEAD"} and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "who are you"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            return self._batch(json.loads(body))
        if path.startswith(f"/{REPO}/resolve/"):
            return self._file(*path.removeprefix(f"/{REPO}/resolve/").split("/", 1))
        if not path.startswith(f"/api/models/{REPO}"):
            return self._send(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        action, _, rest = path.removeprefix(f"/api/models/{REPO}/").partition("/")
        return getattr(self, f"_{action}")(rest, body)

    def _refs(self, rest: str, body: bytes) -> None:
        hub = self.state
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": to} for name, to in hub.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": hub.head}
        self._send(200, {"branches": [main], "converts": [], "tags": tags})

    def _revision(self, revision: str, body: bytes) -> None:
        commit = self.state.resolve(revision)
        if commit is None:
            return self._send(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, data in self.state.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if len(data) > LARGE:
                sibling |= {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
            siblings.append(sibling)
        return self._send(200, {"id": REPO, "sha": commit, "siblings": siblings, "tags": []})

    def _preupload(self, revision: str, body: bytes) -> None:
        files = self.state.commits[self.state.head]
        answer = []
        for item in json.loads(body)["files"]:
            there, large = files.get(item["path"]), item["size"] > LARGE
            oid = None if there is None else sha256(there) if large else git_sha1(there)
            mode = "lfs" if large else "regular"
            answer.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answer})

    def _batch(self, request: dict[str, Any]) -> None:
        hub, objects = self.state, []
        for item in request["objects"]:
            upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}, "verify": {"href": f"{hub.url}/lfs/verify"}}
            objects.append(item if item["oid"] in hub.lfs else item | {"actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _large(self, path: str, body: bytes) -> None:
        if path == "/lfs/verify":
            return self._send(200 if json.loads(body)["oid"] in self.state.lfs else 404, {})
        self.state.lfs[path.removeprefix("/lfs/")] = body
        return self._send(200, {})

    def _commit(self, revision: str, body: bytes) -> None:
        made = self.state.commit([json.loads(line) for line in body.splitlines()])
        if made is None:
            return self._send(412, {"error": "the head moved"})
        url = f"{constants.ENDPOINT}/{REPO}/commit/{made}"  # whose host the library compares with the one it knows
        return self._send(200, {"commitUrl": url, "commitOid": made})

    def _tag(self, revision: str, body: bytes) -> None:
        self.state.tags[json.loads(body)["tag"]] = revision
        self._send(200, {})

    def _file(self, revision: str, name: str) -> None:
        hub = self.state
        commit = hub.resolve(revision)
        data = hub.commits[commit or ""][name]
        headers = {"X-Repo-Commit": commit or "", "ETag": f'"{git_sha1(data)}"', "Content-Type": "text/plain"}
        self._send(200, data, headers)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send(status, {"Content-Type": "application/json"} | (headers or {}), body)


def serve() -> AbstractContextManager[Hub]:
    """An empty repository until the block ends."""
    return serving(_Handler, Hub())
