"""Who may ask, and how much: checked before a request reaches any handler.

On loopback the Host header must be loopback's, or a web page could have its own name point here and read answers (DNS
rebinding). Pages of other origins are refused everywhere, and no CORS header is ever sent. Bound elsewhere, everything
but the page's files and /health asks for the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import ConfigError
from pipeline.serve.wire import error

TOKEN = "PIPELINE_SERVE_TOKEN"
_SHORTEST = 16  # characters of a token
_SAFE_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine and nobody else's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Door:
    """Where a server listens and whom it lets in. `token`: None lets in everybody on this machine."""

    host: str
    token: str | None
    body_bytes: int = 1 << 20

    @classmethod
    def at(cls, host: str) -> Door:
        """The door of `host`, its token from the environment.

        Raises ConfigError where there must be one, or it is too short to be one.
        """
        token = os.environ.get(TOKEN)
        remedy = f"Set it to a secret: export {TOKEN}=$(openssl rand -hex 32)"
        if token is not None and len(token) < _SHORTEST:
            raise ConfigError(f"{TOKEN} has {len(token)} characters, and {_SHORTEST} are the least. {remedy}")
        if token is None and not is_loopback(host):
            raise ConfigError(f"on {host} others reach the server, and {TOKEN} is not set. {remedy}")
        return cls(host, token)

    def refusal(self, headers: Headers, path: str, public: frozenset[str]) -> JSONResponse | None:
        """What is answered to a request that may not enter."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = urlsplit(f"//{host}").hostname or ""
        if is_loopback(self.host) and not is_loopback(name):
            return _no(403, f"the host {name!r} is not this machine: use http://127.0.0.1", "host_not_allowed")
        if origin is not None and urlsplit(origin).netloc != host:
            return _no(403, "pages of other origins may not ask", "origin_not_allowed")
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.token and path not in public and not hmac.compare_digest(given, self.token.encode()):
            refused = _no(401, f"give the server's {TOKEN} as the API key", "invalid_api_key")
            refused.headers["www-authenticate"] = "Bearer"
            return refused
        if int(headers.get("content-length") or 0) > self.body_bytes:
            return _no(413, _too_large(self.body_bytes), "request_too_large")
        return None


class Guard:
    """ASGI middleware that opens a `Door`; `public` paths need no token."""

    def __init__(self, app: ASGIApp, door: Door, public: frozenset[str]):
        self._app, self._door, self._public = app, door, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # uvicorn refuses what nobody accepts
        try:
            refused = self._door.refusal(Headers(scope=scope), scope["path"], self._public)
        except ValueError:
            refused = _no(400, "a header cannot be read", "invalid_header")
        app = refused or self._app
        return await app(scope, self._limited(receive), _safely(send))

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not state their size."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._door.body_bytes:
                raise HTTPException(413, _too_large(self._door.body_bytes))
            return message

        return limited


def _safely(send: Send) -> Send:
    async def safely(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_SAFE_HEADERS.items()]
        await send(message)

    return safely


def _no(status: int, message: str, code: str) -> JSONResponse:
    return JSONResponse(error(message, "invalid_request_error", code), status)


def _too_large(most: int) -> str:
    return f"a request may have {most:,} bytes"
