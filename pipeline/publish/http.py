"""Reading a place of publication through a web server or a CDN: plain GET with Range, over https or http."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests import exceptions

from pipeline.errors import BundleError
from pipeline.publish.places import Body, Interrupted, Missing, shown

TIMEOUT_SECONDS = (10.0, 30.0)  # to connect; between two pieces of an answer
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_ABSENT = {404, 410}
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class _Session(requests.Session):
    def get_redirect_target(self, response: requests.Response) -> str | None:
        """Refuses to leave https: whoever can make us do that can read, and delay, what we fetch."""
        target = super().get_redirect_target(response)
        if target and urlsplit(response.url).scheme == "https":
            there = urljoin(response.url, target)
            if urlsplit(there).scheme != "https":
                raise BundleError(f"{shown(response.url)} redirects to {shown(there)}, which is not https: refused.")
        return target


class Http:
    """A place behind `address`. Proxies, certificates and .netrc are those of the environment."""

    def __init__(self, address: str) -> None:
        if urlsplit(address).query or urlsplit(address).fragment:
            raise BundleError(f"{shown(address)}: the address of a place ends with its path, without ? and #.")
        self.base, self.shown = address.rstrip("/"), shown(address).rstrip("/")
        self.session = _Session()

    @contextmanager
    def open(self, path: str, start: int) -> Iterator[Body]:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            response = self.session.get(f"{self.base}/{path}", headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
        except exceptions.SSLError:
            raise BundleError(f"{self.shown}: its certificate is not trusted; check address and clock.") from None
        except (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError) as error:
            raise Interrupted(type(error).__name__) from None
        except exceptions.RequestException as error:  # no address, too many redirects, another scheme, …
            raise BundleError(f"{self.shown}/{path} cannot be asked for ({type(error).__name__}).") from None
        with response:
            yield _body(response, f"{self.shown}/{path}", start)


def _body(response: requests.Response, where: str, start: int) -> Body:
    status, headers = response.status_code, response.headers
    if status in _PASSING:
        raise Interrupted(f"HTTP {status}", response.raw)
    if status in _ABSENT:
        raise Missing(f"{where} is not there (HTTP {status}).")
    if status == 416:
        raise BundleError(f"{where} ends before byte {start:,}: its copy is shorter than it should be.")
    if status not in (200, 206):
        raise BundleError(f"{where}: HTTP {status}. Check the address and whether it needs a login.")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise BundleError(f"{where} arrives as {headers['Content-Encoding']!a}; turn compression off there.")
    begin, total = 0, headers.get("Content-Length", "")
    if status == 206:
        told = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if told is None or int(told[1]) != start:
            raise BundleError(f"{where}: asked for byte {start:,} on, got {headers.get('Content-Range')!a}.")
        begin, total = start, told[2]

    def read(count: int) -> bytes:
        try:
            return response.raw.read1(count, decode_content=False)  # what has come, so that a broken transfer keeps it
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Interrupted(type(error).__name__) from None

    return Body(begin, int(total) if total.isascii() and total.isdigit() else None, read)
