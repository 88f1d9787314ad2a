"""Test vectors: bundles, good and spoilt, with what every verifier of ours must say about them.

vectors.yaml has a row for each: the sample that it starts from, what is done to it, and the expected answer. One folder
per row is written: `bundle/`, as it would lie on a phone, and `vector.json`, the question and the answer. The verifiers
in verifiers/ and `verify` here are tested over all of them, so an app developer's copy can be, too. The same bytes on
every machine: the keys come from constants, and are good for nothing but this.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonpointer import JsonPointer, resolve_pointer, set_pointer
from pydantic import Field, RootModel

from pipeline import files
from pipeline.bundle.release import CONTENT, SIGNATURE
from pipeline.bundle.samples import BUNDLE, SAMPLES, known_key, pinned
from pipeline.bundle.signing import pae, root_digest, sign
from pipeline.bundle.verify import Kind
from pipeline.config.typed_yaml import Frozen, load
from pipeline.errors import BundleError

VECTOR = "vector.json"


class Question(Frozen):
    """What a verifier is asked; `pinned` are names of test keys."""

    kind: Literal["bundle", "tiers"] = "bundle"
    pinned: tuple[str, ...] = ("current", "next")
    now: str = "2026-03-02T12:00:00Z"
    highest_release: int | None = 7
    allow_development: bool = False
    app_version: int | None = 12
    tier: str | None = "android-8gb"
    model: str | None = "demo"
    variant: str | None = "q4"


class Vector(Frozen):
    """A row of vectors.yaml: `finds` is the expected kind of finding by file, empty if the bundle is good."""

    title: str
    of: str = "bundle"
    do: list[dict[str, Any]] = Field(default=[])
    ask: Question = Question()
    finds: dict[str, Kind] = Field(default={})

    def make(self, folder: Path) -> None:
        """Write the bundle to `folder`."""
        SAMPLES[self.of](folder)
        for step in self.do:
            for name, arguments in step.items():
                _STEPS[name](folder, *(arguments if isinstance(arguments, list) else [arguments]))

    def description(self) -> dict[str, Any]:
        """vector.json"""
        asked = self.ask.model_dump()
        keys = [pinned(name) for name in asked.pop("pinned")]
        findings = sorted([str(kind), file] for file, kind in self.finds.items())
        return asked | {"title": self.title, "pinned_keys": keys, "findings": findings}


# --- steps: each takes the bundle's folder and the arguments of vectors.yaml -----------------------------------------


def _write(folder: Path, name: str, text: str, times: int = 1) -> None:
    """A file of `text`, a byte for each character, so many times."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode("latin-1") * times)


def _append(folder: Path, name: str, text: str) -> None:
    with open(folder / name, "a") as file:
        file.write(text)


def _flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def _replace(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    if old not in text:
        raise AssertionError(f"{name} holds no {old!r}")
    (folder / name).write_text(text.replace(old, new, 1))


def _remove(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


@contextmanager
def _json(path: Path) -> Iterator[Any]:
    """A JSON file's value, to be changed."""
    value = json.loads(path.read_text())
    yield value
    files.write_json(path, value)


def _change(value: Any, changes: dict[str, Any]) -> None:
    """Put what `changes` has for each JSON pointer; `-` is behind a list's end, {as: pointer} a copy of that place."""
    for pointer, new in changes.items():
        copied = isinstance(new, dict) and "as" in new
        set_pointer(value, pointer, resolve_pointer(value, new["as"]) if copied else new)


def _edit(folder: Path, name: str, changes: dict[str, Any]) -> None:
    with _json(folder / name) as value:
        _change(value, changes)


def _drop(folder: Path, name: str, pointer: str) -> None:
    with _json(folder / name) as value:
        holder, key = JsonPointer(pointer).to_last(value)
        del holder[key]


def _state(folder: Path, changes: dict[str, Any], *then: str) -> None:
    """Change the statement, `then` its root digest ("root"), and sign it again with a test key (its name)."""
    with _json(folder / SIGNATURE) as value:
        envelope = value["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        _change(statement, changes)
        if "root" in then:
            digests = [item["digest"] for item in statement["predicate"]["resources"]]
            statement["subject"][0]["digest"]["sha256"] = root_digest(digests)
        payload = json.dumps(statement, sort_keys=True).encode()
        envelope["payload"] = base64.b64encode(payload).decode()
        for key in set(then) - {"root"}:
            envelope["signatures"][0]["sig"] = base64.b64encode(known_key(key).sign(pae(payload))).decode()


_STEPS: dict[str, Callable[..., object]] = {
    "write": _write,
    "append": _append,
    "cut": lambda folder, name, size: os.truncate(folder / name, size),
    "flip": _flip,
    "replace": _replace,
    "remove": _remove,
    "move": lambda folder, name, target: (folder / name).rename(folder / target),
    "copy": lambda folder, name, target: shutil.copyfile(folder / name, folder / target),
    "link": lambda folder, name, target: (folder / name).symlink_to(target),
    "edit": _edit,
    "drop": _drop,
    "state": _state,
    "sign": lambda folder, key: sign(folder / CONTENT, folder / SIGNATURE, known_key(key)),
}


# --- the whole -------------------------------------------------------------------------------------------------------


@cache
def cases() -> dict[str, Vector]:
    """All vectors by the name of their folder."""
    return load(RootModel[dict[str, Vector]], Path(__file__).with_suffix(".yaml")).root


def write(folder: Path) -> list[str]:
    """Write all vectors to `folder`, which appears whole and replaces an earlier one; return their names.

    Raises:
        BundleError: `folder` holds something else than vectors, which would be lost.
        ResourceError: the disk is full or not writable.
    """
    strange = [entry.name for entry in folder.iterdir() if not (entry / VECTOR).is_file()] if folder.is_dir() else []
    if strange:
        raise BundleError(f"{folder} holds {strange[0]!a}, which is no vector. Name a folder of their own.")
    with files.atomic_directory(folder) as temporary:
        for name, vector in cases().items():
            vector.make(temporary / name / BUNDLE)
            files.write_json(temporary / name / VECTOR, vector.description())
    return sorted(cases())
