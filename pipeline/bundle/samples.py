"""Small documents and bundles made to be looked at, with test keys that everybody knows: what vectors start from.

Equal arguments give equal bytes on every machine.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.bundle import release, tiers
from pipeline.bundle.keys import SigningKey, key_id, public_pem, software_key
from pipeline.bundle.release import CONTENT, SIGNATURE, KeyIdentity, Refusal, Stamp
from pipeline.bundle.signing import sign
from pipeline.config.signing import SigningConfig
from pipeline.config.typed_yaml import read

BUNDLE = "bundle"
CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
FILES = {
    "demo.onnx": b"graph" * 100,
    "demo.onnx.data.0": bytes(range(256)) * 16,
    "demo.onnx.data.1": bytes(range(255, -1, -1)) * 16,
    "genai_config.json": b'{"model": {}}\n',
    "LICENSE": b"Terms.\n",
}
_FIELDS: dict[str, dict[str, Any]] = read(Path(__file__).with_suffix(".yaml"))


# --- keys ------------------------------------------------------------------------------------------------------------


@cache
def known_key(name: str) -> SigningKey:
    """TEST KEY, known to everybody: a P-256 key whose private half is the hash of a constant. Never trust it."""
    seed = hashlib.sha256(f"TEST KEY, NEVER TRUST: {name}".encode()).digest()
    private = ec.derive_private_key(int.from_bytes(seed, "big") % (_ORDER - 1) + 1, ec.SECP256R1())
    kind: Literal["development", "release"] = "development" if name == "development" else "release"
    return SigningKey(KeyIdentity(id=key_id(private.public_key()), kind=kind), *software_key(private))


def pinned(name: str) -> str:
    """A key as an app pins it: base64 of its DER SubjectPublicKeyInfo, which is its PEM file without the armour."""
    return "".join(public_pem(known_key(name).public_key).decode().splitlines()[1:-1])


# --- documents: `stamped` are their model, signing configuration, key and time ----------------------------------------


def stamped(name: str) -> dict[str, Any]:
    """What `release.make` wants for every document, for a test key: release 7 of "demo" for app versions 10 to 20."""
    key, following = known_key(name).identity, known_key("next").identity
    named = "development" if key.kind == "development" else key.id
    after = following.id if key != following else None
    signing = SigningConfig(channel=key.kind, key_id=named, next_key_id=after, **_FIELDS["signing"])
    return {"model": "demo", "signing": signing, "key": key, "created": CREATED}


def release_document(sources: Mapping[str, Path], **fields: Any) -> release.Release:
    """release.json of the files at `sources`; `fields` are `stamped`, and what shall differ from the sample."""
    return release.build_release(**(_FIELDS["release"] | {"files": release.describe_files(sources)} | fields))


def refusal_document(**stamp: Any) -> Refusal:
    """refusal.json"""
    return release.make(Refusal, **stamp, **_FIELDS["refusal"])


# --- folders ---------------------------------------------------------------------------------------------------------


def write_signed(folder: Path, files: Mapping[str, Path], document: Stamp, key: SigningKey) -> Path:
    """`document` and its `files` as a bundle in `folder`, signed with `key`."""
    release.assemble(folder / CONTENT, files, document)
    sign(folder / CONTENT, folder / SIGNATURE, key)
    return folder


def write_bundle(folder: Path, key: str = "current", signer: str | None = None) -> None:
    """A good bundle, signed by `signer` (default: the test key that its document names)."""
    with tempfile.TemporaryDirectory() as name:
        sources = {file: Path(name) / file for file in FILES}
        for file, data in FILES.items():
            sources[file].write_bytes(data)
        write_signed(folder, sources, release_document(sources, **stamped(key)), known_key(signer or key))


def write_refusal(folder: Path) -> None:
    """A refusal in place of a bundle."""
    write_signed(folder, {}, refusal_document(**stamped("current")), known_key("current"))


def write_tiers(folder: Path) -> None:
    """A tiers.json that gives one tier one bundle."""
    decisions: tiers.Decisions = {"android-8gb": tiers.TierBundle(**_FIELDS["android-8gb"])}
    document = tiers.build_tiers(**stamped("current"), **_FIELDS["tiers"], decisions=decisions)
    write_signed(folder, {}, document, known_key("current"))


SAMPLES: dict[str, Callable[[Path], None]] = {
    "bundle": write_bundle,
    "by-next": partial(write_bundle, key="next"),
    "by-development": partial(write_bundle, key="development"),
    "by-stranger": partial(write_bundle, signer="stranger"),
    "refusal": write_refusal,
    "tiers": write_tiers,
}
