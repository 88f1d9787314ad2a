"""JSON Schemas of the signed documents, for those who read them without this pipeline, and of the record that phones
write: docs/schemas/."""

from __future__ import annotations

from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import DictSchema

from pipeline import files
from pipeline.bundle.release import Refusal, Release
from pipeline.bundle.tiers import TiersDocument
from pipeline.runtime.sustained import Sustained


class _Closed(GenerateJsonSchema):
    """Names outside a pattern are refused: pydantic checks that, but leaves it out of its schemas."""

    def dict_schema(self, schema: DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        return {"additionalProperties": False} | made if "patternProperties" in made else made


def write(folder: Path) -> list[Path]:
    """Write release.schema.json, refusal.schema.json, tiers.schema.json and sustained.schema.json; equal code writes
    equal bytes.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    written = []
    for kind in (Release, Refusal, TiersDocument, Sustained):
        path = folder / f"{Path(kind.file_name).stem}.schema.json"
        files.write_json(path, {"$schema": _Closed.schema_dialect} | kind.model_json_schema(schema_generator=_Closed))
        written.append(path)
    return written
