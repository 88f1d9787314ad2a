"""Android modules as they are written, and one broken folder for every rule that they must keep."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError
from pipeline.packs.android import Selector, plan_android, ram_groups, write_android
from pipeline.packs.android_rules import RULES, check_android, describe_android
from tests.packs.storefront import GB, TIERS, Shop, tier

APP = "app/build.gradle"
GROUPS = "app/device_targeting_config.xml"
ONE = "demo_p1/src/main/assets/demo_p1#group_ram_12gb"
TWO = "demo_p2/src/main/assets/demo_p2#group_ram_12gb"


# --- planning --------------------------------------------------------------------------------------------------------


def ranges(tiers: dict[str, Any]) -> dict[str, tuple[str, list[tuple[int, int | None]]]]:
    groups = ram_groups(tiers)
    return {
        name: (variant, [(item.min_bytes, item.max_bytes) for item in found])
        for name, (variant, found) in groups.items()
    }


def test_neighbours_with_one_variant_are_one_range_and_the_highest_has_no_end() -> None:
    assert ranges(TIERS) == {
        "ram_6gb": ("q3", [(5_250_000_000, 10_500_000_000)]),
        "ram_12gb": ("q4", [(10_500_000_000, None)]),
    }


def test_a_refused_class_in_between_is_left_out() -> None:
    tiers = {"android-6gb": tier("android", 6, "q3"), "android-8gb": tier("android", 8, None)}
    tiers |= {"android-12gb": tier("android", 12, "q3"), "ios": tier("ios", 1, "q4")}
    assert ranges(tiers) == {"ram_6gb": ("q3", [(6 * GB, 8 * GB), (12 * GB, None)])}


def test_the_order_of_the_tiers_does_not_matter() -> None:
    assert ranges(dict(reversed(TIERS.items()))) == ranges(TIERS)


def test_more_ranges_than_play_takes_are_refused() -> None:
    tiers = {f"android-{ram}gb": tier("android", ram, "q3" if ram % 2 else "q4") for ram in range(1, 12)}
    with pytest.raises(BundleError, match="ram_1gb: q3 is for 6 separate ranges of RAM, Play takes 5"):
        ram_groups(tiers)


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_written_folder_keeps_every_rule(shop: Shop, tmp_path: Path) -> None:
    root = shop.write_android(tmp_path / "android")
    assert check_android(root) == []
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} >= {
        f"{TWO}/bundle/content/demo_q4.onnx.data.1",
        "demo_p1/src/main/assets/demo_p1#group_other/.gitkeep",
        "demo_p2/src/main/assets/demo_p2#group_other/.gitkeep",
        "demo_p2/src/main/assets/demo_p2#group_ram_6gb/.gitkeep",  # q3 has one part and needs one pack
    }
    xml = ElementTree.parse(root / GROUPS).getroot()
    found = [(group.get("name"), [dict(item.attrib) for item in group]) for group in xml]
    assert found == [
        ("ram_6gb", [{"ram-min-bytes": "5250000000", "ram-max-bytes": "10500000000"}]),
        ("ram_12gb", [{"ram-min-bytes": "10500000000"}]),
    ]
    assert (root / "settings.gradle").read_text() == "include ':demo_p1'\ninclude ':demo_p2'\n"
    assert 'packName = "demo_p1"' in (root / "demo_p1/build.gradle").read_text()
    assert 'assetPacks = [":demo_p1", ":demo_p2"]' in (root / APP).read_text()


def test_totals_are_told_against_both_limits(shop: Shop, tmp_path: Path) -> None:
    text = describe_android(shop.write_android(tmp_path / "android"))
    size = shop.android.groups["ram_12gb"].delivery.bytes
    assert "packs: 2 of 100" in text and "of 4 GB and" in text and "of 30 GB" in text
    found = next(line for line in text.splitlines() if "ram_12gb" in line)
    shown = int(found.split(":")[1].split()[0].replace(",", ""))
    assert shown == size + (tmp_path / "android" / ONE / "packs.json").stat().st_size


def test_a_model_for_no_android_phone_has_no_modules(shop: Shop, tmp_path: Path) -> None:
    fields = shop.document.model_dump() | {"tiers": {"android-8gb": tier("android", 7, None).model_dump()}}
    document = TiersDocument.model_validate(fields)
    write_android(tmp_path / "android", plan_android(document, {}), {})
    assert os.listdir(tmp_path / "android") == ["packs.json"]
    assert json.loads((tmp_path / "android/packs.json").read_text())["refused"] == {"android-8gb": ["q3: needs 9 GB"]}
    assert check_android(tmp_path / "android") == []


# --- one broken folder per rule --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop.write_android(tmp_path_factory.mktemp("android") / "android")


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    """A private copy, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "android"))


