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
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

from pipeline.packs.android import (
    AGP,
    AI_PACK,
    FLAG,
    NAMESPACE,
    OTHER,
    PLACEHOLDER,
    SELECTORS,
    TARGETING,
    AndroidIndex,
    Selector,
)
from pipeline.packs.delivery import INDEX, Delivery
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

PACK_LIMIT = 1_500_000_000  # bytes of one pack as one phone downloads it
PACKS_LIMIT = 100
TOTAL_LIMITS = (4_000_000_000, 30_000_000_000)  # the AI-pack page's, and Play help's for on-demand and fast-follow
PART_LIMIT = 1_400_000_000  # so that a part and the small files share a pack
SOLD = (3, 4, 6, 8, 12, 16, 24, 32)  # GB of RAM, marketing figures

ASSETS = "src/main/assets"
_GROUP_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*")
_PACK_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*")
_BYTES = re.compile(r"[0-9]{1,18}")
_TAG = f"{{{NAMESPACE}}}"


@dataclass(frozen=True)
class _Asset:
    """A file of a pack: `folder` is its top folder without the suffix, `group` the suffix's name, None without one."""

    module: str
    folder: str
    group: str | None
    path: str
    size: int


class AndroidTree(Tree[AndroidIndex]):
    """A folder as `write_android` writes it, whoever wrote or edited it."""

    def __init__(self, folder: Path):
        super().__init__(folder, AndroidIndex)

    @cached_property
    def modules(self) -> list[str]:
        """Folders with a build.gradle or assets, but the app's."""
        tops = {path.split("/")[0] for path in self.sizes if "/" in path}
        return sorted(top for top in tops if top != "app")

    @cached_property
    def assets(self) -> list[_Asset]:
        """Every file of every pack."""
        found = []
        for module in self.modules:
            for path, size in self.below(f"{module}/{ASSETS}").items():
                top = path.split("/")[0] if "/" in path else ""
                base, _, group = top.partition("#group_")
                found.append(_Asset(module, base, group if "#group_" in top else None, path, size))
        return found

    @cached_property
    def groups(self) -> dict[tuple[str, str], set[str]]:
        """(module, top folder) → groups that have a folder of that name."""
        groups = defaultdict(set)
        for asset in self.assets:
            if asset.group is not None:
                groups[asset.module, asset.folder].add(asset.group)
        return dict(groups)

    @cached_property
    def targeting(self) -> ElementTree.Element | str:
        """device_targeting_config.xml, or what is wrong with it."""
        path = f"app/{TARGETING}"
        if path not in self.sizes:
            return "there is no such file"
        text = self.text(path)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            return "it declares a document type or entities, which have no place here"
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            return f"it is no XML: {error}"
        if root.tag != f"{_TAG}device-targeting-config":
            return f"expected <config:device-targeting-config> in namespace {NAMESPACE}, found {root.tag}"
        return root

    @cached_property
    def declared(self) -> list[tuple[str, list[ElementTree.Element]]]:
        """(name, selectors) of each device group in file order; nothing when the XML is damaged."""
        if isinstance(self.targeting, str):
            return []
        groups = self.targeting.findall(f"{_TAG}device-group")
        return [(group.get("name", ""), group.findall(f"{_TAG}device-selector")) for group in groups]

    @cached_property
    def deliveries(self) -> dict[str, Delivery]:
        """Group → delivery of the index; nothing when it is damaged."""
        return (
            {} if isinstance(self.index, str) else {name: group.delivery for name, group in self.index.groups.items()}
        )

    @cached_property
    def first_folders(self) -> dict[str, Delivery]:
        """Where each group's first pack lies."""
        return {_folder(item.packs[0].name, group): item for group, item in self.deliveries.items()}


def _folder(module: str, group: str) -> str:
    return f"{module}/{ASSETS}/{module}#group_{group}"


# --- Gradle ----------------------------------------------------------------------------------------------------------


