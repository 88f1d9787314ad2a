"""Texts from templates that lie beside the code that fills them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: Path, **fields: Any) -> bytes:
    """A Jinja template filled with `fields`, as UTF-8. A missing name is an error. Fields are escaped in HTML only."""
    from jinja2 import Environment, StrictUndefined

    # In what is no HTML, texts that are not ours pass `one_line`, or have a pattern.
    engine = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    engine.autoescape = ".html" in template.suffixes
    return engine.from_string(template.read_text(encoding="utf-8")).render(fields).encode()
