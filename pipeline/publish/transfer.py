"""A file's bytes over as many requests as it takes: pauses grow, and begin anew when something arrived."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from pipeline.errors import BundleError
from pipeline.publish.places import Body, Interrupted, Reader

CHUNK = 1 << 18  # bytes
ATTEMPTS = 8  # requests in a row that bring nothing new
BACKOFF_SECONDS = 0.5  # doubled from the second attempt on
MOST_SECONDS = 60  # between two attempts, also where a server asks for more
_LOG = logging.getLogger(__name__)


def _patience() -> Retry:
    return Retry(
        total=ATTEMPTS - 1,
        backoff_factor=BACKOFF_SECONDS,
        backoff_jitter=BACKOFF_SECONDS,
        backoff_max=MOST_SECONDS,
        retry_after_max=MOST_SECONDS,
    )


def _pause(patience: Retry, broken: Interrupted, where: str, position: int) -> Retry:
    try:
        patience = patience.increment(error=broken)
    except MaxRetryError:
        failed = f"{ATTEMPTS} attempts in a row brought nothing beyond byte {position:,}; the last: {broken}"
        remedy = "What arrived is kept: run the same command again and it goes on there."
        raise BundleError(f"{where}: {failed}. {remedy}") from None
    _LOG.info("%s: %s at byte %s; going on", where, broken, f"{position:,}")
    patience.sleep(broken.response)
    return patience


def _skip(body: Body, count: int) -> None:
    """Read past bytes that are here already: a server without Range begins at the first one again."""
    while count > 0:
        chunk = body.read(min(CHUNK, count))
        if not chunk:
            raise Interrupted("the answer ended early")
        count -= len(chunk)


def stream(reader: Reader, path: str, start: int, size: int | None, limit: int | None = None) -> Iterator[bytes]:
    """The bytes of `path` from `start` to `size`, never more, whatever the server sends; None: to the file's end.

    `limit` bounds a file whose size is not known.

    Raises:
        BundleError: not there, longer than `limit`, or `ATTEMPTS` requests in a row brought nothing new.
    """
    position, patience, where = start, _patience(), f"{reader.shown}/{path}"
    while size is None or position < size:
        reached = position
        try:
            with reader.open(path, position) as body:
                size = body.total if size is None else size
                _skip(body, position - body.start)
                while chunk := body.read(CHUNK if size is None else min(CHUNK, size - position)):
                    position += len(chunk)
                    if limit is not None and position > limit:
                        raise BundleError(f"{where} has more than {limit:,} bytes: it is no document of ours.")
                    yield chunk
            if size is None:
                return
            if position < size:
                raise Interrupted("the answer ended early")
        except Interrupted as broken:
            patience = _pause(_patience() if position > reached else patience, broken, where, position)


def read_all(reader: Reader, path: str, limit: int) -> bytes:
    """A small file of unknown size, at most `limit` bytes. Raises as `stream`."""
    return b"".join(stream(reader, path, 0, None, limit))