def _setting(text: str, name: str) -> str | None:
    """Value of `name = "value"` in a Gradle file, with either quote; comments are skipped."""
    match = re.search(rf"""^[^/\n]*\b{name}\s*=\s*(?:["']([^"']*)["']|(\w+))""", text, re.MULTILINE)
    return (match[1] if match[1] is not None else match[2]) if match else None


def _plugin(tree: AndroidTree) -> Found:
    for module in tree.modules:
        if not re.search(rf"""id[\s(]+["']{re.escape(AI_PACK)}["']""", tree.text(f"{module}/build.gradle")):
            yield f"{module}/build.gradle", f"the plugin {AI_PACK} is not applied"


def _pack_name(tree: AndroidTree) -> Found:
    for module in tree.modules:
        path = f"{module}/build.gradle"
        name = _setting(tree.text(path), "packName")
        if name != module:
            yield path, f"packName is {name!r}, the module's folder {module!r}"
        elif not _PACK_NAME.fullmatch(name):
            yield path, f"packName {name!r} must start with a letter and go on with letters, digits and underscores"


def _delivery_type(tree: AndroidTree) -> Found:
    for module in tree.modules:
        path = f"{module}/build.gradle"
        if (kind := _setting(tree.text(path), "deliveryType")) != "on-demand":
            yield path, f"deliveryType is {kind!r}: gigabytes go on-demand, and install-time packs have no file paths"


def _settings(tree: AndroidTree) -> Found:
    included = set(re.findall(r"""["']:([^"':]+)["']""", tree.text("settings.gradle")))
    for module in sorted(set(tree.modules) - included):
        yield "settings.gradle", f"include ':{module}' is missing"
    for module in sorted(included - set(tree.modules) - {"app"}):
        yield "settings.gradle", f"it includes ':{module}', for which there is no folder"


def _app_packs(tree: AndroidTree) -> Found:
    match = re.search(r"assetPacks\s*(?:\+)?=\s*\[([^\]]*)\]", tree.text("app/build.gradle"))
    listed = set(re.findall(r"""["']:([^"']+)["']""", match[1])) if match else set()
    if listed != set(tree.modules):
        different = ", ".join(sorted(listed ^ set(tree.modules)))
        yield "app/build.gradle", f"assetPacks and the module folders disagree about {different}"


def _app_groups(tree: AndroidTree) -> Found:
    path = "app/build.gradle"
    text = tree.text(path)
    if not re.search(rf"""deviceTargetingConfig\s*=\s*file\(["']{re.escape(TARGETING)}["']\)""", text):
        yield path, f"deviceTargetingConfig = file('{TARGETING}') is missing: every phone would get every group or none"
    block = re.search(r"deviceGroup\s*\{([^}]*)\}", text)
    split, default = (_setting(block[1], name) if block else None for name in ("enableSplit", "defaultGroup"))
    if split != "true":
        yield path, f"deviceGroup.enableSplit is {split!r}, expected true"
    if default != OTHER:
        yield path, f"deviceGroup.defaultGroup is {default!r}, expected {OTHER!r}, whose folder is empty"


def _flag(tree: AndroidTree) -> Found:
    lines = [line.strip() for line in tree.text("gradle.properties").splitlines()]
    if FLAG not in lines:
        yield "gradle.properties", f"{FLAG} is missing: without it the plugin drops the device groups in silence"


def _plugin_version(tree: AndroidTree) -> Found:
    wanted = tuple(map(int, AGP.split(".")))
    found = re.findall(
        r"""id[\s(]+["'](com\.android\.[\w-]+)["']\)?\s+version\s+["']([0-9]{1,4}(?:\.[0-9]{1,4})*)""",
        tree.text("build.gradle"),
    )
    for plugin in {"com.android.application", AI_PACK} - {name for name, _ in found}:
        yield "build.gradle", f"no version of {plugin}; device targeting needs {AGP} or later"
    for plugin, version in found:
        if tuple(map(int, version.split("."))) < wanted:
            yield "build.gradle", f"{plugin} {version} is too old: device targeting needs {AGP} or later"


