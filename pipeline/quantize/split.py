"""A matrix split along its input channels: the channels that matter most at more bits, the rest at fewer.

The order is shared by all matrices that multiply the same activations, so that the activations are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def channel_importance(moments: np.ndarray, column_norms: Iterable[np.ndarray]) -> np.ndarray:
    """E[x_j²] · Σ ‖column j‖² over the matrices that share the input: float64 [channels].

    It is the expected squared output that channel j contributes, and so what a relative error in it costs.
    """
    return moments.astype(np.float64) * sum(column_norms)


def split_channels(importance: np.ndarray, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the `high` most important channels and of the others, each ascending, int32.

    Ties go to the lower index, so that the result does not depend on the sorting algorithm.
    """
    order = np.argsort(-importance, kind="stable")
    return np.sort(order[:high]).astype(np.int32), np.sort(order[high:]).astype(np.int32)


def squared_norms(weights: np.ndarray) -> np.ndarray:
    """The sum of squares of each column of float32 [rows, columns], row by row: float64 [columns]."""
    return np.einsum("rc,rc->c", weights, weights, dtype=np.float64)
