"""Code keys: one hash of all that decides a stage's result besides its inputs.

That is the code that the stage imports (`closure`), the versions of the libraries imported there, and the configuration
that this code loads, resolved: defaults and inherited values included, fields that no line reads left out
(`configuration`). Nothing of it is listed by hand. A record lies in artifacts/code, one file per stage and item, and is
the stage's one code dependency in dvc.yaml; DVC has it written anew before it compares anything (`dvc_hook`). Units of
unfinished work and provenance read the same key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.models import load_pipeline
from pipeline.files import read_json, write_bytes
from pipeline.keys.closure import Closure
from pipeline.keys.configuration import Item, resolved, value_of

ARTIFACTS = Path("artifacts/code")
_PIPELINE = Path("dvc.yaml")


def of(stage: str, model: str | None = None, variant: str | None = None) -> str:
    """The code key of a stage for a model and variant, 64 hex digits."""
    value_of.cache_clear()
    return digest(record(f"pipeline.stages.{stage}", model, variant))


def code(*modules: str) -> str:
    """The part of a key that configuration does not change, 64 hex digits: for work whose inputs say what was asked."""
    closure = Closure.of(*modules)
    return digest([closure.hashes(), closure.libraries()])


def record(module: str, model: str | None = None, variant: str | None = None) -> dict[str, Any]:
    """What a module's results rest on: `modules` (path → SHA-256), `libraries` (distribution → version) and
    `configuration` (loading function → what it gives, as JSON)."""
    closure = Closure.of(module)
    return {
        "modules": closure.hashes(),
        "libraries": closure.libraries(),
        "configuration": resolved(closure, Item(model, variant)),
    }


def digest(value: Any) -> str:
    """SHA-256 of JSON data, 64 hex digits; equal for equal data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def path_of(stage: str, model: str | None = None, variant: str | None = None) -> Path:
    """Where a stage's record lies."""
    return ARTIFACTS.joinpath(*filter(None, (stage, model, variant))).with_suffix(".json")


def instances() -> Iterator[tuple[str, str, str | None, str | None]]:
    """Every stage of dvc.yaml with its module and, as its matrix has them, model and variant."""
    selected = load_pipeline()
    for stage, entry in yaml.safe_load(_PIPELINE.read_text(encoding="utf-8"))["stages"].items():
        module = entry["cmd"].split()[3]  # python -m pipeline MODULE
        matrix = entry.get("matrix", {})
        for model in selected.models if "model" in matrix else (None,):
            for variant in selected.variants if "variant" in matrix else (None,):
                yield stage, module, model, variant


def refresh() -> None:
    """Write the record of every stage that configs/pipeline.yaml selects; a file that is right is left alone."""
    value_of.cache_clear()
    for stage, module, model, variant in instances():
        path, own = path_of(stage, model, variant), "" if stage == "reference" else variant
        now = record(f"pipeline.stages.{module}", model, own)
        if not path.exists() or read_json(path) != now:
            write_bytes(path, json.dumps(now, indent=1, sort_keys=True, ensure_ascii=False).encode())
