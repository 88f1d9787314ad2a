"""Every rule that an iOS folder must keep: Apple's for Background Assets, and ours that follow from them.

Limits are of developer.apple.com/help/app-store-connect/reference/apple-hosted-asset-pack-size-limits. They count all
packs of an app that are not archived, earlier releases included: archive what no installed version needs.
"""

from __future__ import annotations

import json
import plistlib
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.packs.delivery import INDEX, Delivery, Pack
from pipeline.packs.ios import COMMANDS, ENTITLEMENT, ENTITLEMENTS, MANIFESTS, IosIndex, pack_id
from pipeline.packs.rules import (
    Found,
    Problem,
    Rule,
    Tree,
    app_versions,
    apply,
    digests,
    joined,
    pack_files,
    readable_index,
    strange_files,
)

TOTAL_LIMIT = 200_000_000_000
PACKS_LIMIT = 100
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KEYS = {"assetPackID", "downloadPolicy", "fileSelectors", "platforms"}
_POLICIES = ("essential", "onDemand", "prefetch")
_EVENTS = ({"firstInstallation"}, {"subsequentUpdate"}, {"firstInstallation", "subsequentUpdate"})


class IosTree(Tree[IosIndex]):
    """A folder as `write_ios` writes it, whoever wrote or edited it. `previous` is the folder of an earlier release."""

    def __init__(self, folder: Path, previous: Path | None = None):
        super().__init__(folder, IosIndex)
        self.previous = Tree(previous, IosIndex) if previous is not None else None

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any] | str]:
        """Manifest path → its object, or what is wrong with it."""
        found: dict[str, dict[str, Any] | str] = {}
        for name in self.below(MANIFESTS):
            try:
                value = json.loads(self.text(f"{MANIFESTS}/{name}"))
                found[f"{MANIFESTS}/{name}"] = value if isinstance(value, dict) else "expected a JSON object"
            except (ValueError, RecursionError) as error:
                found[f"{MANIFESTS}/{name}"] = f"it is no JSON: {error}"
        return found

    @cached_property
    def readable(self) -> dict[str, dict[str, Any]]:
        """The manifests that could be read."""
        return {path: value for path, value in self.manifests.items() if isinstance(value, dict)}

    @cached_property
    def deliveries(self) -> dict[str, Delivery]:
        """Variant → delivery of the index; nothing when it is damaged."""
        return {} if isinstance(self.index, str) else self.index.deliveries

    @cached_property
    def first_folders(self) -> dict[str, Delivery]:
        """Where each delivery's first pack lies."""
        return {delivery.packs[0].name: delivery for delivery in self.deliveries.values()}

    @cached_property
    def tops(self) -> list[str]:
        """Top folders that hold packs' files."""
        tops = {path.split("/")[0] for path in self.sizes if "/" in path}
        return sorted(tops - {MANIFESTS, "build"})


def _identifier(value: dict[str, Any]) -> str:
    return str(value.get("assetPackID", ""))


# --- manifests -------------------------------------------------------------------------------------------------------


def _manifest(tree: IosTree) -> Found:
    for path, value in tree.manifests.items():
        if isinstance(value, str):
            yield path, value
        elif value.keys() != _KEYS:
            yield path, f"expected the keys {', '.join(sorted(_KEYS))}, found {', '.join(sorted(value))}"


