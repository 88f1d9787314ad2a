"""Lines of text for terminals and files: columns that line up, sentences that are broken at `WIDTH` columns."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

WIDTH = 118


def aligned(rows: Sequence[Sequence[str]], left: Collection[int], indent: str = "") -> list[str]:
    """One line a row after `indent`, two spaces between columns: those in `left` to the left, the others to the right.
    Rows have equally many columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [f"{{:{'<' if column in left else '>'}{width}}}" for column, width in enumerate(widths)]
    return [f"{indent}{'  '.join(cells).format(*row)}".rstrip() for row in rows]


def wrapped(text: str, first: str = "", further: str = "  ") -> list[str]:
    """Lines of at most `WIDTH` columns: the first begins with `first`, the others with `further`."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)