# --- device groups ---------------------------------------------------------------------------------------------------


def _targeting_file(tree: AndroidTree) -> Found:
    if isinstance(tree.targeting, str):
        yield f"app/{TARGETING}", tree.targeting


def _any_group(tree: AndroidTree) -> Found:
    if not tree.declared and not isinstance(tree.targeting, str):
        yield f"app/{TARGETING}", "it declares no device group; bundletool asks for at least one"


def _group_name(tree: AndroidTree) -> Found:
    for name, _ in tree.declared:
        if not _GROUP_NAME.fullmatch(name):
            yield f"app/{TARGETING}", f"group name {name!r} does not match {_GROUP_NAME.pattern}"


def _group_unique(tree: AndroidTree) -> Found:
    names = [name for name, _ in tree.declared]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"app/{TARGETING}", f"group {name!r} is declared {names.count(name)} times"


def _group_other(tree: AndroidTree) -> Found:
    if any(name == OTHER for name, _ in tree.declared):
        yield f"app/{TARGETING}", f"group {OTHER!r} is Play's own for phones that match no group: never declare it"


def _selector_count(tree: AndroidTree) -> Found:
    for name, selectors in tree.declared:
        if not 1 <= len(selectors) <= SELECTORS:
            yield f"app/{TARGETING}", f"group {name!r} has {len(selectors)} selectors, allowed are 1 to {SELECTORS}"


def _ranges(tree: AndroidTree) -> Iterator[tuple[str, Selector | str]]:
    """(group, range) of each selector, or what is wrong with its attributes."""
    for name, selectors in tree.declared:
        for selector in selectors:
            least, most = selector.get("ram-min-bytes", "0"), selector.get("ram-max-bytes")
            if not all(_BYTES.fullmatch(value) for value in (least, "0" if most is None else most)):
                yield name, f"ram-min-bytes {least!r} and ram-max-bytes {most!r} must be whole numbers of bytes"
                continue
            yield name, Selector(min_bytes=int(least), max_bytes=None if most is None else int(most))


def _selector_ram(tree: AndroidTree) -> Found:
    for name, found in _ranges(tree):
        if isinstance(found, str):
            yield f"app/{TARGETING}", f"group {name!r}: {found}"
        elif found.max_bytes is not None and found.min_bytes >= found.max_bytes:
            limits = f"{found.min_bytes:,} to {found.max_bytes:,}"
            yield f"app/{TARGETING}", f"group {name!r} has the empty range {limits} (the upper end is exclusive)"


def _selector_overlap(tree: AndroidTree) -> Found:
    ranges = [(name, found) for name, found in _ranges(tree) if isinstance(found, Selector)]
    for (first, one), (second, two) in itertools.combinations(ranges, 2):
        start = max(one.min_bytes, two.min_bytes)
        ends = [item.max_bytes for item in (one, two) if item.max_bytes is not None]
        if first != second and (not ends or start < min(ends)):
            end = f"{min(ends):,}" if ends else "any size"
            message = f"groups {first!r} and {second!r} both match {start:,} to {end} bytes: the first wins, always"
            yield f"app/{TARGETING}", message


def _selector_index(tree: AndroidTree) -> Found:
    if isinstance(tree.index, str) or isinstance(tree.targeting, str):
        return
    found = defaultdict(list)
    for name, selector in _ranges(tree):
        found[name].append(selector)
    for name in sorted(found.keys() | tree.index.groups.keys()):
        planned = tree.index.groups[name].selectors if name in tree.index.groups else []
        if found.get(name, []) != planned:
            yield f"app/{TARGETING}", f"group {name!r} selects otherwise than the index says"


def _ram_margin(tree: AndroidTree) -> Found:
    for name, found in _ranges(tree):
        for edge in (found.min_bytes, found.max_bytes) if isinstance(found, Selector) else ():
            if edge and not any(0.85 * sold * 10**9 <= edge <= 0.90 * sold * 10**9 for sold in SOLD):
                message = f"group {name!r}: {edge:,} bytes is not 10 to 15 % under a size that phones are sold with"
                yield f"app/{TARGETING}", f"{message} ({', '.join(map(str, SOLD))} GB), so such a phone may miss it"


