"""The published JSON Schemas are those of the code, and agree with what is written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.bundle import schemas
from pipeline.bundle.vectors import write_sample
from tests.conftest import ROOT

PUBLISHED = ROOT / "docs/schemas"


def validator(name: str) -> Any:
    schema = json.loads((PUBLISHED / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_they_are_current(tmp_path: Path) -> None:
    """If not: python -m pipeline schema docs/schemas"""
    written = schemas.write(tmp_path)
    assert {path.name: path.read_bytes() for path in written} == {
        path.name: path.read_bytes() for path in PUBLISHED.iterdir()
    }


@pytest.mark.parametrize("name", ["release", "refusal", "tiers"])
def test_documents_are_valid(tmp_path: Path, name: str) -> None:
    write_sample(tmp_path / "bundle", name)
    document = json.loads((tmp_path / f"bundle/content/{name}.json").read_text())
    validator(name).validate(document)
    for change in ({"more": 1}, {"release": 0}, {"channel": "beta"}, {"created": "yesterday"}, {"next_key_id": "x"}):
        assert not validator(name).is_valid(document | change), change
    assert not validator(name).is_valid({key: value for key, value in document.items() if key != "expires"})


def test_they_are_not_taken_for_each_other(tmp_path: Path) -> None:
    write_sample(tmp_path / "bundle")
    document = json.loads((tmp_path / "bundle/content/release.json").read_text())
    assert not validator("refusal").is_valid(document) and not validator("tiers").is_valid(document)
    assert not validator("release").is_valid(document | {"files": {"../x": {"size": 1, "sha256": "d" * 64}}})
