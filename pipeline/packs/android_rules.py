"""Every rule that an Android folder must keep: Play's, bundletool's, Gradle's, and ours that follow from them.

bundletool's own checks are those of its DeviceGroupConfigValidator, DeviceGroupParityValidator,
DeviceGroupTargetingValidator, AssetModuleFilesValidator, AssetsTargetingValidator, NestedTargetingValidator and
EntryClashValidator. Limits are of Play's help and of developer.android.com/google/play/on-device-ai. A pack's size here
is uncompressed: deflate adds at most 0.03 %, and 4-bit weights shrink by about 5 %.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from xml.etree import ElementTree

from pipeline.files import sha256_of
from pipeline.packs import android
from pipeline.packs.android import AGP, AI_PACK, FLAG, OTHER, PLACEHOLDER, TARGETING, AndroidIndex, Selector
from pipeline.packs.delivery import Delivery, Pack
from pipeline.packs.rules import COMMON, Found, Problem, Rules, Tree

PACK_LIMIT = 1_500_000_000  # bytes of one pack as one phone downloads it
PACKS_LIMIT = 100
TOTAL_LIMITS = (4_000_000_000, 30_000_000_000)  # the AI-pack page's, and Play help's for on-demand and fast-follow
PART_LIMIT = 1_400_000_000  # so that a part and the small files share a pack
SOLD = (3, 4, 6, 8, 12, 16, 24, 32)  # GB of RAM, marketing figures

ASSETS = "src/main/assets"
_APP = "app/build.gradle"
_GROUPS = f"app/{TARGETING}"
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*")  # of a pack, and of a group
_BYTES = re.compile(r"[0-9]{1,18}")
_TAG = f"{{{android.NAMESPACE}}}"


@dataclass(frozen=True)
class _Asset:
    """A file of a pack: `path` in its assets, `where` in the store folder.

    `folder` is its top folder without the suffix, `group` the suffix's name, None without one.
    """

    module: str
    folder: str
    group: str | None
    path: str
    where: str
    size: int


class AndroidTree(Tree[AndroidIndex]):
    """A folder as `write_android` writes it, whoever wrote or edited it."""

    kind = AndroidIndex

    @cached_property
    def modules(self) -> list[str]:
        """Folders with a build.gradle or assets, but the app's."""
        return sorted(self.folders - {"app"})

    @property
    def scripts(self) -> list[tuple[str, str]]:
        """Path and text of each pack's build.gradle; the text is empty if there is none."""
        return [(path, self.text(path)) for path in (f"{module}/build.gradle" for module in self.modules)]

    @cached_property
    def assets(self) -> list[_Asset]:
        """Every file of every pack."""
        found = []
        for module in self.modules:
            for path, size in self.below(f"{module}/{ASSETS}").items():
                base, mark, group = path.rpartition("/")[0].split("/")[0].partition("#group_")
                found.append(_Asset(module, base, group if mark else None, path, f"{module}/{ASSETS}/{path}", size))
        return found

    @cached_property
    def groups(self) -> dict[tuple[str, str], set[str]]:
        """(module, top folder) → groups that have a folder of that name."""
        groups: dict[tuple[str, str], set[str]] = {}
        for asset in self.assets:
            if asset.group is not None:
                groups.setdefault((asset.module, asset.folder), set()).add(asset.group)
        return groups

    @property
    def used(self) -> set[str]:
        """The groups that have a folder."""
        return set().union(*self.groups.values())

    @cached_property
    def targeting(self) -> ElementTree.Element | str:
        """device_targeting_config.xml, or what is wrong with it."""
        if _GROUPS not in self.sizes:
            return "there is no such file"
        text = self.text(_GROUPS)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            return "it declares a document type or entities, which have no place here"
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            return f"it is no XML: {error}"
        if root.tag != f"{_TAG}device-targeting-config":
            return f"expected <config:device-targeting-config> in namespace {android.NAMESPACE}, found {root.tag}"
        return root

    @cached_property
    def declared(self) -> list[tuple[str, list[Selector | str]]]:
        """(name, selectors) of each device group in file order; nothing when the XML is damaged."""
        groups = [] if isinstance(self.targeting, str) else self.targeting.findall(f"{_TAG}device-group")
        return [(group.get("name", ""), [*map(_selector, group.findall(f"{_TAG}device-selector"))]) for group in groups]

    @property
    def ranges(self) -> list[tuple[str, Selector | str]]:
        """(group, selector) of each selector in file order."""
        return [(name, found) for name, selectors in self.declared for found in selectors]

    @property
    def deliveries(self) -> dict[str, Delivery]:
        """Group → delivery."""
        return {name: group.delivery for name, group in self.index.groups.items()} if self.index else {}

    def pack_folder(self, name: str, pack: Pack) -> str:
        """A group's folder in a pack's module."""
        return f"{pack.name}/{ASSETS}/{pack.name}#group_{name}"