# --- folders ---------------------------------------------------------------------------------------------------------


def _same_groups(tree: AndroidTree) -> Found:
    every = set().union(*tree.groups.values()) if tree.groups else set()
    for (module, folder), groups in tree.groups.items():
        if missing := sorted(every - groups):
            message = f"no folder for {', '.join(missing)}: all targeted folders and packs need the same groups"
            yield f"{module}/{ASSETS}/{folder}", f"{message} (an empty one holds {PLACEHOLDER})"
    for module in tree.modules:
        if every and not any(owner == module for owner, _ in tree.groups):
            yield f"{module}/{ASSETS}", f"no targeted folder, where other packs have {', '.join(sorted(every))}"


def _groups_declared(tree: AndroidTree) -> Found:
    used = set().union(*tree.groups.values()) if tree.groups else set()
    names = {name for name, _ in tree.declared}
    for name in sorted(used - names - {OTHER}):
        yield f"app/{TARGETING}", f"folders are for group {name!r}, which is not declared"
    for name in sorted(names - used):
        yield f"app/{TARGETING}", f"group {name!r} is declared, but no folder is for it"


def _other_folder(tree: AndroidTree) -> Found:
    for (module, folder), groups in tree.groups.items():
        where = f"{module}/{ASSETS}/{folder}#group_{OTHER}"
        files = [path for path in tree.below(where) if path != PLACEHOLDER]
        if OTHER not in groups:
            yield where, f"the folder of the default group is missing: make it with {PLACEHOLDER} in it"
        elif files:
            yield where, f"phones that match no group would download {len(files)} files, {files[0]} among them"


def _unsuffixed(tree: AndroidTree) -> Found:
    for module, folder in sorted({(asset.module, asset.folder) for asset in tree.assets if asset.group is None}):
        if (module, folder) in tree.groups:
            yield (
                f"{module}/{ASSETS}/{folder}",
                f"a folder without suffix beside {folder}#group_…: bundletool refuses it",
            )


def _nested(tree: AndroidTree) -> Found:
    for asset in tree.assets:
        rest = asset.path.split("/", 1)[-1] if asset.group is not None else asset.path
        if "#" in rest or "#" in (asset.group or "") or "#" in asset.folder:
            yield f"{asset.module}/{ASSETS}/{asset.path}", "a second '#': one dimension of targeting, on the top folder"


def _empty_folder(tree: AndroidTree) -> Found:
    for module in tree.modules:
        assets = tree.folder / module / ASSETS
        if not assets.is_dir():
            yield f"{module}/{ASSETS}", "the pack has no assets"
            continue
        for folder in sorted(path for path in assets.iterdir() if path.is_dir() and not path.is_symlink()):
            if not tree.below(f"{module}/{ASSETS}/{folder.name}"):
                yield (
                    f"{module}/{ASSETS}/{folder.name}",
                    f"an empty folder vanishes from the zip: put {PLACEHOLDER} in it",
                )


def _top_folder(tree: AndroidTree) -> Found:
    for module, folder in sorted({(asset.module, asset.folder) for asset in tree.assets}):
        if folder != module:
            message = f"the top folder of assets must have the pack's name {module!r}: names are shared between packs"
            yield f"{module}/{ASSETS}/{folder}", message


def _entry_clash(tree: AndroidTree) -> Found:
    places = defaultdict(list)
    for asset in tree.assets:
        places[asset.path].append(asset)
    shared = {path: found for path, found in sorted(places.items()) if len(found) > 1}
    for path, found in shared.items():
        wheres = [f"{asset.module}/{ASSETS}/{path}" for asset in found]
        if len({asset.size for asset in found}) > 1 or len({tree.hash(where) for where in wheres}) > 1:
            packs = ", ".join(asset.module for asset in found)
            yield wheres[0], f"packs {packs} have different bytes at assets/{path}: bundletool refuses the app bundle"


