"""Where every stored tensor lies: parts of bounded size, known to the byte before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import PlanError

# A page: a memory-mapped tensor starts on its own page, and an update that changes one tensor moves no other.
PAGE = 4096
_SMALL = 1 << 16


@dataclass(frozen=True)
class Place:
    """A tensor's bytes: part number, offset and length in it."""

    part: int
    offset: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Places by tensor name, and the size of each part in bytes."""

    places: dict[str, Place]
    parts: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts)


def make_layout(sizes: Iterable[tuple[str, int]], part_bytes: int) -> Layout:
    """Place tensors in the given order; one that does not fit the current part opens the next.

    Large tensors start on a page, small ones (under 64 KiB) on 64 bytes. Raises PlanError for a tensor larger than a
    part: it could not be delivered.
    """
    places: dict[str, Place] = {}
    parts = [0]
    for name, length in sizes:
        if length > part_bytes:
            raise PlanError(
                f"tensor {name!r} has {length:,} bytes, a part holds {part_bytes:,}: use fewer bits for it."
            )
        alignment = PAGE if length >= _SMALL else 64
        offset = -(-parts[-1] // alignment) * alignment
        if offset + length > part_bytes:
            parts.append(0)
            offset = 0
        places[name] = Place(len(parts) - 1, offset, length)
        parts[-1] = offset + length
    return Layout(places, tuple(parts))
