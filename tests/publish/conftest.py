"""Releases of one small bundle, with parts that change from one to the next, and a store that holds the first."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pipeline.bundle import keys, release
from pipeline.bundle.tiers import TierBundle, TierRefusal, build_tiers
from pipeline.publish import fetch as fetching
from pipeline.publish.push import push
from tests.bundle.conftest import CREATED, WAY, Maker, maker, public_key, stranger  # noqa: F401 (fixtures)

NOW = CREATED + timedelta(days=30)
PARTS = {f"demo_q4.onnx.data.{index}": random.Random(index).randbytes(30_000 + index) for index in range(3)}
SMALL = {"demo_q4.onnx": b"graph" * 100, "genai_config.json": b"{}\n", "README.md": b"---\nlicense: mit\n---\nDemo.\n"}
BUDGET = {"platform": "android", "ram_bytes": 8 << 30, "budget_bytes": 4_000_000_000}


@dataclass(frozen=True)
class Line:
    """Makes releases with one key under one folder."""

    maker: Maker
    root: Path

    def bundle(self, number: int = 7, variant: str = "q4", created: datetime = CREATED, **files: bytes | None) -> Path:
        """A signed bundle. Underscores in `files` stand for the part's number: `part_1=b"…"`."""
        contents = PARTS | SMALL
        for name, data in files.items():
            contents[f"demo_q4.onnx.data.{name.removeprefix('part_')}"] = data
        contents = {name: data for name, data in contents.items() if data is not None}
        where = self.root / f"{variant}-{number}-{len(list(self.root.iterdir()))}"
        sources = self.root / f"{where.name}-sources"
        sources.mkdir(parents=True)
        for name, data in contents.items():
            (sources / name).write_bytes(data)
        paths = {name: sources / name for name in contents}
        (sources / "unused").mkdir()  # where the maker writes files of its own
        document = self.maker.document(
            sources / "unused",
            variant=variant,
            created=created,
            signing=self.maker.config.model_copy(update={"release": number}),
            files=release.describe_files(paths),
        )
        return self.maker.write(where, document, paths)

    def tiers(self, bundle: Path, number: int = 7) -> Path:
        """A signed tiers folder: `big` gets `bundle`, `small` nothing."""
        where = self.root / f"tiers-{number}-{len(list(self.root.iterdir()))}"
        document = build_tiers(
            **self.maker.stamp | {"signing": self.maker.config.model_copy(update={"release": number})},
            context=2048,
            decisions={
                "big": TierBundle(
                    **BUDGET, variant="q4", way=WAY, need_bytes=300, mapped_bytes=0, bundle_bytes=200, kl_mean=0.1
                ),
                "small": TierRefusal(**BUDGET, shortfall_bytes=500_000_000, reasons=["q4: too big"]),
            },
            signatures={"q4": hashlib.sha256((bundle / "model.sig").read_bytes()).hexdigest()},
        )
        return self.maker.write(where, document)


@pytest.fixture
def line(maker: Maker, tmp_path: Path) -> Line:  # noqa: F811
    """The release line of the trusted key."""
    (tmp_path / "line").mkdir()
    return Line(maker, tmp_path / "line")


@pytest.fixture
def store(line: Line, public_key: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A folder that holds release 7."""
    push(line.bundle(), str(tmp_path / "store"), public_key, now=NOW)
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", fetching.PATIENCE.new(backoff_factor=0.0, backoff_jitter=0.0))


@pytest.fixture
def other_key(stranger: Maker, tmp_path: Path) -> Path:  # noqa: F811
    """Another public key than the one that signed."""
    keys.export_public_key(stranger.key, tmp_path / "other.pem")
    return tmp_path / "other.pem"
