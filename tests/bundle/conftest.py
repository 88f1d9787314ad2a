"""A tiny bundle, made and signed once with a release key, and copied for every test that spoils it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.bundle import keys, release
from pipeline.bundle.keys import SigningKey
from pipeline.bundle.release import KeyIdentity
from pipeline.bundle.signing import sign
from pipeline.bundle.tiers import way_record
from pipeline.config.signing import SigningConfig
from pipeline.planning.devices import Way

CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)
FILES = {
    "demo_q4.onnx": b"graph" * 100,
    "demo_q4.onnx.data.0": bytes(range(256)) * 64,
    "demo_q4.onnx.data.1": bytes(range(255, -1, -1)) * 64,
    "genai_config.json": b'{"model": {}}\n',
    "tokenizer.json": b'{"version": "1.0"}\n',
    "LICENSE": b"Terms.\n",
}
WAY = way_record(Way(2048, "float32", "private", 64, 4))
RELEASE = {
    "title": "Demo",
    "variant": "q4",
    "runtime": {"onnxruntime": "1.31.1", "onnxruntime_genai": "0.18.0", "opset": 21},
    "source": {"revision": "a" * 40, "files": {"model.safetensors": "b" * 64}},
    "licence": "MIT",
    "context": 2048,
    "kv_cache": "float32",
    "tiers": {"android-8gb": WAY, "ios-8gb": WAY},
    "verdict": {"verdict": "PASS", "kl_mean": 0.05},
}


def private_pem(private: Any, password: bytes | None = None) -> bytes:
    """PKCS8 PEM, encrypted if a password is given."""
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@dataclass(frozen=True)
class Maker:
    """Whoever holds `private` and makes bundles with it."""

    private: ec.EllipticCurvePrivateKey
    kind: str = "release"

    @property
    def key(self) -> SigningKey:
        identity = KeyIdentity(id=keys.key_id(self.private.public_key()), kind=self.kind)
        return SigningKey(identity, *keys.software_key(self.private))

    @property
    def config(self) -> SigningConfig:
        name = "development" if self.kind == "development" else self.key.identity.id
        return SigningConfig(channel=self.kind, key_id=name, release=7, expires_days=365, min_app_version=1)

    @property
    def stamp(self) -> dict[str, Any]:
        """What every document of this maker says of itself."""
        return {"model": "demo", "signing": self.config, "key": self.key.identity, "created": CREATED}

    def document(self, sources: Path, **changes: Any) -> release.Release:
        """release.json of FILES as written under `sources`."""
        for name, data in FILES.items():
            (sources / name).write_bytes(data)
        files = release.describe_files({name: sources / name for name in FILES})
        return release.build_release(**(self.stamp | RELEASE | {"files": files} | changes))

    def bundle(self, where: Path, **changes: Any) -> Path:
        """A signed bundle at `where`."""
        sources = where.with_name(f"{where.name}-sources")
        sources.mkdir(parents=True)
        return self.write(where, self.document(sources, **changes), {name: sources / name for name in FILES})

    def refusal(self, where: Path) -> Path:
        """A signed refusal at `where`."""
        fields = {"title": "Demo", "variant": "q4", "verdict": {"verdict": "FAIL"}}
        reasons = ["mean KL 0.31, limit 0.10"]
        return self.write(where, release.make(release.Refusal, **self.stamp, **fields, reasons=reasons))

    def write(self, where: Path, document: release.Stamp, files: Mapping[str, Path] = MappingProxyType({})) -> Path:
        """`document` and its files, signed, at `where`."""
        release.assemble(where / "content", files, document)
        self.sign(where)
        return where

    def sign(self, bundle: Path) -> None:
        sign(bundle / "content", bundle / "model.sig", self.key)


@pytest.fixture(scope="session")
def maker() -> Maker:
    """The release key that the phone trusts."""
    return Maker(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="session")
def stranger() -> Maker:
    """Somebody else with a good key."""
    return Maker(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="session")
def good_bundle(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never changed by a test."""
    return maker.bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def bundle(good_bundle: Path, tmp_path: Path) -> Path:
    """A private copy, to be spoilt."""
    return Path(shutil.copytree(good_bundle, tmp_path / "bundle"))


@pytest.fixture
def public_key(maker: Maker, tmp_path: Path) -> Path:
    """The trusted public key as a PEM file."""
    keys.export_public_key(maker.key, tmp_path / "public.pem")
    return tmp_path / "public.pem"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory without signing keys in the environment."""
    for variable in (keys.KEY_FILE, keys.KEY_TEXT, keys.KEY_PKCS11, keys.PASSWORD, "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def pem() -> Callable[..., bytes]:
    """`private_pem`, for tests."""
    return private_pem
