"""Background Assets of iOS 26: one asset pack per part of a bundle, its manifest, and the commands for a Mac.

iOS targets nothing by RAM: the folder holds every variant that tiers.json gives to an iOS class, and the app picks one
by `os_proc_available_memory()` from the index. All packs of an app share one namespace, so each has one top folder
with its own name. An id is used once: it names model, variant and release, because a pack that is replaced reaches
every installed version of the app.

The manifest is that of developer.apple.com/documentation/backgroundassets/creating-managed-asset-packs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.bundle.release import Record, WayRecord
from pipeline.bundle.template import render
from pipeline.bundle.tiers import TierBundle, TiersDocument
from pipeline.config.typed_yaml import Name
from pipeline.errors import BundleError
from pipeline.files import write_bytes, write_json
from pipeline.packs.delivery import INDEX, PACK_BYTES, Delivery, Packable, deliver, write_pack

MANIFESTS = "manifests"
ENTITLEMENTS = "App.entitlements"
ENTITLEMENT = "com.apple.developer.kernel.increased-memory-limit"
COMMANDS = "upload.sh"
# Gigabytes are downloaded when the user asks for them, not with the app.
POLICY: dict[str, dict[str, str]] = {"onDemand": {}}


class Choice(Record):
    """A row of the table that the app goes through from the top: the first that fits is taken, and run in its way.

    It fits when `os_proc_available_memory()` is at least `need_bytes`: the measured peak with the KV cache at the way's
    context and the app's own share. `kl_mean` is in nats per token.
    """

    variant: Name
    way: WayRecord
    need_bytes: int = Field(ge=0)
    kl_mean: float

    def order(self) -> tuple[float, str, int]:
        """The best first; of one variant, what needs most: it has more context, or loads what was downloaded."""
        return self.kl_mean, self.variant, -self.need_bytes


class IosIndex(Record):
    """packs.json beside the packs: every delivery by variant, and the table to choose by."""

    platform: Literal["ios"] = "ios"
    model: Name
    release: int = Field(ge=1)
    deliveries: dict[Name, Delivery]
    choices: list[Choice]


def pack_id(model: str, variant: str, release: int, number: int) -> str:
    """Id of an asset pack, such as phi-4-q4-k-m-r7-p2: never with a dot, and never used for other bytes."""
    name = "-".join(re.sub(r"[^a-z0-9]+", "-", part) for part in (model, variant))
    return f"{name if name[0].isalpha() else f'ai-{name}'}-r{release}-p{number}"


def manifest(identifier: str) -> dict[str, Any]:
    """What `xcrun ba-package` reads for one pack."""
    selectors = [{"directory": identifier}]
    return {"assetPackID": identifier, "downloadPolicy": POLICY, "fileSelectors": selectors, "platforms": ["iOS"]}


def plan_ios(document: TiersDocument, bundles: Mapping[str, Packable], pack_bytes: int = PACK_BYTES) -> IosIndex:
    """Packs and table for `document`; `bundles` has every variant that an iOS tier gets.

    Raises:
        BundleError: a file is larger than a pack, or two variants would share an id.
    """
    ours = [tier for tier in document.tiers.values() if isinstance(tier, TierBundle) and tier.platform == "ios"]
    deliveries = {}
    for variant in sorted({tier.variant for tier in ours}):
        name = partial(pack_id, document.model, variant, document.release)
        deliveries[variant] = deliver(bundles[variant], name, pack_bytes)
    names = [pack.name for delivery in deliveries.values() for pack in delivery.packs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BundleError(f"{document.model}: asset packs {', '.join(twice)} would be two. Rename one of the variants.")
    found = {(tier.variant, tier.need_bytes): tier for tier in ours}.values()
    rows = [Choice(**tier.model_dump(include=set(Choice.model_fields))) for tier in found]
    choices = sorted(rows, key=Choice.order)
    return IosIndex(model=document.model, release=document.release, deliveries=deliveries, choices=choices)


def write_ios(folder: Path, index: IosIndex, bundles: Mapping[str, Packable]) -> None:
    """Write packs, manifests, entitlement, commands and index into `folder`, which is empty or absent."""
    for variant, delivery in index.deliveries.items():
        for pack in delivery.packs:
            write_pack(folder / pack.name, delivery, pack, bundles[variant].sources)
            write_json(folder / MANIFESTS / f"{pack.name}.json", manifest(pack.name))
    if index.deliveries:
        packs = [pack.name for delivery in index.deliveries.values() for pack in delivery.packs]
        fields = {"ENTITLEMENT": ENTITLEMENT, "MANIFESTS": MANIFESTS, "packs": packs} | index.model_dump()
        for name in (ENTITLEMENTS, COMMANDS):
            write_bytes(folder / name, render(Path(__file__).with_name(name), **fields))
    write_json(folder / INDEX, index.model_dump(mode="json"))
