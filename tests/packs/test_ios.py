"""iOS asset packs as they are written, and one broken folder for every rule that they must keep."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError
from pipeline.packs.ios import Choice, manifest, pack_id, plan_ios, write_ios
from pipeline.packs.ios_rules import RULES, check_ios, describe_ios
from tests.bundle.conftest import WAY
from tests.packs.storefront import GB, PACK_BYTES, Shop, tier
from tests.packs.test_android import STRANGER, add, edit_index, grow, swap

ONE, TWO = "demo-q4-r7-p1", "demo-q4-r7-p2"
MANIFEST = f"manifests/{ONE}.json"


# --- planning and writing --------------------------------------------------------------------------------------------


def test_ids_name_model_variant_release_and_part_without_dots() -> None:
    assert pack_id("phi-4", "q4_k_m", 7, 2) == "phi-4-q4-k-m-r7-p2"
    assert pack_id("4b", "q4", 1, 1) == "ai-4b-q4-r1-p1"


def test_the_manifest_is_apples() -> None:
    assert manifest("mimo7b-q4-v1") == {
        "assetPackID": "mimo7b-q4-v1",
        "downloadPolicy": {"onDemand": {}},
        "fileSelectors": [{"directory": "mimo7b-q4-v1"}],
        "platforms": ["iOS"],
    }


def test_the_written_folder_keeps_every_rule(shop: Shop, tmp_path: Path) -> None:
    root = shop.write_ios(tmp_path / "ios")
    assert check_ios(root) == []
    tops = {"App.entitlements", "manifests", "packs.json", "upload.sh"}
    assert set(os.listdir(root)) == tops | {"demo-q3-r7-p1", ONE, TWO}
    assert json.loads((root / MANIFEST).read_text()) == manifest(ONE)
    assert (root / TWO / "bundle/content/demo_q4.onnx.data.1").exists()
    index = json.loads((root / "packs.json").read_text())
    assert index["deliveries"]["q4"]["min_app_version"] == 1 and index["deliveries"]["q4"]["max_app_version"] is None
    text = describe_ios(root)
    assert "packs: 3 of 100" in text and "of 200 GB" in text and f"{index['deliveries']['q4']['bytes']:,} bytes" in text


def test_the_app_picks_the_best_that_fits(shop: Shop) -> None:
    """From the top of the table, by what os_proc_available_memory() says."""
    choices = shop.ios.choices
    assert choices == [
        Choice(variant="q4", way=WAY, need_bytes=4 * GB, kl_mean=0.1),
        Choice(variant="q3", way=WAY, need_bytes=2 * GB, kl_mean=0.2),
    ]

    def pick(available: int) -> str | None:
        return next((row.variant for row in choices if row.need_bytes <= available), None)

    assert [pick(size) for size in (5 * GB, 4 * GB, 4 * GB - 1, 2 * GB - 1)] == ["q4", "q4", "q3", None]


def test_one_variant_in_two_ways_is_delivered_once_and_loaded_where_memory_allows(shop: Shop) -> None:
    """Mapped on the smaller class, private on the larger one: the way that needs more comes first."""
    large = shop.document.tiers["ios-12gb"]
    way = large.way.model_copy(update={"weights": "mapped"})
    small = large.model_copy(update={"way": way, "need_bytes": GB, "mapped_bytes": 3 * GB})
    document = shop.document.model_copy(update={"tiers": {"ios-8gb": small, "ios-12gb": large}})
    index = plan_ios(document, shop.bundles)
    assert list(index.deliveries) == ["q4"]
    assert [(row.way.weights, row.need_bytes) for row in index.choices] == [("private", 4 * GB), ("mapped", GB)]


def test_the_commands_package_and_upload_every_pack(shop: Shop, tmp_path: Path) -> None:
    """Run with a stand-in for xcrun, from another directory, twice: ba-package does not overwrite."""
    root = shop.write_ios(tmp_path / "ios")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/xcrun"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/log"\n'
        '[ "$1" != ba-package ] || { [ ! -e "$5" ] && cp "$3" "$5"; }\n'  # fails where the archive exists
    )
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "APPLE_ID": "123", "API_KEY": "K", "API_ISSUER": "I"}
    for _ in range(2):
        subprocess.run(["sh", str(root / "upload.sh")], cwd="/", env=environment, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2 * (2 * 3 + 1)
    assert f"ba-package package {MANIFEST} --output-path build/{ONE}.aar" in lines
    assert f"altool --upload-asset-pack build/{TWO}.aar --apple-id 123 --apiKey K --apiIssuer I" in lines
    assert check_ios(root) == []  # archives in build/ are no packs
    (tmp_path / "log").unlink()
    subprocess.run(["sh", str(root / "upload.sh"), TWO], env=environment, check=True)
    assert len((tmp_path / "log").read_text().splitlines()) == 2 + 1
    del environment["API_KEY"]
    done = subprocess.run(["sh", str(root / "upload.sh")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "API_KEY" in done.stderr


def test_a_model_for_no_iphone_has_no_packs(shop: Shop, tmp_path: Path) -> None:
    document = TiersDocument.model_validate(
        shop.document.model_dump() | {"tiers": {"ios-8gb": tier("ios", 8, None).model_dump()}}
    )
    write_ios(tmp_path / "ios", plan_ios(document, {}), {})
    assert os.listdir(tmp_path / "ios") == ["packs.json"] and check_ios(tmp_path / "ios") == []


def test_two_variants_never_share_an_id(shop: Shop) -> None:
    tiers = {"ios-8gb": tier("ios", 8, "q3"), "ios-12gb": tier("ios", 12, "q4")}
    twins = {
        name: item.model_copy(update={"variant": variant})
        for (name, item), variant in zip(tiers.items(), ("q4_k", "q4-k"), strict=True)
    }
    document = shop.document.model_copy(update={"tiers": twins})
    bundles = {"q4_k": shop.bundles["q3"], "q4-k": shop.bundles["q4"]}
    with pytest.raises(BundleError, match="asset packs demo-q4-k-r7-p1 would be two"):
        plan_ios(document, bundles, PACK_BYTES)


# --- ids are for ever ------------------------------------------------------------------------------------------------


def other_bytes(shop: Shop) -> Shop:
    """The same shop with another tokenizer in q4."""
    place = "bundle/content/tokenizer.json"
    packed = shop.bundles["q4"]
    files = packed.files | {place: packed.files[place].model_copy(update={"sha256": "f" * 64})}
    return replace(shop, bundles=shop.bundles | {"q4": replace(packed, files=files)})


def test_an_id_that_was_published_keeps_its_bytes(shop: Shop, tmp_path: Path) -> None:
    before = shop.write_ios(tmp_path / "before")
    after = other_bytes(shop).write_ios(tmp_path / "after")
    (problem,) = [item for item in check_ios(after, before) if item.rule == "immutable"]
    assert problem.where == ONE and "raise the release number" in problem.message
    assert "immutable" not in {item.rule for item in check_ios(after)}
    assert check_ios(before, before) == []


def test_a_higher_release_has_ids_of_its_own(shop: Shop, tmp_path: Path) -> None:
    before = shop.write_ios(tmp_path / "before")
    changed = other_bytes(shop)
    document = changed.document.model_copy(update={"release": 8})
    after = replace(changed, document=document).write_ios(tmp_path / "after")
    assert "immutable" not in {item.rule for item in check_ios(after, before)}


# --- one broken folder per rule --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop.write_ios(tmp_path_factory.mktemp("ios") / "ios")


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    """A private copy, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "ios"))


