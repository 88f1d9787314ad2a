"""Experts that few calibration tokens woke: what their statistics lack is made up for by an average token of the layer.

GPTQ believes a correlation as far as tokens bear it out: it begins with a damping of 4 · channels / tokens
(`pipeline.quantize.factor`), under which, from 1 on, hardly an error is compensated. So `needed` tokens are those at
which it is 1. An expert that saw fewer gets the rest, each the mean of all tokens that woke any expert of its layer;
one that saw none is calibrated on these alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pipeline.checkpoint.architecture import Matrix


def needed(channels: int) -> int:
    """Tokens for the statistics of an input of so many channels."""
    return 4 * channels


def experts_inputs(matrices: Iterable[Matrix]) -> list[list[str]]:
    """The inputs of a layer's experts that are alike, in the order of experts: what they read, and what their last
    matrices multiply. Empty for a layer without experts."""
    found: dict[str, dict[str, None]] = {}
    for matrix in matrices:
        if matrix.expert is not None:
            found.setdefault(matrix.kind, {})[matrix.input] = None
    return [list(names) for names in found.values()]


def top_up(products: Mapping[str, np.ndarray], tokens: dict[str, int], names: Sequence[str]) -> list[str]:
    """Make up for what inputs of experts lack, in place. Those that lacked something.

    Args:
        products: Σ x·xᵀ by input, float32 [channels, channels].
        tokens: how many each sum is over.
        names: inputs of all experts of a layer that are alike.
    """
    wanted, seen = needed(len(products[names[0]])), sum(tokens[name] for name in names)
    rare = [name for name in names if tokens[name] < wanted]
    mean = sum((products[name] for name in names[1:]), products[names[0]].copy())
    mean /= np.float32(max(seen, 1))
    for name in rare:
        products[name][...] += np.float32(wanted - tokens[name]) * mean
        tokens[name] = wanted
    return rare