def _selector(found: ElementTree.Element) -> Selector | str:
    """The range of RAM, or what is wrong with its attributes."""
    least, most = found.get("ram-min-bytes", "0"), found.get("ram-max-bytes")
    if all(_BYTES.fullmatch(value) for value in (least, "0" if most is None else most)):
        return Selector(min_bytes=int(least), max_bytes=None if most is None else int(most))
    return f"ram-min-bytes {least!r} and ram-max-bytes {most!r} must be whole numbers of bytes"


RULES = Rules(COMMON)


# --- Gradle ----------------------------------------------------------------------------------------------------------


def _setting(text: str, name: str) -> str | None:
    """Value of `name = "value"` in a Gradle file, with either quote; comments are skipped."""
    match = re.search(rf"""^[^/\n]*\b{name}\s*=\s*(?:["']([^"']*)["']|(\w+))""", text, re.MULTILINE)
    return (match[1] if match[1] is not None else match[2]) if match else None


@RULES.add("ai-pack-plugin", "Play: one Gradle module per pack, with the AI-pack plugin")
def _plugin(tree: AndroidTree) -> Found:
    for path, text in tree.scripts:
        if not re.search(rf"""id[\s(]+["']{re.escape(AI_PACK)}["']""", text):
            yield path, f"the plugin {AI_PACK} is not applied"


@RULES.add("pack-name", "Play: a pack's name is a letter, then letters, digits and underscores")
def _pack_name(tree: AndroidTree) -> Found:
    for path, text in tree.scripts:
        name, module = _setting(text, "packName"), path.split("/")[0]
        if name != module:
            yield path, f"packName is {name!r}, the module's folder {module!r}"
        elif not _NAME.fullmatch(name):
            yield path, f"packName {name!r} must start with a letter and go on with letters, digits and underscores"


@RULES.add("delivery-type", "Play: on-demand; install-time packs have no path")
def _delivery_type(tree: AndroidTree) -> Found:
    for path, text in tree.scripts:
        if (kind := _setting(text, "deliveryType")) != "on-demand":
            yield path, f"deliveryType is {kind!r}: gigabytes go on-demand, and install-time packs have no file paths"


@RULES.add("settings", "Gradle: settings.gradle includes every module", "settings.gradle")
def _settings(tree: AndroidTree) -> Iterator[str]:
    included = set(re.findall(r"""["']:([^"':]+)["']""", tree.text("settings.gradle")))
    missing, unknown = set(tree.modules) - included, included - {*tree.modules, "app"}
    yield from (f"include ':{module}' is missing" for module in sorted(missing))
    yield from (f"it includes ':{module}', for which there is no folder" for module in sorted(unknown))


@RULES.add("asset-packs", "Gradle: the app lists every pack", _APP)
def _app_packs(tree: AndroidTree) -> Iterator[str]:
    match = re.search(r"assetPacks\s*(?:\+)?=\s*\[([^\]]*)\]", tree.text(_APP))
    listed = set(re.findall(r"""["']:([^"']+)["']""", match[1])) if match else set()
    if listed != set(tree.modules):
        different = ", ".join(sorted(listed ^ set(tree.modules)))
        yield f"assetPacks and the module folders disagree about {different}"


@RULES.add("device-group", "Gradle: the app splits by device group, with the default group other", _APP)
def _app_groups(tree: AndroidTree) -> Iterator[str]:
    text = tree.text(_APP)
    if not re.search(rf"""deviceTargetingConfig\s*=\s*file\(["']{re.escape(TARGETING)}["']\)""", text):
        yield f"deviceTargetingConfig = file('{TARGETING}') is missing: every phone would get every group or none"
    block = re.search(r"deviceGroup\s*\{([^}]*)\}", text)
    split, default = (_setting(block[1], name) if block else None for name in ("enableSplit", "defaultGroup"))
    if split != "true":
        yield f"deviceGroup.enableSplit is {split!r}, expected true"
    if default != OTHER:
        yield f"deviceGroup.defaultGroup is {default!r}, expected {OTHER!r}, whose folder is empty"


