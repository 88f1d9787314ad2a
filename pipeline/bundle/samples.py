"""Bundles made to be looked at, good ones and spoilt ones, with test keys that everybody knows.

What `vectors` writes. A way to spoil takes the folder that a bundle is to be made in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline import files
from pipeline.bundle import release, tiers
from pipeline.bundle.keys import SigningKey, key_id
from pipeline.bundle.release import CONTENT, SIGNATURE, KeyIdentity, Runtime
from pipeline.bundle.signing import pae, root_digest, sign
from pipeline.config.signing import SigningConfig

BUNDLE = "bundle"
_CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
RELEASE, PART, OTHER_PART = "content/release.json", "content/demo.onnx.data.0", "content/demo.onnx.data.1"
FILES = {
    "demo.onnx": b"graph" * 100,
    "demo.onnx.data.0": bytes(range(256)) * 16,
    "demo.onnx.data.1": bytes(range(255, -1, -1)) * 16,
    "genai_config.json": b'{"model": {}}\n',
    "LICENSE": b"Terms.\n",
}


# --- keys and bundles ------------------------------------------------------------------------------------------------


def known_key(name: str) -> SigningKey:
    """TEST KEY, known to everybody: a P-256 key whose private half is the hash of a constant. Never trust it."""
    seed = hashlib.sha256(f"TEST KEY, NEVER TRUST: {name}".encode()).digest()
    private = ec.derive_private_key(int.from_bytes(seed, "big") % (_ORDER - 1) + 1, ec.SECP256R1())
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    public = private.public_key()
    identity = KeyIdentity(id=key_id(public), kind="development" if name == "development" else "release")
    return SigningKey(identity, public, lambda message: private.sign(message, algorithm))


def pinned(name: str) -> str:
    """A key as an app pins it: base64 of its DER SubjectPublicKeyInfo, which is its PEM file without the armour."""
    der = known_key(name).public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return base64.b64encode(der).decode()


def _stamped(key: SigningKey) -> dict[str, Any]:
    development = key.identity.kind == "development"
    signing = SigningConfig(
        channel="development" if development else "release",
        key_id="development" if development else key.identity.id,
        next_key_id=known_key("next").identity.id if key.identity.id != known_key("next").identity.id else None,
        release=7,
        expires_days=365,
        min_app_version=10,
        max_app_version=20,
    )
    return {"model": "demo", "signing": signing, "key": key.identity, "created": _CREATED}


@cache
def _bundle_bytes(key_name: str, signer_name: str) -> dict[str, bytes]:
    """Files of a good bundle by their path in it."""
    with tempfile.TemporaryDirectory() as name:
        folder, sources = Path(name) / BUNDLE, {file: Path(name) / file for file in FILES}
        for file, data in FILES.items():
            sources[file].write_bytes(data)
        document = release.build_release(
            **_stamped(known_key(key_name)),
            title="Demo",
            variant="q4",
            runtime=Runtime(onnxruntime="1.31.1", onnxruntime_genai="0.18.0", opset=21),
            source={"revision": "a" * 40, "files": {"model.safetensors": "b" * 64}},
            licence="MIT",
            context=2048,
            kv_cache="float32",
            tiers=["android-8gb", "ios-8gb"],
            verdict={"verdict": "PASS", "kl_mean": 0.05},
            files=release.describe_files(sources),
        )
        release.assemble(folder / CONTENT, sources, document)
        sign(folder / CONTENT, folder / SIGNATURE, known_key(signer_name))
        written = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in written}


def write_bundle(folder: Path, key: str = "current", signer: str | None = None) -> Path:
    """A good bundle, signed by `signer` (default: the test key that its document names)."""
    (folder / CONTENT).mkdir(parents=True)
    for name, data in _bundle_bytes(key, signer or key).items():
        (folder / name).write_bytes(data)
    return folder


def write_refusal(folder: Path) -> None:
    key = known_key("current")
    fields = {"title": "Demo", "variant": "q4", "verdict": {"verdict": "FAIL"}, "reasons": ["mean KL 0.31, limit 0.10"]}
    release.assemble(folder / CONTENT, {}, release.build_refusal(**_stamped(key), **fields))
    sign(folder / CONTENT, folder / SIGNATURE, key)


def write_tiers(folder: Path) -> None:
    key = known_key("current")
    choice = tiers.TierBundle(
        platform="android",
        ram_bytes=7_000_000_000,
        budget_bytes=3_850_000_000,
        variant="q4",
        need_bytes=3_000_000_000,
        bundle_bytes=2_000_000_000,
        kl_mean=0.05,
    )
    document = tiers.build_tiers(
        **_stamped(key), context=2048, decisions={"android-8gb": choice}, signatures={"q4": "e" * 64}
    )
    release.assemble(folder / CONTENT, {}, document)
    sign(folder / CONTENT, folder / SIGNATURE, key)


# --- ways to spoil one, without a key --------------------------------------------------------------------------------


def spoilt(spoil: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: spoil(write_bundle(folder))


def flipped(name: str) -> Callable[[Path], Any]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return spoilt(flip)


def added(name: str, data: bytes = b"evil") -> Callable[[Path], Any]:
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return spoilt(add)


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return spoilt(lambda folder: os.truncate(folder / name, size))


def append_evil(folder: Path) -> None:
    with open(folder / PART, "ab") as file:
        file.write(b"evil")


def exchange_parts(folder: Path) -> None:
    one, other = (folder / PART).read_bytes(), (folder / OTHER_PART).read_bytes()
    (folder / PART).write_bytes(other)
    (folder / OTHER_PART).write_bytes(one)


def linked(name: str, target: str) -> Callable[[Path], Any]:
    """What lies at `name` moves beside the bundle, and a link to it takes its place: the same bytes as before."""

    def link(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(target)

    return spoilt(link)


def to_folder(folder: Path) -> None:
    (folder / PART).unlink()
    (folder / PART).mkdir()
    (folder / PART / "data").write_bytes(b"evil")  # archives do not keep empty folders


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """The signature file with an edit that its signature does not cover, or covers no longer."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / SIGNATURE).read_text())
        change(value)
        files.write_json(folder / SIGNATURE, value)

    return spoilt(edit)


