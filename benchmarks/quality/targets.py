"""The claims that the benchmark tests, as arithmetic on measured rows.

A claim compares the best of our files that is no larger, on disk or in memory, with a file of a peer. It is met when
the paired interval of KL(ours) − factor · KL(peer) lies below zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.ours import CONTROL, CONTROLLED, By

Row = Mapping[str, Any]
Excess = Callable[[str, str, float], dict[str, float]]
"""(our row, a peer's row, factor) → KL(ours) − factor · KL(peer) with its interval."""


@dataclass(frozen=True)
class Target:
    """At most `factor` times the KL of each file of `peers` at no more bytes, on disk or in memory."""

    title: str
    by: By
    factor: float
    peers: Callable[[Row], bool]


def _named(*mixtures: str) -> Callable[[Row], bool]:
    return lambda row: row["name"] in {f"{mixture}, imatrix" for mixture in mixtures}


def _between(low: float, high: float, kind: str = "") -> Callable[[Row], bool]:
    """Quantized files of llama.cpp whose layers have from `low` to below `high` bits per weight."""
    return lambda row: row["tool"] == "llama.cpp" and row["name"].startswith(kind) and low <= row["body_bits"] < high


TARGETS = (
    Target("15 % less KL, same download", "bytes", 0.85, _named("IQ4_XS", "Q4_K_M")),
    Target("less KL, same download", "bytes", 1.0, _named("IQ3_S", "IQ3_M")),
    Target("less KL, same memory, layers of 4.25 to 5.5 bits", "memory", 1.0, _between(4.25, 5.5)),
    Target("at most 1.5 × the KL of IQ-quants, same memory, layers of 3.25 to 4.25 bits", "memory", 1.5,
           _between(3.25, 4.25, "IQ")),
)  # fmt: skip
NEAREST = Target("q4: at most 0.35 × the KL of rounding to nearest in its formats", "bytes", 0.35, _named())


def evaluate(rows: Sequence[Row], excess: Excess) -> list[dict[str, Any]]:
    """Every target that these rows of one subject can tell: what is compared, the figures, and whether it is met."""
    found = [
        _judged(target, best_within(rows, target.by, peer[target.by]), peer, excess)
        for target in TARGETS
        for peer in rows
        if target.peers(peer)
    ]
    controls = {row["name"]: row for row in rows if row["name"] in (CONTROLLED, CONTROL)}
    if len(controls) == 2:
        found.append(_judged(NEAREST, controls[CONTROLLED], controls[CONTROL], excess))
    return found


def best_within(rows: Sequence[Row], by: By, size: int) -> Row | None:
    """Of our files with no more bytes, the one of least KL."""
    fitting = [row for row in rows if row["tool"] == "ours" and row[by] <= size]
    return min(fitting, key=lambda row: row["kl_mean"], default=None)


def _judged(target: Target, ours: Row | None, peer: Row, excess: Excess) -> dict[str, Any]:
    limit = target.factor * peer["kl_mean"]
    told = {"target": target.title, "by": target.by, "beside": peer["name"], "size": peer[target.by], "limit": limit}
    if ours is None:
        return told | {"ours": None, "met": False}
    gap = excess(ours["name"], peer["name"], target.factor)
    return told | {"ours": ours["name"], "kl": ours["kl_mean"], **gap, "met": gap["excess_high"] < 0}