@RULES.add("targeting-flag", "Gradle: gradle.properties enables device targeting", "gradle.properties")
def _flag(tree: AndroidTree) -> Iterator[str]:
    if FLAG not in map(str.strip, tree.text("gradle.properties").splitlines()):
        yield f"{FLAG} is missing: without it the plugin drops the device groups in silence"


@RULES.add("plugin-version", f"Gradle: Android Gradle Plugin {AGP} or later", "build.gradle")
def _plugin_version(tree: AndroidTree) -> Iterator[str]:
    wanted = tuple(map(int, AGP.split(".")))
    version = r"""id[\s(]+["'](com\.android\.[\w-]+)["']\)?\s+version\s+["']([0-9]{1,4}(?:\.[0-9]{1,4})*)"""
    found = re.findall(version, tree.text("build.gradle"))
    for plugin in {"com.android.application", AI_PACK} - {name for name, _ in found}:
        yield f"no version of {plugin}; device targeting needs {AGP} or later"
    for plugin, version in found:
        if tuple(map(int, version.split("."))) < wanted:
            yield f"{plugin} {version} is too old: device targeting needs {AGP} or later"


# --- device groups ---------------------------------------------------------------------------------------------------


@RULES.add("targeting-file", "Play: device groups as XML in the config namespace", _GROUPS)
def _targeting_file(tree: AndroidTree) -> Iterator[str]:
    if isinstance(tree.targeting, str):
        yield tree.targeting


@RULES.add("group-count", "bundletool: at least one device group", _GROUPS)
def _any_group(tree: AndroidTree) -> Iterator[str]:
    if not tree.declared and not isinstance(tree.targeting, str):
        yield "it declares no device group; bundletool asks for at least one"


@RULES.add("group-name", "bundletool: group names match ^[a-zA-Z][a-zA-Z0-9_]*$", _GROUPS)
def _group_name(tree: AndroidTree) -> Iterator[str]:
    wrong = (name for name, _ in tree.declared if not _NAME.fullmatch(name))
    yield from (f"group name {name!r} does not match {_NAME.pattern}" for name in wrong)


@RULES.add("group-unique", "bundletool: no group is declared twice", _GROUPS)
def _group_unique(tree: AndroidTree) -> Iterator[str]:
    names = [name for name, _ in tree.declared]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"group {name!r} is declared {names.count(name)} times"


@RULES.add("group-other", "Play: the group other is never declared", _GROUPS)
def _group_other(tree: AndroidTree) -> Iterator[str]:
    if any(name == OTHER for name, _ in tree.declared):
        yield f"group {OTHER!r} is Play's own for phones that match no group: never declare it"


@RULES.add("selector-count", f"Play: 1 to {android.SELECTORS} selectors a group", _GROUPS)
def _selector_count(tree: AndroidTree) -> Iterator[str]:
    for name, selectors in tree.declared:
        if not 1 <= len(selectors) <= android.SELECTORS:
            yield f"group {name!r} has {len(selectors)} selectors, allowed are 1 to {android.SELECTORS}"


@RULES.add("selector-ram", "Play: RAM from an inclusive minimum to an exclusive maximum, in bytes", _GROUPS)
def _selector_ram(tree: AndroidTree) -> Iterator[str]:
    for name, found in tree.ranges:
        if isinstance(found, str):
            yield f"group {name!r}: {found}"
        elif found.max_bytes is not None and found.min_bytes >= found.max_bytes:
            limits = f"{found.min_bytes:,} to {found.max_bytes:,}"
            yield f"group {name!r} has the empty range {limits} (the upper end is exclusive)"


@RULES.add("selector-overlap", "Play: the first matching group wins, so ranges must not overlap", _GROUPS)
def _selector_overlap(tree: AndroidTree) -> Iterator[str]:
    ranges = [(name, found) for name, found in tree.ranges if isinstance(found, Selector)]
    for (first, one), (second, two) in itertools.combinations(ranges, 2):
        start = max(one.min_bytes, two.min_bytes)
        ends = [item.max_bytes for item in (one, two) if item.max_bytes is not None]
        if first != second and (not ends or start < min(ends)):
            end = f"{min(ends):,}" if ends else "any size"
            yield f"groups {first!r} and {second!r} both match {start:,} to {end} bytes: the first wins, always"


