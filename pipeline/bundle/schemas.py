"""JSON Schemas of the signed documents, for those who read them without this pipeline: docs/schemas/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.bundle.release import Refusal, Release
from pipeline.bundle.tiers import TiersDocument

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _closed(schema: Any) -> Any:
    """Names outside a pattern are refused: pydantic checks that, but leaves it out of its schemas."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "patternProperties" in schema else {}
    return closed | {key: _closed(value) for key, value in schema.items()}


def write(folder: Path) -> list[Path]:
    """Write release.schema.json, refusal.schema.json and tiers.schema.json; equal code writes equal bytes.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    written = []
    for kind in (Release, Refusal, TiersDocument):
        path = folder / f"{Path(kind.file_name).stem}.schema.json"
        files.write_json(path, {"$schema": _DIALECT} | _closed(kind.model_json_schema()))
        written.append(path)
    return written