def swap(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def add(root: Path, name: str, data: bytes = b"more") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def grow(root: Path, name: str, size: int) -> None:
    """A sparse file of `size` bytes: nothing is written."""
    add(root, name, b"")
    os.truncate(root / name, size)


def rename_groups(root: Path, old: str, new: str) -> None:
    """A group under another name, everywhere but in the index."""
    swap(root, GROUPS, f'"{old}"', f'"{new}"')
    for folder in list(root.glob(f"*/src/main/assets/*#group_{old}")):
        folder.rename(folder.with_name(folder.name.replace(f"#group_{old}", f"#group_{new}")))


def edit_index(root: Path, change: Callable[[dict[str, Any]], object], name: str = "packs.json") -> None:
    value = json.loads((root / name).read_text())
    change(value)
    (root / name).write_text(json.dumps(value))


def delivery(index: dict[str, Any], group: str = "ram_12gb") -> dict[str, Any]:
    return index["groups"][group]["delivery"]


def many_modules(root: Path) -> None:
    for number in range(3, 102):
        shutil.copytree(root / "demo_p2", root / f"demo_p{number}")


def another_pack_clashes(root: Path) -> None:
    """The part's path under demo_p2's name in pack 1, with other bytes."""
    add(root, "demo_p1/src/main/assets/demo_p2#group_ram_12gb/bundle/content/demo_q4.onnx.data.1")


STRANGER = {"size": 1, "sha256": "a" * 64}
SELECTOR = '<config:device-selector ram-min-bytes="10500000000"/>'
BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a link": (
        "regular-files",
        lambda r: (r / ONE / "link").symlink_to("/etc/passwd"),
        "found lrwxrwxrwx",
    ),
    "asset-pack plugin": (
        "ai-pack-plugin",
        lambda r: swap(r, "demo_p1/build.gradle", "com.android.ai-pack", "com.android.asset-pack"),
        "com.android.ai-pack is not applied",
    ),
    "no build.gradle": ("ai-pack-plugin", lambda r: (r / "demo_p1/build.gradle").unlink(), "is not applied"),
    "another pack name": (
        "pack-name",
        lambda r: swap(r, "demo_p1/build.gradle", '"demo_p1"', '"model"'),
        "packName is 'model', the module's folder 'demo_p1'",
    ),
    "a name from a digit on": (
        "pack-name",
        lambda r: (
            (r / "demo_p1").rename(r / "4demo_p1"),
            swap(r, "4demo_p1/build.gradle", '"demo_p1"', '"4demo_p1"'),
        ),
        "'4demo_p1' must start with a letter",
    ),
    "install-time": (
        "delivery-type",
        lambda r: swap(r, "demo_p2/build.gradle", "on-demand", "install-time"),
        "deliveryType is 'install-time'",
    ),
    "module not included": (
        "settings",
        lambda r: swap(r, "settings.gradle", "include ':demo_p2'\n", ""),
        "include ':demo_p2' is missing",
    ),
    "module without folder": (
        "settings",
        lambda r: swap(r, "settings.gradle", "p2'\n", "p2'\ninclude ':demo_p3'\n"),
        "includes ':demo_p3', for which there is no folder",
    ),
    "pack not in the app": ("asset-packs", lambda r: swap(r, APP, ', ":demo_p2"', ""), "disagree about demo_p2"),
    "no split": (
        "device-group",
        lambda r: swap(r, APP, "enableSplit = true", "enableSplit = false"),
        "enableSplit is 'false'",
    ),
    "another default": (
        "device-group",
        lambda r: swap(r, APP, 'defaultGroup = "other"', 'defaultGroup = "ram_12gb"'),
        "defaultGroup is 'ram_12gb', expected 'other'",
    ),
    "no targeting in the app": (
        "device-group",
        lambda r: swap(r, APP, "deviceTargetingConfig", "// deviceTargeting"),
        "deviceTargetingConfig = file('device_targeting_config.xml') is missing",
    ),
    "no flag": (
        "targeting-flag",
        lambda r: swap(r, "gradle.properties", "=true", "=false"),
        "enableDeviceTargetingConfigApi=true is missing",
    ),
    "an old plugin": (
        "plugin-version",
        lambda r: swap(r, "build.gradle", "8.10.0", "8.9.1"),
        "8.9.1 is too old: device targeting needs 8.10.0",
    ),
    "no plugin version": ("plugin-version", lambda r: (r / "build.gradle").unlink(), "no version of com.android"),
    "no groups file": ("targeting-file", lambda r: (r / GROUPS).unlink(), "there is no such file"),
    "no XML": ("targeting-file", lambda r: (r / GROUPS).write_text("{"), "it is no XML"),
    "entities": (
        "targeting-file",
        lambda r: swap(r, GROUPS, "<config:device-targeting-config", "<!DOCTYPE x>\n<config:device-targeting-config"),
        "declares a document type",
    ),
    "another namespace": (
        "targeting-file",
        lambda r: swap(r, GROUPS, "apk/config", "apk/res/android"),
        "found {http://schemas.android.com/apk/res/android}device-targeting-config",
    ),
    "no group": (
        "group-count",
        lambda r: (r / GROUPS).write_text(
            '<c:device-targeting-config xmlns:c="http://schemas.android.com/apk/config"/>'
        ),
        "it declares no device group",
    ),
    "a hyphen in a group": ("group-name", lambda r: rename_groups(r, "ram_12gb", "ram-12gb"), "'ram-12gb' does not"),
    "a group twice": ("group-unique", lambda r: swap(r, GROUPS, "ram_12gb", "ram_6gb"), "declared 2 times"),
    "other declared": ("group-other", lambda r: swap(r, GROUPS, "ram_12gb", "other"), "never declare it"),
    "six selectors": (
        "selector-count",
        lambda r: swap(r, GROUPS, SELECTOR, SELECTOR * 6),
        "group 'ram_12gb' has 6 selectors, allowed are 1 to 5",
    ),
    "no selector": ("selector-count", lambda r: swap(r, GROUPS, SELECTOR, ""), "has 0 selectors"),
    "RAM in words": ("selector-ram", lambda r: swap(r, GROUPS, "10500000000", "10.5 GB"), "must be whole numbers"),
    "an empty range": (
        "selector-ram",
        lambda r: swap(r, GROUPS, 'max-bytes="10500000000"', 'max-bytes="5250000000"'),
        "empty range 5,250,000,000 to 5,250,000,000",
    ),
    "overlapping ranges": (
        "selector-overlap",
        lambda r: swap(r, GROUPS, 'max-bytes="10500000000"', 'max-bytes="10500000001"'),
        "both match 10,500,000,000 to 10,500,000,001 bytes",
    ),
    "other ranges than the tiers'": (
        "selector-index",
        lambda r: swap(r, GROUPS, "5250000000", "5300000000"),
        "group 'ram_6gb' selects otherwise than the index says",
    ),
    "the marketing figure": (
        "ram-margin",
        lambda r: swap(r, GROUPS, '"10500000000"', '"12000000000"'),
        "12,000,000,000 bytes is not 10 to 15 % under",
    ),
    "a group missing in one pack": (
        "same-groups",
        lambda r: shutil.rmtree(r / "demo_p2/src/main/assets/demo_p2#group_ram_6gb"),
        "no folder for ram_6gb",
    ),
    "an untargeted pack": (
        "same-groups",
        lambda r: (
            shutil.rmtree(r / "demo_p2/src/main/assets"),
            add(r, "demo_p2/src/main/assets/demo_p2/model.onnx"),
        ),
        "no targeted folder, where other packs have other, ram_12gb, ram_6gb",
    ),
    "a group that is not declared": (
        "groups-declared",
        lambda r: swap(r, GROUPS, "ram_12gb", "ram_16gb"),
        "folders are for group 'ram_12gb', which is not declared",
    ),
    "a group without folders": (
        "groups-declared",
        lambda r: swap(r, GROUPS, "ram_12gb", "ram_16gb"),
        "group 'ram_16gb' is declared, but no folder",
    ),
    "other is not empty": (
        "other-folder",
        lambda r: add(r, "demo_p1/src/main/assets/demo_p1#group_other/model.onnx"),
        "would download 1 files, model.onnx among them",
    ),
    "other is missing": (
        "other-folder",
        lambda r: [shutil.rmtree(folder) for folder in r.glob("*/src/main/assets/*#group_other")],
        "the folder of the default group is missing",
    ),
    "an unsuffixed sibling": (
        "unsuffixed-sibling",
        lambda r: add(r, "demo_p1/src/main/assets/demo_p1/readme.txt"),
        "bundletool refuses it",
    ),
    "nested targeting": ("nested-targeting", lambda r: add(r, f"{ONE}/x#tcf_astc/texture"), "a second '#'"),
    "another dimension": ("nested-targeting", lambda r: add(r, f"{ONE}#tcf_astc/texture"), "a second '#'"),
    "an empty folder": ("empty-folder", lambda r: (r / ONE).with_name("demo_p1#group_x").mkdir(), "vanishes"),
    "no assets": ("empty-folder", lambda r: shutil.rmtree(r / "demo_p2/src"), "the pack has no assets"),
    "a shared top folder": (
        "top-folder",
        lambda r: add(r, "demo_p1/src/main/assets/model/readme.txt"),
        "must have the pack's name 'demo_p1'",
    ),
    "one path, two contents": ("entry-clash", another_pack_clashes, "packs demo_p1, demo_p2 have different bytes"),
    "code in a pack": ("assets-only", lambda r: add(r, "demo_p1/src/main/java/A.java"), "neither code nor resources"),
    "a pack of 1.5 GB and a byte": (
        "pack-size",
        lambda r: grow(r, f"{TWO}/more", 1_500_000_001 - 16_384),  # beside the part that lies there
        "1,500,000,001 bytes, 1 over Play's 1,500,000,000 a pack",
    ),
    "a part too large": ("part-size", lambda r: grow(r, f"{TWO}/more", 1_400_000_001), "1,400,000,001 bytes, parts"),
    "101 packs": ("pack-count", many_modules, "101 packs, Play takes 100"),
    "over 4 GB": ("total-4gb", lambda r: grow(r, f"{TWO}/more", 4 * GB), "over 4,000,000,000"),
    "over 30 GB": ("total-30gb", lambda r: grow(r, f"{TWO}/more", 30 * GB), "over 30,000,000,000"),
    "no index": ("index", lambda r: (r / "packs.json").unlink(), "there is no such file"),
    "a field too many": ("index", lambda r: edit_index(r, lambda v: v.update(more=1)), "more: Extra inputs"),
    "a path that leaves the folder": (
        "index",
        lambda r: edit_index(r, lambda v: delivery(v)["packs"][1]["files"].update({"../../x": STRANGER})),
        "String should match pattern",
    ),
    "a file is gone": (
        "index-files",
        lambda r: (r / TWO / "bundle/content/demo_q4.onnx.data.1").unlink(),
        "the index lists it in pack demo_p2, but it is not there",
    ),
    "a file has other bytes": (
        "index-files",
        lambda r: (r / TWO / "bundle/content/demo_q4.onnx.data.1").write_bytes(bytes(16384)),
        "the index says sha256",
    ),
    "a file is shorter": (
        "index-files",
        lambda r: (r / TWO / "bundle/content/demo_q4.onnx.data.1").write_bytes(b""),
        "the index says 16,384 bytes, found 0",
    ),
    "a file too many": ("index-files", lambda r: add(r, f"{ONE}/bundle/content/evil.so"), "it is not in the index"),
    "the app's copy is another": (
        "index-files",
        lambda r: edit_index(r, lambda v: v.update(release=8), f"{ONE}/packs.json"),
        "it differs from this delivery",
    ),
    "the app's copy is damaged": ("index-files", lambda r: (r / ONE / "packs.json").write_text("{"), "cannot be read"),
    "wrong totals": ("index-digests", lambda r: edit_index(r, lambda v: delivery(v).update(bytes=1)), "says 1 bytes"),
    "a wrong digest": (
        "index-digests",
        lambda r: edit_index(r, lambda v: delivery(v)["packs"][0].update(digest="0" * 64)),
        "its files give",
    ),
    "a file in no pack": (
        "joins",
        lambda r: edit_index(r, lambda v: delivery(v)["packs"][0]["files"].pop("bundle/model.sig")),
        "1 of 10 files are in no pack: bundle/model.sig",
    ),
    "a file in two packs": (
        "joins",
        lambda r: edit_index(
            r, lambda v: delivery(v)["packs"][1]["files"].update(delivery(v)["packs"][0]["files"])
        ),
        "in more than one pack",
    ),
    "a file that was not signed": (
        "joins",
        lambda r: edit_index(
            r,
            lambda v: delivery(v)["packs"][1]["files"].update({"bundle/content/x": STRANGER}),
        ),
        "release.json does not list bundle/content/x",
    ),
    "no release.json": ("joins", lambda r: (r / ONE / "bundle/content/release.json").unlink(), "nothing joins"),
    "another app version": (
        "app-versions",
        lambda r: edit_index(r, lambda v: delivery(v).update(min_app_version=9)),
        "the index says min_app_version 9, the signed release.json says 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_the_figures(root: Path, case: str) -> None:
    rule, spoil, fragment = BROKEN[case]
    spoil(root)
    problems = [problem for problem in check_android(root) if problem.rule == rule]
    assert any(fragment in problem.message for problem in problems), "\n".join(map(str, check_android(root)))


def test_every_rule_has_a_failing_fixture() -> None:
    assert {rule.id for rule in RULES} == {rule for rule, _, _ in BROKEN.values()}


def test_only_what_play_disagrees_about_and_margins_are_notes() -> None:
    assert {rule.id for rule in RULES if rule.note} == {"total-4gb", "ram-margin"}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere.* cannot be read: No such file"):
        check_android(tmp_path / "nowhere")


def test_the_shipped_tiers_keep_the_margin() -> None:
    """Thresholds of configs/tiers.yaml as Play's, whatever each class gets."""
    from pipeline.config.phones import load_tiers
    from pipeline.packs.android_rules import SOLD

    for item in load_tiers().tiers.values():
        if item.platform == "android":
            assert any(0.85 * sold * GB <= item.ram_bytes <= 0.90 * sold * GB for sold in SOLD), item


def test_a_selector_is_inclusive_then_exclusive() -> None:
    """Neighbours share an edge and no phone."""
    (_, [lower]), (_, [upper]) = ram_groups(TIERS).values()
    assert lower == Selector(min_bytes=5_250_000_000, max_bytes=upper.min_bytes)