@RULES.add("selector-index", "ours: groups select what the signed tiers say", _GROUPS)
def _selector_index(tree: AndroidTree) -> Iterator[str]:
    if tree.index is None or isinstance(tree.targeting, str):
        return
    found, wanted = dict(tree.declared), {name: group.selectors for name, group in tree.index.groups.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name, []) != wanted.get(name, []):
            yield f"group {name!r} selects otherwise than the index says"


@RULES.add("ram-margin", "ours: thresholds 10 to 15 % under the marketing figure", _GROUPS, note=True)
def _ram_margin(tree: AndroidTree) -> Iterator[str]:
    sizes = f"a size that phones are sold with ({', '.join(map(str, SOLD))} GB), so such a phone may miss it"
    for name, found in tree.ranges:
        for edge in (found.min_bytes, found.max_bytes) if isinstance(found, Selector) else ():
            if edge and not any(0.85 * sold * 10**9 <= edge <= 0.90 * sold * 10**9 for sold in SOLD):
                yield f"group {name!r}: {edge:,} bytes is not 10 to 15 % under {sizes}"


# --- folders ---------------------------------------------------------------------------------------------------------


@RULES.add("same-groups", "bundletool: every targeted folder and pack has the same set of groups")
def _same_groups(tree: AndroidTree) -> Found:
    for (module, folder), groups in tree.groups.items():
        if missing := sorted(tree.used - groups):
            message = f"no folder for {', '.join(missing)}: all targeted folders and packs need the same groups"
            yield f"{module}/{ASSETS}/{folder}", f"{message} (an empty one holds {PLACEHOLDER})"
    for module in tree.modules:
        if tree.used and not any(owner == module for owner, _ in tree.groups):
            yield f"{module}/{ASSETS}", f"no targeted folder, where other packs have {', '.join(sorted(tree.used))}"


@RULES.add("groups-declared", "bundletool: folders and declared groups agree", _GROUPS)
def _groups_declared(tree: AndroidTree) -> Iterator[str]:
    names = {name for name, _ in tree.declared}
    undeclared, unused = sorted(tree.used - names - {OTHER}), sorted(names - tree.used)
    yield from (f"folders are for group {name!r}, which is not declared" for name in undeclared)
    yield from (f"group {name!r} is declared, but no folder is for it" for name in unused)


@RULES.add("other-folder", "ours: phones in no group download nothing")
def _other_folder(tree: AndroidTree) -> Found:
    for (module, folder), groups in tree.groups.items():
        where = f"{module}/{ASSETS}/{folder}#group_{OTHER}"
        if OTHER not in groups:
            yield where, f"the folder of the default group is missing: make it with {PLACEHOLDER} in it"
        elif files := [path for path in tree.below(where) if path != PLACEHOLDER]:
            yield where, f"phones that match no group would download {len(files)} files, {files[0]} among them"


@RULES.add("unsuffixed-sibling", "bundletool: no folder without suffix beside a targeted one")
def _unsuffixed(tree: AndroidTree) -> Found:
    for module, folder in sorted({(asset.module, asset.folder) for asset in tree.assets if asset.group is None}):
        if (module, folder) in tree.groups:
            where = f"{module}/{ASSETS}/{folder}"
            yield where, f"a folder without suffix beside {folder}#group_…: bundletool refuses it"


@RULES.add("nested-targeting", "bundletool: nested targeting must be complete; we use none")
def _nested(tree: AndroidTree) -> Found:
    for asset in tree.assets:
        if asset.path.count("#") > (0 if asset.group is None else 1):
            yield asset.where, "a second '#': one dimension of targeting, on the top folder"


@RULES.add("empty-folder", "bundletool: no targeted folder is empty")
def _empty_folder(tree: AndroidTree) -> Found:
    for module in tree.modules:
        assets = tree.folder / module / ASSETS
        if not assets.is_dir():
            yield f"{module}/{ASSETS}", "the pack has no assets"
            continue
        for folder in sorted(path for path in assets.iterdir() if path.is_dir() and not path.is_symlink()):
            if not tree.below(where := f"{module}/{ASSETS}/{folder.name}"):
                yield where, f"an empty folder vanishes from the zip: put {PLACEHOLDER} in it"


@RULES.add("top-folder", "ours: the top folder is named after the pack")
def _top_folder(tree: AndroidTree) -> Found:
    for module, folder in sorted({(asset.module, asset.folder) for asset in tree.assets}):
        if folder != module:
            rule = f"the top folder of assets must have the pack's name {module!r}"
            yield f"{module}/{ASSETS}/{folder}", f"{rule}: names are shared between packs"