def restated(change: Callable[[dict[str, Any]], Any], signer: SigningKey | None = None) -> Callable[[Path], Any]:
    """An edited statement: under its old signature, or signed again by `signer`."""

    def edit(value: dict[str, Any]) -> None:
        envelope = value["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        change(statement)
        payload = json.dumps(statement, sort_keys=True).encode()
        envelope["payload"] = base64.b64encode(payload).decode()
        if signer:
            envelope["signatures"][0]["sig"] = base64.b64encode(signer.sign(pae(payload))).decode()

    return edited(edit)


def with_text(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def replace(folder: Path) -> None:
        text = (folder / name).read_text()
        if text.count(old) < 1:
            raise AssertionError(f"{name} holds no {old!r}")
        (folder / name).write_text(text.replace(old, new, 1))

    return spoilt(replace)


def first_signature(value: dict[str, Any]) -> dict[str, Any]:
    return value["dsseEnvelope"]["signatures"][0]


def accept_evil(statement: dict[str, Any]) -> None:
    resources = statement["predicate"]["resources"]
    resources[1]["digest"] = hashlib.sha256(b"evil").hexdigest()
    statement["subject"][0]["digest"]["sha256"] = root_digest([item["digest"] for item in resources])


def list_again(name: str, digest: str) -> Callable[[dict[str, Any]], Any]:
    """One more file in the statement, with the root digest that belongs to that."""

    def change(statement: dict[str, Any]) -> None:
        resources = statement["predicate"]["resources"]
        resources.append({"name": name, "algorithm": "sha256", "digest": digest})
        statement["subject"][0]["digest"]["sha256"] = root_digest([item["digest"] for item in resources])

    return change


# --- mistakes of somebody who can sign -------------------------------------------------------------------------------


def mistaken(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """release.json edited and signed again with the trusted key."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / RELEASE).read_text())
        change(value)
        files.write_json(folder / RELEASE, value)
        sign(folder / CONTENT, folder / SIGNATURE, known_key("current"))

    return spoilt(edit)


def mistaken_text(old: str, new: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        with_text(RELEASE, old, new)(folder)
        sign(folder / CONTENT, folder / SIGNATURE, known_key("current"))

    return make


def two_documents(folder: Path) -> None:
    shutil.copyfile(folder / RELEASE, folder / "content/refusal.json")
    sign(folder / CONTENT, folder / SIGNATURE, known_key("current"))


def no_document(folder: Path) -> None:
    (folder / RELEASE).unlink()
    sign(folder / CONTENT, folder / SIGNATURE, known_key("current"))