def edit(root: Path, **changes: Any) -> None:
    value = json.loads((root / MANIFEST).read_text()) | changes
    (root / MANIFEST).write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def delivery(index: dict[str, Any]) -> dict[str, Any]:
    return index["deliveries"]["q4"]


def rename(root: Path, name: str) -> None:
    """A pack under another name, everywhere."""
    (root / ONE).rename(root / name)
    (root / MANIFEST).write_text(json.dumps(manifest(name)))
    for index in ("packs.json", f"{name}/packs.json"):
        (root / index).write_text((root / index).read_text().replace(ONE, name))


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a link": ("regular-files", lambda r: (r / ONE / "link").symlink_to("/etc/passwd"), "found lrwxrwxrwx"),
    "no JSON": ("manifest", lambda r: (r / MANIFEST).write_text("{"), "it is no JSON"),
    "a list": ("manifest", lambda r: (r / MANIFEST).write_text("[]"), "expected a JSON object"),
    "a key too few": ("manifest", lambda r: edit(r, platforms=None), "found assetPackID, downloadPolicy, fileSel"),
    "a key too many": ("manifest", lambda r: edit(r, version=1), "platforms, version"),
    "a dot in an id": ("id", lambda r: edit(r, assetPackID="demo.q4"), "'demo.q4' must be letters"),
    "a number as id": ("id", lambda r: edit(r, assetPackID=7), "assetPackID 7 must be letters"),
    "an id twice": ("id-unique", lambda r: edit(r, assetPackID=TWO), f"2 manifests have the assetPackID '{TWO}'"),
    "an id without release": (
        "id-names",
        lambda r: rename(r, "demo-q4-p1"),
        f"must name model, variant and release: {ONE}",
    ),
    "no policy": ("policy", lambda r: edit(r, downloadPolicy={}), "exactly one of"),
    "two policies": (
        "policy",
        lambda r: edit(r, downloadPolicy={"onDemand": {}, "essential": {}}),
        "exactly one of essential, onDemand, prefetch",
    ),
    "prefetch without events": ("policy", lambda r: edit(r, downloadPolicy={"prefetch": {}}), "installationEventTypes"),
    "an unknown event": (
        "policy",
        lambda r: edit(r, downloadPolicy={"essential": {"installationEventTypes": ["always"]}}),
        "installationEventTypes",
    ),
    "onDemand with options": (
        "policy",
        lambda r: edit(r, downloadPolicy={"onDemand": {"installationEventTypes": ["firstInstallation"]}}),
        "takes no options",
    ),
    "another platform": ("platforms", lambda r: edit(r, platforms=["macOS"]), "expected ['iOS']"),
    "the whole folder": ("selectors", lambda r: edit(r, fileSelectors=[{"directory": "."}]), "all packs share one"),
    "a path out of the folder": ("selectors", lambda r: edit(r, fileSelectors=[{"file": "../x"}]), "expected the one"),
    "another pack's folder": ("selectors", lambda r: edit(r, fileSelectors=[{"directory": TWO}]), "expected the one"),
    "a folder that is not there": ("selectors", lambda r: shutil.rmtree(r / ONE), "which is not there"),
    "a folder without manifest": ("every-pack", lambda r: (r / MANIFEST).unlink(), "no manifest selects this folder"),
    "a manifest without pack": (
        "every-pack",
        lambda r: add(r, "manifests/x.json", json.dumps(manifest("x")).encode()),
        "pack x is in only one of index and manifests",
    ),
    "a stray file": ("no-stray-files", lambda r: add(r, "model.onnx"), "a file in no pack's folder"),
    "no entitlement": ("entitlement", lambda r: (r / "App.entitlements").unlink(), "no property list"),
    "an entitlement that is off": (
        "entitlement",
        lambda r: swap(r, "App.entitlements", "<true/>", "<false/>"),
        "increased-memory-limit is not true",
    ),
    "101 packs": ("pack-count", lambda r: [add(r, f"p{number}/x") for number in range(98)], "101 packs"),
    "over 200 GB": ("total-200gb", lambda r: grow(r, f"{ONE}/more", 200 * GB), "over Apple's 200,000,000,000"),
    "no index": ("index", lambda r: (r / "packs.json").unlink(), "there is no such file"),
    "an index of another version": ("index", lambda r: edit_index(r, lambda v: v.update(more=1)), "more: Extra inputs"),
    "a file has other bytes": (
        "index-files",
        lambda r: (r / TWO / "bundle/content/demo_q4.onnx.data.1").write_bytes(bytes(16384)),
        "the index says sha256",
    ),
    "a file too many": ("index-files", lambda r: add(r, f"{ONE}/bundle/content/evil.so"), "it is not in the index"),
    "a wrong digest": (
        "index-digests",
        lambda r: edit_index(r, lambda v: delivery(v)["packs"][0].update(digest="0" * 64)),
        "its files give",
    ),
    "a choice too few": ("choices", lambda r: edit_index(r, lambda v: v["choices"].pop()), "different variants"),
    "choices upside down": ("choices", lambda r: edit_index(r, lambda v: v["choices"].reverse()), "lowest KL"),
    "a file that was not signed": (
        "joins",
        lambda r: edit_index(r, lambda v: delivery(v)["packs"][1]["files"].update({"bundle/content/x": STRANGER})),
        "release.json does not list bundle/content/x",
    ),
    "another app version": (
        "app-versions",
        lambda r: edit_index(r, lambda v: delivery(v).update(max_app_version=9)),
        "the index says max_app_version 9, the signed release.json says None",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_the_figures(root: Path, case: str) -> None:
    rule, spoil, fragment = BROKEN[case]
    spoil(root)
    problems = [problem for problem in check_ios(root) if problem.rule == rule]
    assert any(fragment in problem.message for problem in problems), "\n".join(map(str, check_ios(root)))


def test_every_rule_has_a_failing_fixture() -> None:
    """`immutable` has its own above: it needs an earlier release."""
    assert {rule.id for rule in RULES} == {rule for rule, _, _ in BROKEN.values()} | {"immutable"}


def test_an_earlier_release_without_index_cannot_be_compared(root: Path, good: Path) -> None:
    (root / "packs.json").unlink()
    (problem,) = [item for item in check_ios(good, root) if item.rule == "immutable"]
    assert "cannot be compared: there is no such file" in problem.message