@RULES.add("entry-clash", "bundletool: one path in two packs has the same bytes")
def _entry_clash(tree: AndroidTree) -> Found:
    places = defaultdict(list)
    for asset in tree.assets:
        places[asset.path].append(asset)
    for path, found in sorted(places.items()):
        sizes = {asset.size for asset in found}
        if len(sizes) > 1 or (len(found) > 1 and len({sha256_of(tree.folder / asset.where) for asset in found}) > 1):
            clash = f"packs {', '.join(asset.module for asset in found)} have different bytes at assets/{path}"
            yield found[0].where, f"{clash}: bundletool refuses the app bundle"


@RULES.add("assets-only", "bundletool: a pack holds assets and nothing else")
def _only_assets(tree: AndroidTree) -> Found:
    for module in tree.modules:
        for path in tree.below(module):
            if path != "build.gradle" and not path.startswith(f"{ASSETS}/"):
                yield f"{module}/{path}", f"a pack holds build.gradle and {ASSETS}/ only: neither code nor resources"


# --- sizes -----------------------------------------------------------------------------------------------------------


def _per_device(tree: AndroidTree) -> dict[str, dict[str, int]]:
    """group → pack → bytes that one phone of the group downloads; files without a group go to all."""
    sizes: dict[str, dict[str, int]] = {name: defaultdict(int) for name in sorted(tree.used or {OTHER})}
    for asset in tree.assets:
        for name in sizes if asset.group is None else [asset.group]:
            sizes[name][asset.module] += asset.size
    return sizes


@RULES.add("pack-size", "Play: 1.5 GB a pack, as downloaded by one phone")
def _pack_size(tree: AndroidTree) -> Found:
    for group, packs in _per_device(tree).items():
        for module, size in packs.items():
            if (over := size - PACK_LIMIT) > 0:
                yield module, f"group {group!r}: {size:,} bytes, {over:,} over Play's {PACK_LIMIT:,} a pack"


@RULES.add("part-size", "ours: parts of at most 1.4e9 bytes")
def _part_size(tree: AndroidTree) -> Found:
    for asset in tree.assets:
        if asset.size > PART_LIMIT:
            most = f"parts have at most {PART_LIMIT:,}, so that packs stay under the limit"
            yield asset.where, f"{asset.size:,} bytes, {most}"


@RULES.add("pack-count", f"Play: {PACKS_LIMIT} packs", ".")
def _pack_count(tree: AndroidTree) -> Iterator[str]:
    if len(tree.modules) > PACKS_LIMIT:
        yield f"{len(tree.modules)} packs, Play takes {PACKS_LIMIT} an app"


@RULES.add("total-4gb", "Play, AI-pack page: 4 GB for one phone", ".", note=True)
def _total(tree: AndroidTree, limit: int = TOTAL_LIMITS[0]) -> Iterator[str]:
    for group, packs in _per_device(tree).items():
        if (size := sum(packs.values())) > limit:
            yield f"group {group!r} downloads {size:,} bytes, {size - limit:,} over {limit:,}"


RULES.add("total-30gb", "Play help: 30 GB on demand for one phone", ".")(partial(_total, limit=TOTAL_LIMITS[1]))


@RULES.add("index-files", "ours: a group has no pack that the index does not know")
def _known_packs(tree: AndroidTree) -> Found:
    carried = {(pack.name, group) for group, item in tree.deliveries.items() for pack in item.packs}
    for asset in tree.assets if tree.index else ():
        known = asset.group in (None, OTHER) or (asset.module, asset.group) in carried
        if not known and not asset.path.endswith(f"/{PLACEHOLDER}"):
            yield asset.where, "the index knows no such pack in this group"


def check_android(folder: Path) -> list[Problem]:
    """Every rule that `folder` breaks.

    Raises:
        BundleError: the folder cannot be read.
    """
    return RULES.problems(AndroidTree(folder))


def describe_android(folder: Path) -> str:
    """What each group downloads, against both of Play's totals, and the number of packs."""
    tree = AndroidTree(folder)
    lines = [f"{folder}: packs: {len(tree.modules)} of {PACKS_LIMIT}"]
    for group, packs in _per_device(tree).items():
        size, largest = sum(packs.values()), max(packs.values(), default=0)
        shares = " and ".join(f"{size / limit:.1%} of {limit / 10**9:.0f} GB" for limit in TOTAL_LIMITS)
        lines.append(f"  {group}: {size:,} bytes for one phone, {shares}; largest pack {largest:,} of {PACK_LIMIT:,}")
    return "\n".join(lines)
