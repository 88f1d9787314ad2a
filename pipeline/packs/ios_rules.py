"""Every rule that an iOS folder must keep: Apple's for Background Assets, and ours that follow from them.

Limits are of developer.apple.com/help/app-store-connect/reference/apple-hosted-asset-pack-size-limits. They count all
packs of an app that are not archived, earlier releases included: archive what no installed version needs.
"""

from __future__ import annotations

import plistlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.checkpoint.untrusted import parse_json
from pipeline.packs.delivery import INDEX, Delivery, Pack
from pipeline.packs.ios import COMMANDS, ENTITLEMENT, ENTITLEMENTS, MANIFESTS, Choice, IosIndex, pack_id
from pipeline.packs.rules import COMMON, Found, Problem, Rules, Tree

TOTAL_LIMIT = 200_000_000_000
PACKS_LIMIT = 100
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KEYS = {"assetPackID", "downloadPolicy", "fileSelectors", "platforms"}
_POLICIES = ("essential", "onDemand", "prefetch")
_EVENTS = ({"firstInstallation"}, {"subsequentUpdate"}, {"firstInstallation", "subsequentUpdate"})


class IosTree(Tree[IosIndex]):
    """A folder as `write_ios` writes it, whoever wrote or edited it. `previous` is the folder of an earlier release."""

    kind = IosIndex

    def __init__(self, folder: Path, previous: Path | None = None):
        super().__init__(folder)
        self.previous = IosTree(previous) if previous is not None else None

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any] | str]:
        """Manifest path → its object, or what is wrong with it."""
        found: dict[str, dict[str, Any] | str] = {}
        for path in (f"{MANIFESTS}/{name}" for name in self.below(MANIFESTS)):
            try:
                value = parse_json(self.text(path).encode())
                found[path] = value if isinstance(value, dict) else "expected a JSON object"
            except ValueError as error:
                found[path] = f"it is no JSON: {error}"
        return found

    @cached_property
    def readable(self) -> dict[str, dict[str, Any]]:
        """The manifests that could be read."""
        return {path: value for path, value in self.manifests.items() if isinstance(value, dict)}

    @property
    def deliveries(self) -> dict[str, Delivery]:
        """Variant → delivery."""
        return self.index.deliveries if self.index else {}

    def pack_folder(self, name: str, pack: Pack) -> str:
        """All packs of an app share one namespace."""
        return pack.name

    @property
    def packs(self) -> dict[str, Pack]:
        """All packs of the index by id."""
        return {pack.name: pack for delivery in self.deliveries.values() for pack in delivery.packs}

    @cached_property
    def tops(self) -> list[str]:
        """Top folders that hold packs' files."""
        return sorted(self.folders - {MANIFESTS, "build"})

    @property
    def size(self) -> int:
        """Bytes of all packs."""
        return sum(sum(self.below(top).values()) for top in self.tops)


RULES = Rules(COMMON)


def _identifier(value: dict[str, Any]) -> str:
    return str(value.get("assetPackID", ""))


# --- manifests -------------------------------------------------------------------------------------------------------


@RULES.add("manifest", "Apple: a manifest is a JSON object with the four keys")
def _manifest(tree: IosTree) -> Found:
    for path, value in tree.manifests.items():
        if isinstance(value, str):
            yield path, value
        elif value.keys() != _KEYS:
            yield path, f"expected the keys {', '.join(sorted(_KEYS))}, found {', '.join(sorted(value))}"


