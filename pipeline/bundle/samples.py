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
from pipeline.bundle.release import CONTENT, SIGNATURE, KeyIdentity, Refusal, Runtime, Stamp
from pipeline.bundle.signing import sign
from pipeline.config.signing import SigningConfig

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
TIER = tiers.TierBundle(
    platform="android",
    ram_bytes=7_000_000_000,
    budget_bytes=3_850_000_000,
    variant="q4",
    need_bytes=3_000_000_000,
    bundle_bytes=2_000_000_000,
    kl_mean=0.05,
)


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
    signing = SigningConfig(
        channel=key.kind,
        key_id="development" if key.kind == "development" else key.id,
        next_key_id=following.id if key != following else None,
        release=7,
        expires_days=365,
        min_app_version=10,
        max_app_version=20,
    )
    return {"model": "demo", "signing": signing, "key": key, "created": CREATED}


def release_document(sources: Mapping[str, Path], **fields: Any) -> release.Release:
    """release.json of the files at `sources`; `fields` are `stamped`, and what shall differ from the sample."""
    defaults = {
        "title": "Demo",
        "variant": "q4",
        "runtime": Runtime(onnxruntime="1.31.1", onnxruntime_genai="0.18.0", opset=21),
        "source": {"revision": "a" * 40, "files": {"model.safetensors": "b" * 64}},
        "licence": "MIT",
        "context": 2048,
        "kv_cache": "float32",
        "tiers": ["android-8gb", "ios-8gb"],
        "verdict": {"verdict": "PASS", "kl_mean": 0.05},
        "files": release.describe_files(sources),
    }
    return release.build_release(**(defaults | fields))


def refusal_document(**stamp: Any) -> Refusal:
    """refusal.json"""
    reasons = ["mean KL 0.31, limit 0.10"]
    return release.make(Refusal, **stamp, title="Demo", variant="q4", verdict={"verdict": "FAIL"}, reasons=reasons)


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
    fields: dict[str, Any] = {"context": 2048, "decisions": {"android-8gb": TIER}, "signatures": {"q4": "e" * 64}}
    write_signed(folder, {}, tiers.build_tiers(**stamped("current"), **fields), known_key("current"))


SAMPLES: dict[str, Callable[[Path], None]] = {
    "bundle": write_bundle,
    "by-next": partial(write_bundle, key="next"),
    "by-development": partial(write_bundle, key="development"),
    "by-stranger": partial(write_bundle, signer="stranger"),
    "refusal": write_refusal,
    "tiers": write_tiers,
}