def _id(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        name = value.get("assetPackID")
        if not isinstance(name, str) or not _ID.fullmatch(name):
            yield path, f"assetPackID {name!r} must be letters, digits, '-' and '_', without dots, from a letter on"


def _id_unique(tree: IosTree) -> Found:
    for name, count in Counter(map(_identifier, tree.readable.values())).items():
        if count > 1:
            yield MANIFESTS, f"{count} manifests have the assetPackID {name!r}"


def _id_names(tree: IosTree) -> Found:
    for variant, delivery in tree.deliveries.items():
        for number, pack in enumerate(delivery.packs, 1):
            wanted = pack_id(delivery.model, variant, delivery.release, number)
            if pack.name != wanted:
                yield INDEX, f"pack {pack.name} of {variant}: the id must name model, variant and release: {wanted}"


def _policy(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        policy = value.get("downloadPolicy")
        if not isinstance(policy, dict) or len(policy) != 1 or next(iter(policy)) not in _POLICIES:
            yield path, f"downloadPolicy is {policy!r}: exactly one of {', '.join(_POLICIES)}"
            continue
        kind, options = next(iter(policy.items()))
        if kind == "onDemand" and options != {}:
            yield path, f"downloadPolicy onDemand takes no options, found {options!r}"
        elif kind != "onDemand" and not _has_events(options):
            yield path, f"downloadPolicy {kind} needs installationEventTypes (firstInstallation, subsequentUpdate)"


def _has_events(options: Any) -> bool:
    events = options.get("installationEventTypes") if isinstance(options, dict) else None
    return isinstance(events, list) and set(map(str, events)) in _EVENTS


def _platforms(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        if value.get("platforms") != ["iOS"]:
            yield path, f"platforms is {value.get('platforms')!r}, expected ['iOS']"


def _selectors(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        selectors, name = value.get("fileSelectors"), _identifier(value)
        if selectors != [{"directory": name}]:
            message = f"fileSelectors is {selectors!r}, expected the one folder {name!r}: all packs share one namespace"
            yield path, message
        elif name not in tree.tops:
            yield path, f"it selects the folder {name}, which is not there"


def _every_pack(tree: IosTree) -> Found:
    names = {_identifier(value) for value in tree.readable.values()}
    indexed = {pack.name for delivery in tree.deliveries.values() for pack in delivery.packs}
    for top in sorted(set(tree.tops) - names):
        yield top, "no manifest selects this folder: it would not be uploaded"
    for name in sorted((names ^ indexed) if not isinstance(tree.index, str) else ()):
        yield INDEX, f"pack {name} is in only one of index and manifests"


def _unsorted(tree: IosTree) -> Found:
    known = {INDEX, ENTITLEMENTS, COMMANDS}
    for path in tree.sizes:
        if "/" not in path and path not in known:
            yield path, "a file in no pack's folder: no manifest selects it"


def _entitlement(tree: IosTree) -> Found:
    try:
        value = plistlib.loads(tree.text(ENTITLEMENTS).encode())
    except Exception as error:  # plistlib raises what its parsers raise
        yield ENTITLEMENTS, f"no property list: {error}"
        return
    if not isinstance(value, dict) or value.get(ENTITLEMENT) is not True:
        yield ENTITLEMENTS, f"{ENTITLEMENT} is not true: without it an app has about 3 GB, whatever the phone has"


# --- ids are for ever ------------------------------------------------------------------------------------------------


def _packs(index: IosIndex) -> dict[str, Pack]:
    return {pack.name: pack for delivery in index.deliveries.values() for pack in delivery.packs}


def _immutable(tree: IosTree) -> Found:
    """Ids of the earlier release with other bytes now."""
    if tree.previous is None or isinstance(tree.index, str):
        return
    if isinstance(tree.previous.index, str):
        yield INDEX, f"the earlier release {tree.previous.folder.name} cannot be compared: {tree.previous.index}"
        return
    earlier = _packs(tree.previous.index)
    for name, pack in _packs(tree.index).items():
        if name in earlier and earlier[name].digest != pack.digest:
            was, now = earlier[name].digest, pack.digest
            yield name, f"this id was published with digest {was}, now it has {now}: raise the release number"


# --- sizes and index -------------------------------------------------------------------------------------------------


def _pack_count(tree: IosTree) -> Found:
    if len(tree.tops) > PACKS_LIMIT:
        yield ".", f"{len(tree.tops)} packs, App Store Connect takes {PACKS_LIMIT} an app"


def _total(tree: IosTree) -> Found:
    size = sum(sum(tree.below(top).values()) for top in tree.tops)
    if size > TOTAL_LIMIT:
        yield ".", f"{size:,} bytes, {size - TOTAL_LIMIT:,} over Apple's {TOTAL_LIMIT:,} for all packs of an app"


def _packs_as_indexed(tree: IosTree) -> Found:
    for delivery in tree.deliveries.values():
        for number, pack in enumerate(delivery.packs):
            yield from pack_files(tree, pack.name, delivery, number)


def _choices(tree: IosTree) -> Found:
    if isinstance(tree.index, str):
        return
    rows = tree.index.choices
    if sorted(row.variant for row in rows) != sorted(tree.deliveries):
        yield INDEX, "choices and deliveries name different variants: the app could pick one that is not there"
    if rows != sorted(rows, key=lambda row: (row.kl_mean, row.need_bytes, row.variant)):
        yield INDEX, "choices must go from the lowest KL to the highest: the app takes the first that fits"


RULES: tuple[Rule[IosIndex], ...] = (
    Rule("regular-files", "ba-package: regular files and folders only", strange_files),
    Rule("manifest", "Apple: a manifest is a JSON object with the four keys", _manifest),
    Rule("id", "Apple: ids have no dots", _id),
    Rule("id-unique", "Apple: one manifest per id", _id_unique),
    Rule("id-names", "ours: an id names model, variant, release and number", _id_names),
    Rule("policy", "Apple: exactly one download policy", _policy),
    Rule("platforms", "ours: packs are for iOS", _platforms),
    Rule("selectors", "ours: one top folder per pack, as all packs share one namespace", _selectors),
    Rule("every-pack", "ours: folders, manifests and index name the same packs", _every_pack),
    Rule("no-stray-files", "ours: every file is in a pack's folder", _unsorted),
    Rule("entitlement", "Apple: the increased memory limit is an entitlement", _entitlement),
    Rule("immutable", "ours: an id never gets other bytes", _immutable),
    Rule("pack-count", f"Apple: {PACKS_LIMIT} packs", _pack_count),
    Rule("total-200gb", "Apple: 200 GB for all packs", _total),
    Rule("index", "ours: packs.json is there and readable", readable_index),
    Rule("index-files", "ours: each pack holds what the index says, to the byte", _packs_as_indexed),
    Rule(
        "index-digests",
        "ours: sizes and digests of the index follow from its files",
        lambda t: digests(t.deliveries.values()),
    ),
    Rule("choices", "ours: the table to pick by is complete and sorted", _choices),
    Rule("joins", "ours: each variant's packs join to one whole bundle", lambda tree: joined(tree, tree.first_folders)),
    Rule(
        "app-versions",
        "ours: the index repeats the signed release",
        lambda tree: app_versions(tree, tree.first_folders),
    ),
)


def check_ios(folder: Path, previous: Path | None = None) -> list[Problem]:
    """Every rule that `folder` breaks; `previous` is an earlier release's folder, whose ids must keep their bytes.

    An index without deliveries has no packs: nothing ships, and nothing is wrong.

    Raises:
        BundleError: a folder cannot be read.
    """
    tree = IosTree(folder, previous)
    if not isinstance(tree.index, str) and not tree.index.deliveries and tree.sizes.keys() == {INDEX}:
        return []
    return apply(RULES, tree)


def describe_ios(folder: Path) -> str:
    """What each variant's packs take, against the limits."""
    tree = IosTree(folder)
    size = sum(sum(tree.below(top).values()) for top in tree.tops)
    share = f"{size:,} bytes, {size / TOTAL_LIMIT:.2%} of {TOTAL_LIMIT / 10**9:.0f} GB"
    lines = [f"{folder}: packs: {len(tree.tops)} of {PACKS_LIMIT}; {share}"]
    for variant, delivery in tree.deliveries.items():
        lines.append(f"  {variant}: {delivery.bytes:,} bytes in {len(delivery.packs)} packs")
    return "\n".join(lines)