@RULES.add("id", "Apple: ids have no dots")
def _id(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        name = value.get("assetPackID")
        if not isinstance(name, str) or not _ID.fullmatch(name):
            yield path, f"assetPackID {name!r} must be letters, digits, '-' and '_', without dots, from a letter on"


@RULES.add("id-unique", "Apple: one manifest per id", MANIFESTS)
def _id_unique(tree: IosTree) -> Iterator[str]:
    for name, count in Counter(map(_identifier, tree.readable.values())).items():
        if count > 1:
            yield f"{count} manifests have the assetPackID {name!r}"


@RULES.add("id-names", "ours: an id names model, variant, release and number", INDEX)
def _id_names(tree: IosTree) -> Iterator[str]:
    for variant, delivery in tree.deliveries.items():
        for number, pack in enumerate(delivery.packs, 1):
            wanted = pack_id(delivery.model, variant, delivery.release, number)
            if pack.name != wanted:
                yield f"pack {pack.name} of {variant}: the id must name model, variant and release: {wanted}"


@RULES.add("policy", "Apple: exactly one download policy")
def _policy(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        policy = value.get("downloadPolicy")
        if not isinstance(policy, dict) or len(policy) != 1 or next(iter(policy)) not in _POLICIES:
            yield path, f"downloadPolicy is {policy!r}: exactly one of {', '.join(_POLICIES)}"
            continue
        kind, options = next(iter(policy.items()))
        events = options.get("installationEventTypes") if isinstance(options, dict) else None
        if kind == "onDemand" and options != {}:
            yield path, f"downloadPolicy onDemand takes no options, found {options!r}"
        elif kind != "onDemand" and not (isinstance(events, list) and set(map(str, events)) in _EVENTS):
            yield path, f"downloadPolicy {kind} needs installationEventTypes (firstInstallation, subsequentUpdate)"


@RULES.add("platforms", "ours: packs are for iOS")
def _platforms(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        if (platforms := value.get("platforms")) != ["iOS"]:
            yield path, f"platforms is {platforms!r}, expected ['iOS']"


@RULES.add("selectors", "ours: one top folder per pack, as all packs share one namespace")
def _selectors(tree: IosTree) -> Found:
    for path, value in tree.readable.items():
        selectors, name = value.get("fileSelectors"), _identifier(value)
        if selectors != [{"directory": name}]:
            wrong = f"fileSelectors is {selectors!r}, expected the one folder {name!r}"
            yield path, f"{wrong}: all packs share one namespace"
        elif name not in tree.tops:
            yield path, f"it selects the folder {name}, which is not there"


@RULES.add("every-pack", "ours: folders, manifests and index name the same packs")
def _every_pack(tree: IosTree) -> Found:
    names = {_identifier(value) for value in tree.readable.values()}
    for top in sorted(set(tree.tops) - names):
        yield top, "no manifest selects this folder: it would not be uploaded"
    for name in sorted(names ^ tree.packs.keys() if tree.index else ()):
        yield INDEX, f"pack {name} is in only one of index and manifests"


@RULES.add("no-stray-files", "ours: every file is in a pack's folder")
def _unsorted(tree: IosTree) -> Found:
    strays = (path for path in tree.sizes if "/" not in path and path not in {INDEX, ENTITLEMENTS, COMMANDS})
    yield from ((path, "a file in no pack's folder: no manifest selects it") for path in strays)


@RULES.add("entitlement", "Apple: the increased memory limit is an entitlement", ENTITLEMENTS)
def _entitlement(tree: IosTree) -> Iterator[str]:
    try:
        value = plistlib.loads(tree.text(ENTITLEMENTS).encode())
    except Exception as error:  # plistlib raises what its parsers raise
        yield f"no property list: {error}"
        return
    if not isinstance(value, dict) or value.get(ENTITLEMENT) is not True:
        yield f"{ENTITLEMENT} is not true: without it an app has about 3 GB, whatever the phone has"


# --- ids are for ever ------------------------------------------------------------------------------------------------


@RULES.add("immutable", "ours: an id never gets other bytes")
def _immutable(tree: IosTree) -> Found:
    """Ids of the earlier release with other bytes now."""
    if tree.previous is None:
        return
    if tree.previous.index is None:
        yield INDEX, f"the earlier release {tree.previous.folder.name} cannot be compared: {tree.previous.read[1]}"
    earlier = tree.previous.packs
    for name, pack in tree.packs.items():
        if (was := earlier.get(name, pack).digest) != (now := pack.digest):
            yield name, f"this id was published with digest {was}, now it has {now}: raise the release number"


# --- sizes and index -------------------------------------------------------------------------------------------------


@RULES.add("pack-count", f"Apple: {PACKS_LIMIT} packs", ".")
def _pack_count(tree: IosTree) -> Iterator[str]:
    if len(tree.tops) > PACKS_LIMIT:
        yield f"{len(tree.tops)} packs, App Store Connect takes {PACKS_LIMIT} an app"


@RULES.add("total-200gb", "Apple: 200 GB for all packs", ".")
def _total(tree: IosTree) -> Iterator[str]:
    if (size := tree.size) > TOTAL_LIMIT:
        yield f"{size:,} bytes, {size - TOTAL_LIMIT:,} over Apple's {TOTAL_LIMIT:,} for all packs of an app"


@RULES.add("choices", "ours: the table to pick by is complete and sorted", INDEX)
def _choices(tree: IosTree) -> Iterator[str]:
    rows = tree.index.choices if tree.index else []
    if {row.variant for row in rows} != set(tree.deliveries):
        yield "choices and deliveries name different variants: the app could pick one that is not there"
    if rows != sorted(rows, key=Choice.order):
        yield "choices must go from the lowest KL to the highest: the app takes the first that fits"


def check_ios(folder: Path, previous: Path | None = None) -> list[Problem]:
    """Every rule that `folder` breaks; `previous` is an earlier release's folder, whose ids must keep their bytes.

    Raises:
        BundleError: a folder cannot be read.
    """
    return RULES.problems(IosTree(folder, previous))


def describe_ios(folder: Path) -> str:
    """What each variant's packs take, against the limits."""
    tree = IosTree(folder)
    share = f"{tree.size:,} bytes, {tree.size / TOTAL_LIMIT:.2%} of {TOTAL_LIMIT / 10**9:.0f} GB"
    lines = [f"{folder}: packs: {len(tree.tops)} of {PACKS_LIMIT}; {share}"]
    for variant, delivery in tree.deliveries.items():
        lines.append(f"  {variant}: {delivery.bytes:,} bytes in {len(delivery.packs)} packs")
    return "\n".join(lines)
