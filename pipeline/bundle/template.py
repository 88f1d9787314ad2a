"""Texts from templates that lie beside the code that fills them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: Path, **fields: Any) -> bytes:
    """A Jinja template filled with `fields`, as UTF-8. Nothing is escaped; a missing name is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=False,  # no HTML; texts that are not ours pass `one_line`, or have a pattern
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(fields).encode()
