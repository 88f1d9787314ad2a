"""Who was asked, how it ended and what it cost: a row of an SQLite file for every attempt. No text of a prompt, ever.

A row is written before its attempt begins and completed when it ends, so one that a crash interrupts is there as
`begun`, with the cost of its prompt. WAL lets `cost` read while a server writes. A commit survives the end of the
process; after a power cut the last ones may be missing, and the file is whole.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.errors import PipelineError
from pipeline.serve.hybrid.policy import Level, Place

_LOG = logging.getLogger(__name__)

Usage = Literal["counted", "reported", "estimated", "disputed"]
"""Where a row's tokens come from: counted on the device; reported by the service; estimated with the device's tokenizer
where nothing was reported; reported, but far from that estimate."""

ANSWERED, BEGUN, CANCELLED, FAILED = "answered", "begun", "cancelled", "failed"


@dataclass
class Attempt:
    """A row. Seconds count from the attempt's start; `own_*` tokens are those of the device's tokenizer.

    Attributes:
        request, number: which request's attempt it is, and its how manieth.
        at: when it began, seconds since 1970 (UTC).
        provider: row of configs/hybrid.yaml; "device" for the device.
        outcome: `answered`, `cancelled` by the client, `begun` if nobody lived to say more, else why it failed.
        cost: dollars by the price of that day.
    """

    request: str
    number: int
    place: Place
    provider: str
    model: str
    mode: str
    rule: str
    level: Level
    own_prompt_tokens: int
    usage: Usage
    prompt_tokens: int
    cost: float
    completion_tokens: int = 0
    own_completion_tokens: int = 0
    outcome: str = BEGUN
    first_token: float | None = None
    seconds: float | None = None
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Spent:
    """What one provider's model took in a month (UTC). `estimated` and `disputed` count attempts; `cost` is dollars."""

    month: str
    place: Place
    provider: str
    model: str
    attempts: int
    answered: int
    prompt_tokens: int
    completion_tokens: int
    estimated: int
    disputed: int
    cost: float


_SPENT = """
    SELECT strftime('%Y-%m', at, 'unixepoch') AS month, place, provider, model, COUNT(*), SUM(outcome = 'answered'),
           SUM(prompt_tokens), SUM(completion_tokens), SUM(usage = 'estimated'), SUM(usage = 'disputed'), SUM(cost)
    FROM attempts GROUP BY month, place, provider, model ORDER BY month, place, provider, model
"""
_TYPES = {"int": "INTEGER", "float": "REAL", "float | None": "REAL"}
_COLUMNS = {name: _TYPES.get(str(one.type), "TEXT") for name, one in Attempt.__dataclass_fields__.items()}


class Ledger:
    """The file of attempts, used by one thread at a time; several processes may share it."""

    def __init__(self, path: Path):
        """Open or create it. Raises PipelineError for a file that is no ledger, or a place that cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            self._database.execute(f"CREATE TABLE IF NOT EXISTS attempts (id INTEGER PRIMARY KEY, {columns})")
            self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM attempts LIMIT 0")
        except (sqlite3.Error, OSError) as error:
            raise PipelineError(f"{path} cannot be used as a ledger: {error}. Name another file as `ledger`.") from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def attempt(self, row: Attempt) -> Iterator[Attempt]:
        """Write the row, let the block fill it, write it again however the block ends: a block that is left before it
        set an outcome was cancelled. A disk that takes no row costs no answer: it is logged."""
        key = self._write(
            f"INSERT INTO attempts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})", row
        )
        began = time.monotonic()
        try:
            yield row
        except Exception:
            row.outcome = FAILED if row.outcome == BEGUN else row.outcome
            raise
        finally:
            row.outcome = CANCELLED if row.outcome == BEGUN else row.outcome
            row.seconds = time.monotonic() - began
            if key is not None:
                self._write(
                    f"UPDATE attempts SET {', '.join(f'{name} = ?' for name in _COLUMNS)} WHERE id = {key}", row
                )

    def _write(self, statement: str, row: Attempt) -> int | None:
        try:
            return self._database.execute(statement, list(asdict(row).values())).lastrowid
        except sqlite3.Error as error:
            _LOG.error("%s: an attempt of %s is not noted: %s", self.path, row.provider, error)
            return None

    def rows(self) -> list[Attempt]:
        """All attempts in the order in which they began."""
        found = self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM attempts ORDER BY id")
        return [Attempt(**dict(zip(_COLUMNS, row, strict=True))) for row in found]

    def spent(self) -> list[Spent]:
        """Sums by month, place, provider and model."""
        return [Spent(*row) for row in self._database.execute(_SPENT)]
