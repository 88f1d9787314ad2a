"""The licence that a source states: its SPDX form where it has one, and a statement where the source ships no text."""

from __future__ import annotations

from collections.abc import Iterable

from license_expression import get_spdx_licensing

from pipeline.bundle.dossier import one_line

STATEMENT = "LICENSE-STATEMENT.txt"
_SPDX = get_spdx_licensing()


def spdx(stated: str) -> str | None:
    """The SPDX expression that `stated` is, in SPDX's own spelling, or None: "apache-2.0" is Apache-2.0."""
    found = _SPDX.validate(stated)
    return found.normalized_expression if stated.strip() and not found.errors else None


def is_text(name: str) -> bool:
    """Whether a file of a checkpoint is its licence text."""
    return name.upper().startswith(("LICENSE", "LICENCE"))


def statement(title: str, revision: str, stated: str, names: Iterable[str]) -> bytes | None:
    """What stands in place of a licence text that the source does not ship, or None where it ships one.

    A text is never made up: which of many wordings the authors meant, and whose copyright it is, only they can say.
    """
    if any(is_text(name) for name in names):
        return None
    expression = spdx(stated)
    lines = [f"The weights in this bundle are made from {one_line(title)}, {one_line(revision)}."]
    if expression is None:
        lines.append(f"Their source states this licence, and ships no text of it: {one_line(stated) or 'none'}.")
        lines.append("Read the terms at the source before you use or pass on this bundle.")
    else:
        lines.append(f"Their source states the licence {expression} (SPDX), and ships no text of it. The terms:")
        lines += [f"https://spdx.org/licenses/{key}.html" for key in sorted(set(_SPDX.license_keys(expression)))]
    return ("\n".join(lines) + "\n").encode()
