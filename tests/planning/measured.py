"""What a sensitivity stage might have measured of an architecture, made up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.planning.sensitivity import Sensitivity
from pipeline.quantize.formats import TensorFormat

FORMATS = ("w2b64a8", "w4b64a8", "w4b32a8", "w6b64a8", "w8b32s8")


def stored(architecture: Architecture) -> list[Matrix]:
    """Every matrix that an artifact holds, in a plan's order: tables, then the body."""
    body = [matrix for layer in range(architecture.layers) for matrix in architecture.body(layer)]
    return [*architecture.tables, *body]


def measured(architecture: Architecture, seed: int = 0, formats: Sequence[str] = FORMATS) -> Sensitivity:
    """Log-normal nats and errors: a bit more leaves a quarter of an error, a larger block more, each by chance."""
    rng = np.random.default_rng(seed)
    errors, order = {}, {}
    for matrix in stored(architecture):
        importance = np.exp(2 * rng.standard_normal(matrix.columns))
        kinds = [TensorFormat.parse(name).fitted(matrix.columns) for name in formats]
        errors[matrix.name] = {
            str(kind): (importance * 4.0**-kind.bits * (1 + kind.block / 64) * rng.uniform(0.5, 2)).astype(np.float32)
            for kind in kinds
        }
        if matrix.role != "embedding":
            order.setdefault(matrix.input, np.argsort(-importance).astype(np.int32))
    nats = {name: float(np.exp(rng.standard_normal() - 4)) for name in errors}
    damage = {name: str(rng.choice(list(kinds))) for name, kinds in errors.items()}
    return Sensitivity(errors, order, nats, damage)
