"""An artifact whose scales and norms were learned, between the stage that made it and the one that adopts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import link_or_copy, read_json, sha256_of
from pipeline.quantize.lost import Lost
from pipeline.workspace import PLAN_FILE

RECORD = "learned.json"


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact but what says how it came about."""
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name not in (PLAN_FILE, RECORD)}


def lost_of(record: dict[str, Any]) -> dict[str, Lost]:
    """What float16 lost, by tensor, as a record has it."""
    return {name: Lost(**lost) for name, lost in record.get("lost", {}).items()}


def read_learned(folder: Path) -> dict[str, Any] | None:
    """The record of the learned artifact in `folder` if its files are whole, else None.

    It holds `key`, what decided its bytes; `quantized`, the key of the artifact that was learned from; `sha256` by
    file; `lost`; and `learned`, how it was trained, for plan.json.
    """
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
        return record if record["sha256"] == digests_of(folder) else None
    except (OSError, ValueError, KeyError):
        return None


def require_learned(folder: Path, key: str) -> dict[str, Any]:
    """As `read_learned`. Raises PipelineError unless what was learned from is the artifact that `key` makes."""
    record = read_learned(folder)
    if record is None or record["quantized"] != key:
        raise PipelineError(
            f"{folder}: nothing whole was learned there from this plan, these weights and this code. Run `python -m "
            f"pipeline learn {folder.parents[1].name} {folder.name}` first, or `dvc repro` for everything."
        )
    return record


def adopt(record: dict[str, Any], folder: Path, target: Path) -> None:
    """Give the files of a learned artifact a second name in `target`."""
    for name in record["sha256"]:
        link_or_copy(folder / name, target / name)
