"""Play for On-device AI: AI-pack modules, targeted by RAM, for an app's Gradle project.

One module per pack. In each module one folder per device group holds that group's files; Play strips the suffix, so
every phone sees `assets/<pack>/…` with its own variant in it. A phone that matches no group is in Play's `other`, whose
folder is empty: a model that does not fit is not downloaded.

The format is that of developer.android.com/google/play/device-targeting and …/on-device-ai; what bundletool and Play
refuse stands in `android_rules`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from pipeline.bundle.release import Record
from pipeline.bundle.template import render
from pipeline.bundle.tiers import TierBundle, TierRefusal, TiersDocument
from pipeline.config.typed_yaml import Name
from pipeline.errors import BundleError
from pipeline.files import write_bytes, write_json
from pipeline.packs.delivery import INDEX, PACK_BYTES, Delivery, Packable, deliver, write_pack

AI_PACK = "com.android.ai-pack"
AGP = "8.10.0"  # the first Android Gradle Plugin with device targeting; AI packs alone need 8.8
FLAG = "android.experimental.enableDeviceTargetingConfigApi=true"
NAMESPACE = "http://schemas.android.com/apk/config"
TARGETING = "device_targeting_config.xml"
OTHER = "other"
PLACEHOLDER = ".gitkeep"  # git, zip and bundletool know no empty folders
SELECTORS = 5  # the most that Play takes in one group

GroupName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z][a-zA-Z0-9_]*$")]


class Selector(Record):
    """Physical memory in bytes: `min_bytes` inclusive, `max_bytes` exclusive, None for no upper end."""

    min_bytes: int = Field(ge=0)
    max_bytes: int | None


class Group(Record):
    """A device group of Play and what it downloads."""

    selectors: list[Selector] = Field(min_length=1, max_length=SELECTORS)
    delivery: Delivery


class AndroidIndex(Record):
    """packs.json beside the modules: the map of all groups. `refused` gives Android tiers without a bundle."""

    platform: Literal["android"] = "android"
    model: Name
    release: int = Field(ge=1)
    groups: dict[GroupName, Group]
    refused: dict[Name, list[str]]


def module_name(model: str, number: int) -> str:
    """Name of a pack and its Gradle module: a letter, then letters, digits and underscores."""
    stem = model.replace("-", "_")
    return f"{stem if stem[0].isalpha() else f'ai_{stem}'}_p{number}"


def ram_groups(tiers: Mapping[str, TierBundle | TierRefusal]) -> dict[str, tuple[str, list[Selector]]]:
    """Device groups of the Android tiers: group name → (variant, RAM ranges).

    One group per variant, so that a bundle is in the app bundle once. Neighbouring classes with one variant share a
    range, classes that are refused have none, and the highest has no upper end. A group is named after its lowest
    class: android-8gb is ram_8gb.

    Raises:
        BundleError: a variant's classes lie in more ranges than Play takes in a group.
    """
    classes = sorted((tier.ram_bytes, name) for name, tier in tiers.items() if tier.platform == "android")
    given = itertools.groupby(classes, key=lambda item: getattr(tiers[item[1]], "variant", None))
    lowest = [(variant, *next(run)) for variant, run in given]
    ends = [*(start for _, start, _ in lowest[1:]), None]
    groups: dict[str, tuple[str, list[Selector]]] = {}
    names: dict[str, str] = {}
    for (variant, start, tier), end in zip(lowest, ends, strict=True):
        if variant is not None:
            name = names.setdefault(variant, "ram_" + re.sub(r"[^a-z0-9]", "_", tier.removeprefix("android-")))
            groups.setdefault(name, (variant, []))[1].append(Selector(min_bytes=start, max_bytes=end))
    for group, (variant, selectors) in groups.items():
        if len(selectors) > SELECTORS:
            many = f"device group {group}: {variant} is for {len(selectors)} separate ranges of RAM"
            most = f"Play takes {SELECTORS} selectors in a group. Merge classes in configs/tiers.yaml"
            raise BundleError(f"{many}, {most}.")
    return groups


def plan_android(
    document: TiersDocument, bundles: Mapping[str, Packable], pack_bytes: int = PACK_BYTES
) -> AndroidIndex:
    """Groups and packs for `document`; `bundles` has every variant that an Android tier gets.

    Raises:
        BundleError: a file is larger than a pack, or a group has too many ranges.
    """
    groups = {}
    for name, (variant, selectors) in ram_groups(document.tiers).items():
        delivery = deliver(bundles[variant], partial(module_name, document.model), pack_bytes)
        groups[name] = Group(selectors=selectors, delivery=delivery)
    refusals = {name: tier for name, tier in document.tiers.items() if isinstance(tier, TierRefusal)}
    refused = {name: tier.reasons for name, tier in refusals.items() if tier.platform == "android"}
    return AndroidIndex(model=document.model, release=document.release, groups=groups, refused=refused)


def write_android(folder: Path, index: AndroidIndex, bundles: Mapping[str, Packable]) -> None:
    """Write modules, Gradle files, device groups and index into `folder`, which is empty or absent."""
    count = max((len(group.delivery.packs) for group in index.groups.values()), default=0)
    modules = [module_name(index.model, number) for number in range(1, count + 1)]
    for number, module in enumerate(modules):
        write_bytes(folder / module / "build.gradle", _render("module.gradle", module=module))
        assets = folder / module / "src" / "main" / "assets"
        for name, group in index.groups.items():
            target, packs = assets / f"{module}#group_{name}", group.delivery.packs
            if number < len(packs):
                write_pack(target, group.delivery, packs[number], bundles[group.delivery.variant].sources)
            else:
                write_bytes(target / PLACEHOLDER, b"")
        write_bytes(assets / f"{module}#group_{OTHER}" / PLACEHOLDER, b"")
    if modules:
        write_bytes(folder / "settings.gradle", _render("settings.gradle", modules=modules))
        write_bytes(folder / "build.gradle", _render("root.gradle"))
        write_bytes(folder / "gradle.properties", f"{FLAG}\n".encode())
        write_bytes(folder / "app" / "build.gradle", _render("app.gradle", modules=modules))
        # RAM is an attribute, and the first matching group in file order wins; ours are disjoint.
        write_bytes(folder / "app" / TARGETING, _render(TARGETING, groups=index.groups))
    write_json(folder / INDEX, index.model_dump(mode="json"))


def _render(name: str, **fields: Any) -> bytes:
    fields |= {"AGP": AGP, "AI_PACK": AI_PACK, "NAMESPACE": NAMESPACE, "OTHER": OTHER, "TARGETING": TARGETING}
    return render(Path(__file__).with_name(name), **fields)