def _only_assets(tree: AndroidTree) -> Found:
    for module in tree.modules:
        for path in tree.below(module):
            if path != "build.gradle" and not path.startswith(f"{ASSETS}/"):
                yield f"{module}/{path}", f"a pack holds build.gradle and {ASSETS}/ only: neither code nor resources"


# --- sizes -----------------------------------------------------------------------------------------------------------


def _per_device(tree: AndroidTree) -> dict[str, dict[str, int]]:
    """group → pack → bytes that one phone of the group downloads; files without a group go to all."""
    names = {asset.group for asset in tree.assets if asset.group is not None} or {OTHER}
    sizes: dict[str, dict[str, int]] = {name: defaultdict(int) for name in sorted(names)}
    for asset in tree.assets:
        for name in sizes if asset.group is None else [asset.group]:
            sizes[name][asset.module] += asset.size
    return sizes


def _pack_size(tree: AndroidTree) -> Found:
    for group, packs in _per_device(tree).items():
        for module, size in packs.items():
            if size > PACK_LIMIT:
                yield (
                    module,
                    f"group {group!r}: {size:,} bytes, {size - PACK_LIMIT:,} over Play's {PACK_LIMIT:,} a pack",
                )


def _part_size(tree: AndroidTree) -> Found:
    for asset in tree.assets:
        if asset.size > PART_LIMIT:
            message = f"{asset.size:,} bytes, parts have at most {PART_LIMIT:,}, so that packs stay under the limit"
            yield f"{asset.module}/{ASSETS}/{asset.path}", message


def _pack_count(tree: AndroidTree) -> Found:
    if len(tree.modules) > PACKS_LIMIT:
        yield ".", f"{len(tree.modules)} packs, Play takes {PACKS_LIMIT} an app"


def _total(tree: AndroidTree, limit: int) -> Found:
    for group, packs in _per_device(tree).items():
        if (size := sum(packs.values())) > limit:
            yield ".", f"group {group!r} downloads {size:,} bytes, {size - limit:,} over {limit:,}"


# --- the index -------------------------------------------------------------------------------------------------------


def _packs_as_indexed(tree: AndroidTree) -> Found:
    for group, delivery in tree.deliveries.items():
        for number, pack in enumerate(delivery.packs):
            yield from pack_files(tree, _folder(pack.name, group), delivery, number)
    carried = {(pack.name, group) for group, item in tree.deliveries.items() for pack in item.packs}
    for asset in tree.assets:
        known = asset.group in (None, OTHER) or (asset.module, asset.group) in carried
        if not known and not asset.path.endswith(f"/{PLACEHOLDER}") and not isinstance(tree.index, str):
            yield f"{asset.module}/{ASSETS}/{asset.path}", "the index knows no such pack in this group"


