"""The claims that the benchmark tests, as arithmetic on measured rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NEAREST_SHARE = 0.6  # q4 loses at most this share of what the default quantizer loses at the same bytes
Q3_BODY_BITS = 3.5  # scales and zero points included

Row = Mapping[str, Any]


def interpolated(points: Sequence[tuple[float, float]], bits: float) -> float:
    """KL divergence at `bits` on the straight line through (bits, log KL) of two points: a bit divides it by a factor.

    Raises ValueError unless the points have different bits and a positive KL.
    """
    (bits_a, kl_a), (bits_b, kl_b) = points
    if bits_a == bits_b or min(kl_a, kl_b) <= 0:
        raise ValueError(f"no line in the logarithm passes through {points}")
    share = (bits - bits_a) / (bits_b - bits_a)
    return math.exp((1 - share) * math.log(kl_a) + share * math.log(kl_b))


def evaluate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target that these rows of one subject can tell: what is compared, the figures, and whether it is met.

    A budget's row names its peers in `beside`: {peer: {"excess": …}}, mean KL(ours) − KL(peer) with its interval.
    """
    found = [_budget(row, peer, gap, rows) for row in rows for peer, gap in row.get("beside", {}).items()]
    found += [_control(row, rows) for row in rows if "control" in row]
    frontier = [(row["body_bits"], row["kl_mean"]) for row in rows if row["tool"] == "simulated"]
    if len(frontier) == 2:
        found += [_frontier(row, frontier) for row in rows if row["tool"] == "ours" and row["name"] == "q3"]
    return found


def _named(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row["name"] == name)


def _budget(row: Row, peer: str, gap: Mapping[str, float], rows: Sequence[Row]) -> dict[str, Any]:
    other = _named(rows, peer)
    return {
        "target": "lower KL at a peer's bytes",
        "ours": row["name"],
        "beside": f"{other['tool']} {peer}",
        "bytes": (row["bytes"], other["bytes"]),
        "kl": row["kl_mean"],
        "limit": other["kl_mean"],
        **gap,
        "met": row["kl_mean"] < other["kl_mean"] and row["bytes"] <= other["bytes"],
    }


def _control(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    name, gap = row["control"]["name"], row["control"]["gap"]
    control = _named(rows, name)
    limit = NEAREST_SHARE * control["kl_mean"]
    return {
        "target": f"at most {NEAREST_SHARE} × the KL of the default quantizer's rounding",
        "ours": row["name"],
        "beside": name,
        "bytes": (row["bytes"], control["bytes"]),
        "kl": row["kl_mean"],
        "limit": limit,
        **gap,
        "met": row["kl_mean"] <= limit,
    }


def _frontier(row: Row, frontier: Sequence[tuple[float, float]]) -> dict[str, Any]:
    limit = interpolated(frontier, row["body_bits"])
    return {
        "target": f"at most {Q3_BODY_BITS} bits/weight of the body, and no more KL than GPTQ on a 3-bit grid there",
        "ours": row["name"],
        "beside": "GPTQ, 3-bit grid (simulated)",
        "body_bits": row["body_bits"],
        "kl": row["kl_mean"],
        "limit": limit,
        "met": row["body_bits"] <= Q3_BODY_BITS and row["kl_mean"] <= limit,
    }
