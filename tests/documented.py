"""The blocks of README and docs, as their fences mark them: what a test runs, and what is only shown, with the reason.

A fence of shell says `sh run` (seconds), `sh long` (minutes) or `sh shown: REASON`. Commands of a page run in its
order, in a copied tree with a tiny model in SmolLM2's place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
QUIET = {"js", "json", "kotlin", "python", "swift", "text", "yaml"}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<mark>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, the words behind its fence, its lines."""

    page: Path
    line: int
    mark: str
    text: str

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """All of them, page by page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            line = 1 + text.count("\n", 0, found.start())
            yield Block(page, line, found["mark"], re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE))