RULES: tuple[Rule[AndroidIndex], ...] = (
    Rule("regular-files", "Gradle copies regular files; a link would point outside the project", strange_files),
    Rule("ai-pack-plugin", "Play: one Gradle module per pack, with the AI-pack plugin", _plugin),
    Rule("pack-name", "Play: a pack's name is a letter, then letters, digits and underscores", _pack_name),
    Rule("delivery-type", "Play: on-demand; install-time packs have no path", _delivery_type),
    Rule("settings", "Gradle: settings.gradle includes every module", _settings),
    Rule("asset-packs", "Gradle: the app lists every pack", _app_packs),
    Rule("device-group", "Gradle: the app splits by device group, with the default group other", _app_groups),
    Rule("targeting-flag", "Gradle: gradle.properties enables device targeting", _flag),
    Rule("plugin-version", f"Gradle: Android Gradle Plugin {AGP} or later", _plugin_version),
    Rule("targeting-file", "Play: device groups as XML in the config namespace", _targeting_file),
    Rule("group-count", "bundletool: at least one device group", _any_group),
    Rule("group-name", "bundletool: group names match ^[a-zA-Z][a-zA-Z0-9_]*$", _group_name),
    Rule("group-unique", "bundletool: no group is declared twice", _group_unique),
    Rule("group-other", "Play: the group other is never declared", _group_other),
    Rule("selector-count", f"Play: 1 to {SELECTORS} selectors a group", _selector_count),
    Rule("selector-ram", "Play: RAM from an inclusive minimum to an exclusive maximum, in bytes", _selector_ram),
    Rule("selector-overlap", "Play: the first matching group wins, so ranges must not overlap", _selector_overlap),
    Rule("selector-index", "ours: groups select what the signed tiers say", _selector_index),
    Rule("ram-margin", "ours: thresholds 10 to 15 % under the marketing figure", _ram_margin, note=True),
    Rule("same-groups", "bundletool: every targeted folder and pack has the same set of groups", _same_groups),
    Rule("groups-declared", "bundletool: folders and declared groups agree", _groups_declared),
    Rule("other-folder", "ours: phones in no group download nothing", _other_folder),
    Rule("unsuffixed-sibling", "bundletool: no folder without suffix beside a targeted one", _unsuffixed),
    Rule("nested-targeting", "bundletool: nested targeting must be complete; we use none", _nested),
    Rule("empty-folder", "bundletool: no targeted folder is empty", _empty_folder),
    Rule("top-folder", "ours: the top folder is named after the pack", _top_folder),
    Rule("entry-clash", "bundletool: one path in two packs has the same bytes", _entry_clash),
    Rule("assets-only", "bundletool: a pack holds assets and nothing else", _only_assets),
    Rule("pack-size", "Play: 1.5 GB a pack, as downloaded by one phone", _pack_size),
    Rule("part-size", "ours: parts of at most 1.4e9 bytes", _part_size),
    Rule("pack-count", f"Play: {PACKS_LIMIT} packs", _pack_count),
    Rule("total-4gb", "Play, AI-pack page: 4 GB for one phone", lambda tree: _total(tree, TOTAL_LIMITS[0]), note=True),
    Rule("total-30gb", "Play help: 30 GB on demand for one phone", lambda tree: _total(tree, TOTAL_LIMITS[1])),
    Rule("index", "ours: packs.json is there and readable", readable_index),
    Rule("index-files", "ours: each pack holds what the index says, to the byte", _packs_as_indexed),
    Rule(
        "index-digests",
        "ours: sizes and digests of the index follow from its files",
        lambda t: digests(t.deliveries.values()),
    ),
    Rule("joins", "ours: each group's packs join to one whole bundle", lambda tree: joined(tree, tree.first_folders)),
    Rule(
        "app-versions",
        "ours: the index repeats the signed release",
        lambda tree: app_versions(tree, tree.first_folders),
    ),
)


def check_android(folder: Path) -> list[Problem]:
    """Every rule that `folder` breaks. An index without groups has no modules: nothing ships, and nothing is wrong.

    Raises:
        BundleError: the folder cannot be read.
    """
    tree = AndroidTree(folder)
    if not isinstance(tree.index, str) and not tree.index.groups and tree.sizes.keys() == {INDEX}:
        return []
    return apply(RULES, tree)


def describe_android(folder: Path) -> str:
    """What each group downloads, against both of Play's totals, and the number of packs."""
    tree = AndroidTree(folder)
    lines = [f"{folder}: packs: {len(tree.modules)} of {PACKS_LIMIT}"]
    for group, packs in _per_device(tree).items():
        size = sum(packs.values())
        shares = " and ".join(f"{size / limit:.1%} of {limit / 10**9:.0f} GB" for limit in TOTAL_LIMITS)
        largest = max(packs.values(), default=0)
        lines.append(f"  {group}: {size:,} bytes for one phone, {shares}; largest pack {largest:,} of {PACK_LIMIT:,}")
    return "\n".join(lines)
