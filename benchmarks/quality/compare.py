"""Two files on the same tokens: what one loses beyond the other, paired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.quality.measure import TEXT
from pipeline.tasks.statistics import mean_interval

KINDS = tuple(kind for kind, _ in TEXT.windows)
"""Kind of text of each window."""


def excess(
    ours: np.ndarray, theirs: np.ndarray, factor: float = 1.0, kind: str | None = None, kinds: Sequence[str] = KINDS
) -> dict[str, float]:
    """Mean of KL(ours) − factor · KL(theirs), paired by token, with its 90 % interval; below 0 is a win.

    Args:
        ours, theirs: KL divergence of each scored token, float64 [tokens].
        kind: the one kind of text to count; all by default.
        kinds: kind of each window, the independent units; each window scores as many tokens.
    """
    ids = np.repeat(np.arange(len(kinds)), len(ours) // len(kinds))
    chosen = np.isin(ids, [number for number, own in enumerate(kinds) if kind in (None, own)])
    found = mean_interval((ours - factor * theirs)[chosen], ids[chosen])
    return {"excess": found.estimate, "excess_low": found.low, "excess_high": found.high}
