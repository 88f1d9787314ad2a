"""A task's folder: its items, and a record of what decided them. What is still right is not measured again.

A folder may be whole (its record has the metrics), or what a killed run left. Items stay when what decides each of them
is the same; if that also holds for what decides the metrics over all of them, nothing is measured at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.files import link_or_copy, read_json, sha256_of, write_json
from pipeline.tasks.sections import RECORD, Key

Metrics = dict[str, Any]
STATES = "states"
"""A folder among the items, for what is worth keeping until they are whole: the record vouches for it as for them."""


def adopt(folder: Path, earlier: Path, key: Key) -> str:
    """Make `folder` hold what is kept of a task, and say so in words.

    What a killed run left in `folder` comes first, then what `earlier`, a finished validation, has: by hard links.
    """
    records = [(place, record) for place in (folder, earlier) if (record := read_record(place))]
    kept = next((place for place, record in records if _is_whole(record, key)), None)
    kept = kept or next((place for place, record in records if record["items"] == key.items), None)
    if kept != folder:
        shutil.rmtree(folder, ignore_errors=True)
    if kept == earlier:
        for file in sorted(earlier.iterdir(), key=lambda file: file.name == RECORD):  # it vouches for the others: last
            link_or_copy(file, folder / file.name)
    for leftover in folder.glob(".*"):  # what a kill left half-written
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if kept:
        record = read_record(folder)
        items = sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))
        return "kept as measured before" if record and _is_whole(record, key) else f"{items:,} items kept"
    pairs = [(record["items"], name) for _, record in records for name in {*record["items"], *key.items}]
    changed = sorted({name for items, name in pairs if items.get(name) != key.items.get(name)})
    return f"measured again: {', '.join(changed)} changed" if records else "measured"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a task's folder; None where there is none, or none that reads."""
    try:
        record = read_json(folder / RECORD)
        return record if isinstance(record["items"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished(folder: Path) -> Path | None:
    """`folder` if a validation finished this task in it."""
    record = read_record(folder)
    return folder if record and "sha256" in record else None


def metrics_of(folder: Path, key: Key) -> Metrics | None:
    """The metrics in a task's folder that `key` decided; else None."""
    record = read_record(folder)
    return record["metrics"] if record and _is_whole(record, key) else None


def measured(folder: Path, key: Key, measure: Callable[[Path], Metrics]) -> Metrics:
    """The metrics of a task whose folder `adopt` prepared, measured as far as they are not kept."""
    if (metrics := metrics_of(folder, key)) is not None:
        return metrics
    folder.mkdir(parents=True, exist_ok=True)
    _unshare(folder)
    write_json(folder / RECORD, {"items": key.items})
    metrics = json.loads(json.dumps(measure(folder)))  # as a later run reads them
    shutil.rmtree(folder / STATES, ignore_errors=True)
    digests = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name != RECORD}
    write_json(folder / RECORD, {"items": key.items, "summary": key.metrics, "metrics": metrics, "sha256": digests})
    return metrics


def _is_whole(record: dict[str, Any], key: Key) -> bool:
    return "metrics" in record and record["items"] == key.items and record.get("summary") == key.metrics


def _unshare(folder: Path) -> None:
    """Give the folder files of its own: a journal that grows must not grow in DVC's cache."""
    for file in folder.iterdir():
        if file.is_file() and file.stat().st_nlink > 1:
            copy = file.with_name(f".{file.name}")
            shutil.copyfile(file, copy)
            os.replace(copy, file)
