"""A tiny shop: two signed bundles of one model and the signed map of tiers, as store packs of a few kilobytes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.bundle import release
from pipeline.bundle.tiers import TierBundle, TierRefusal, TiersDocument, build_tiers
from pipeline.files import sha256_of
from pipeline.packs.android import AndroidIndex, plan_android, write_android
from pipeline.packs.delivery import Packable, packable
from pipeline.packs.ios import IosIndex, plan_ios, write_ios
from tests.bundle.conftest import CREATED, FILES, WAY

MODEL = "demo"
PACK_BYTES = 30_000  # one data part of 16,384 bytes and the small files
SMALL = [name for name in FILES if not name.endswith(".data.1")]
GB = 10**9


@dataclass(frozen=True)
class Shop:
    """The verified inputs of both stores, and where they lie signed."""

    document: TiersDocument
    bundles: dict[str, Packable]
    folders: dict[str, Path]
    tiers: Path

    @property
    def android(self) -> AndroidIndex:
        return plan_android(self.document, self.bundles, PACK_BYTES)

    @property
    def ios(self) -> IosIndex:
        return plan_ios(self.document, self.bundles, PACK_BYTES)

    def write_android(self, folder: Path) -> Path:
        write_android(folder, self.android, self.bundles)
        return folder

    def write_ios(self, folder: Path) -> Path:
        write_ios(folder, self.ios, self.bundles)
        return folder


def tier(platform: str, ram: float, variant: str | None) -> TierBundle | TierRefusal:
    """A class from `ram` GB on that gets `variant`, or nothing."""
    common: dict[str, Any] = {"platform": platform, "ram_bytes": round(ram * GB), "budget_bytes": round(ram * GB) // 2}
    if variant is None:
        return TierRefusal(**common, shortfall_bytes=GB, reasons=["q3: needs 9 GB"])
    need, kl = {"q3": (2 * GB, 0.2), "q4": (4 * GB, 0.1)}[variant]
    return TierBundle(**common, variant=variant, way=WAY, need_bytes=need, mapped_bytes=0, bundle_bytes=GB, kl_mean=kl)


TIERS = {
    "android-4gb": tier("android", 3.5, None),
    "android-6gb": tier("android", 5.25, "q3"),
    "android-8gb": tier("android", 7, "q3"),
    "android-12gb": tier("android", 10.5, "q4"),
    "android-16gb": tier("android", 14, "q4"),
    "ios-8gb": tier("ios", 8, "q3"),
    "ios-12gb": tier("ios", 12, "q4"),
}


def open_shop(
    maker: Any, where: Path, tiers: dict[str, TierBundle | TierRefusal] = TIERS, created: datetime = CREATED
) -> Shop:
    """Make and sign everything under `where`: q3 with one data part, q4 with two."""
    folders = {}
    for variant, names in (("q3", SMALL), ("q4", list(FILES))):
        folders[variant] = where / "bundles" / variant
        sources = where / f"{variant}-sources"
        sources.mkdir(parents=True)
        maker.document(sources)  # writes the files
        paths = {name: sources / name for name in names}
        files = release.describe_files(paths)
        document = maker.document(sources, variant=variant, created=created, files=files)
        maker.write(folders[variant], document, paths)
    decided = build_tiers(
        **maker.stamp | {"created": created},
        context=2048,
        decisions=tiers,
        signatures={variant: sha256_of(folder / "model.sig") for variant, folder in folders.items()},
    )
    maker.write(where / "tiers", decided)
    bundles = {
        variant: packable(
            folder,
            release.Release.model_validate_json((folder / "content/release.json").read_bytes()),
            where / "tiers",
        )
        for variant, folder in folders.items()
    }
    return Shop(decided, bundles, folders, where / "tiers")
