"""Tables for pages, between marks such as `<!-- machine -->` and `<!-- /machine -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.files import write_bytes


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Write each text between the marks of its name, on lines of its own where the mark ends its line. Ends the program
    where a page lacks them."""
    text = page.read_text(encoding="utf-8")
    for name, new in tables.items():
        found = re.search(rf"<!-- {name} -->(\n?)(.*?)<!-- /{name} -->", text, re.DOTALL)
        if not found:
            raise SystemExit(f"{page}: no place for {name!r}.")
        text = f"{text[: found.start(2)]}{new}{found[1]}{text[found.end(2) :]}"
    write_bytes(page, text.encode())
