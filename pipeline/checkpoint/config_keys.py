"""What every key of config.json means here: honoured, harmless, or refused unless it changes nothing.

`architecture.py` honours a key by reading it. config_keys.yaml has the others, and what an absent key means. A key that
neither knows is listed once, when the model is downloaded.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.untrusted import shown
from pipeline.errors import CheckpointError


def read_table(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """A table of keys, and of it by key the `neutral` values, at which the key changes nothing."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    return table, {key: row["values"] for row in table["neutral"] for key in row["keys"].split()}


_TABLE, _NEUTRAL = read_table(Path(__file__).with_name("config_keys.yaml"))
DEFAULTS: dict[str, dict[str, Any]] = _TABLE["defaults"]
_HARMLESS = frozenset(_TABLE["harmless"].split())


def check_keys(values: dict[str, Any], honoured: Collection[str], family: str, path: Path) -> None:
    """Raise CheckpointError where a key that is not honoured has a value that makes another model of a family's."""
    for key, value in values.items():
        if key in honoured or value is None or key not in _NEUTRAL or value in _NEUTRAL[key]:
            continue
        neutral = "".join(f"{str(one).lower() if isinstance(one, bool) else one!r}, " for one in _NEUTRAL[key])
        raise CheckpointError(
            f"{path}: {key} = {shown(value)} is not supported for {family}: the graph would compute something else "
            f"(it computes the model of {neutral}null). Use the original checkpoint of a plain {family} model; if the "
            f"file is wrong, correct the key in a copy of the source, a folder of `kind: local`."
        )


def unknown(values: Collection[str], honoured: Collection[str]) -> list[str]:
    """Keys of config.json that are neither honoured nor known as harmless, sorted."""
    return sorted(set(values) - set(honoured) - _HARMLESS - _NEUTRAL.keys())
