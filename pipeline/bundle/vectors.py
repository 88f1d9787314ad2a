"""Test vectors: bundles, good and spoilt, with what every verifier of ours must say about them.

vectors.yaml has a row for each: what is done to a sample of samples.yaml, and the expected answer. One folder per row
is written: `bundle/`, as it would lie on a phone, and `vector.json`, the question and the answer. The verifiers in
phone/ and `verify` here are tested over all of them, so an app developer's copy can be, too. The same bytes on
every machine: the keys come from constants, and are good for nothing but this.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from jsonpointer import JsonPointer, resolve_pointer, set_pointer
from pydantic import Field, RootModel

from pipeline import files
from pipeline.bundle.keys import SigningKey, key_id, public_pem, software_key
from pipeline.bundle.release import CONTENT, SIGNATURE, KeyIdentity
from pipeline.bundle.signing import pae, root_digest, sign
from pipeline.bundle.verify import Kind
from pipeline.config.typed_yaml import Frozen, load, read
from pipeline.errors import BundleError

BUNDLE = "bundle"
VECTOR = "vector.json"
FILES = {
    "demo.onnx": b"graph" * 100,
    "demo.onnx.data.0": bytes(range(256)) * 16,
    "demo.onnx.data.1": bytes(range(255, -1, -1)) * 16,
    "genai_config.json": b'{"model": {}}\n',
    "LICENSE": b"Terms.\n",
}
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256


@cache
def known_key(name: str) -> SigningKey:
    """TEST KEY, known to everybody: a P-256 key whose private half is the hash of a constant. Never trust it."""
    seed = hashlib.sha256(f"TEST KEY, NEVER TRUST: {name}".encode()).digest()
    private = ec.derive_private_key(int.from_bytes(seed, "big") % (_ORDER - 1) + 1, ec.SECP256R1())
    kind: Literal["development", "release"] = "development" if name == "development" else "release"
    return SigningKey(KeyIdentity(id=key_id(private.public_key()), kind=kind), *software_key(private))


def write_sample(folder: Path, document: str = "release", key: str = "current", signer: str | None = None) -> None:
    """A bundle with a document of samples.yaml that names the test key `key`, signed by it or by `signer`."""
    content, named, after = folder / CONTENT, known_key(key).identity, known_key("next").identity
    fields = read(Path(__file__).with_name("samples.yaml"))[document]
    fields |= {"channel": named.kind, "key": named.model_dump(), "next_key_id": after.id if named != after else None}
    content.mkdir(parents=True)
    if document == "release":
        fields["files"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
        }
        for name, data in FILES.items():
            (content / name).write_bytes(data)
    files.write_json(content / f"{document}.json", fields)
    sign(content, folder / SIGNATURE, known_key(signer or key))


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
    """A row of vectors.yaml: `of` is the sample, `finds` the expected kind of finding by file, empty if it is good."""

    title: str
    of: dict[str, str] = Field(default={})
    do: list[dict[str, Any]] = Field(default=[])
    ask: Question = Question()
    finds: dict[str, Kind] = Field(default={})

    def make(self, folder: Path) -> None:
        """Write the bundle to `folder`."""
        write_sample(folder, **self.of)
        for step in self.do:
            for name, arguments in step.items():
                _STEPS[name](folder, *(arguments if isinstance(arguments, list) else [arguments]))

    def description(self) -> dict[str, Any]:
        """vector.json"""
        asked = self.ask.model_dump()
        # A key as an app pins it: base64 of its DER SubjectPublicKeyInfo, which is its PEM file without the armour.
        pems = [public_pem(known_key(name).public_key).decode() for name in asked.pop("pinned")]
        keys = ["".join(pem.splitlines()[1:-1]) for pem in pems]
        findings = sorted([str(kind), file] for file, kind in self.finds.items())
        return asked | {"title": self.title, "pinned_keys": keys, "findings": findings}


# --- steps: each takes the bundle's folder and the arguments of vectors.yaml -----------------------------------------


def _write(folder: Path, name: str, text: str, times: int = 1, mode: str = "wb") -> None:
    """A file of `text`, a byte for each character, so many times."""
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, mode) as file:
        file.write(text.encode("latin-1") * times)


def _flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def _replace(folder: Path, name: str, old: str, new: str) -> None:
    before, after = (folder / name).read_text().split(old, 1)
    (folder / name).write_text(before + new + after)


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


def _edit(folder: Path, name: str, changes: dict[str, Any], *dropped: str) -> None:
    with _json(folder / name) as value:
        _change(value, changes)
        for holder, key in (JsonPointer(pointer).to_last(value) for pointer in dropped):
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
    "append": partial(_write, mode="ab"),
    "cut": lambda folder, name, size: os.truncate(folder / name, size),
    "flip": _flip,
    "replace": _replace,
    "remove": _remove,
    "move": lambda folder, name, target: (folder / name).rename(folder / target),
    "copy": lambda folder, name, target: shutil.copyfile(folder / name, folder / target),
    "link": lambda folder, name, target: (folder / name).symlink_to(target),
    "edit": _edit,
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
