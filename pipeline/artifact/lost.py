"""Numbers that vanish: each written tensor's scales are looked at once, and its weights only where something is amiss.

What is found depends on the written bytes and the checkpoint alone, so a run that continues finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.artifact.graph import Seat, seats
from pipeline.artifact.quantizers import arranged, order_of
from pipeline.artifact.work import Range, Unit, units
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.planning.recipes import Piece, PlannedMatrix
from pipeline.quantize.gptq import bounds
from pipeline.quantize.lost import Lost, energy, plain, subnormal, suspects, vanished

# Why scales vanish, and what helps.
_PLAIN = (
    "float16 holds no scale below 6e-08",
    "Compare the tensor with its publisher's: it is damaged or untrained.",
)
_SHORT = (
    "8 bits hold no scale below a 256th of its row's largest",
    "Name formats without the final 8 in the recipe, which hold smaller ones.",
)


def find_lost(
    planned: PlannedMatrix,
    read: Callable[[Range], bytes],
    checkpoint: Checkpoint,
    channels: Mapping[str, np.ndarray],
    lost_max: float,
) -> Lost | None:
    """What float16 lost of one matrix, None where it lost nothing.

    Args:
        read: bytes of a stored tensor.
        channels: those of the pieces of a split input, by `channel_names`.
        lost_max: the largest share of a tensor's energy that may vanish.

    Raises:
        CheckpointError: more vanished.
    """
    rows = planned.matrix.rows
    places = {at.name: at for at in Unit(planned, 0, rows).ranges()}

    def scales_of(piece: Piece, seat: Seat) -> np.ndarray:
        return piece.format.read_scales(lambda ending: read(places[seat.prefix + ending]), rows)

    scales = list(map(scales_of, planned.pieces, seats(planned)))
    if all(map(plain, scales)):
        return None
    coarse, weights, share = sum(map(subnormal, scales)), np.zeros(1, np.int64), 0.0
    if any(suspects(part).any() for part in scales):
        weights, share = _vanished(planned, scales, checkpoint, channels)
    found = Lost(sum(part.size for part in scales), int(np.count_nonzero(weights)), int(weights.sum()), share, coarse)
    if found.share > lost_max:
        short = any(piece.format.short for piece in planned.pieces)
        why, remedy = _SHORT if short else _PLAIN
        raise CheckpointError(
            f"tensor {planned.matrix.name!r} as {planned.formats}: {found.vanished:,} of {found.blocks:,} blocks with "
            f"{found.weights:,} weights become zero, because {why}. They are {found.share:.2%} of the tensor's energy "
            f"(its sum of squares), and {lost_max:.2%} may vanish. {remedy} If it is meant to be so, set `lost_max: "
            f"{min(1.0, float(f'{1.01 * found.share:.2g}'))}` in the recipe."
        )
    return found if found.vanished or found.subnormal else None


def _vanished(
    planned: PlannedMatrix, scales: Sequence[np.ndarray], checkpoint: Checkpoint, channels: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Nonzero weights of each block that vanished, int [blocks], and their share of the tensor's energy."""
    order, places = order_of(planned, channels), bounds(planned.pieces)
    counts, lost, whole = list[np.ndarray](), 0.0, 0.0
    for unit in units(planned):
        stored = arranged(checkpoint.rows(planned.matrix.name, unit.start, unit.stop), order, planned.rotated)
        whole += energy(stored)
        for part, (first, stop) in zip(scales, places, strict=True):
            piece, own = stored[:, first:stop], part[unit.start : unit.stop]
            counts.append(vanished(piece, own).reshape(-1))
            lost += energy(piece.reshape(counts[-1].size, -1)[counts[-1] > 0])
    return np.concatenate(counts), lost / whole if whole else 0.0


def sentence(name: str, lost: Lost) -> str:
    """One line on a tensor."""
    told = []
    if lost.vanished:
        told.append(
            f"{lost.vanished:,} of {lost.blocks:,} blocks become zero, with {lost.weights:,} weights and "
            f"{lost.share:.1e} of its energy"
        )
    if lost.subnormal:
        told.append(f"{lost.subnormal:,} of {lost.blocks:,} scales are below 6.1e-05, where float16 is coarser")
    return f"  {name}: {'; '.join(told)}"
