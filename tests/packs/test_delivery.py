"""Bundles split over packs and joined again: every file once, in order, under the limit, verifiable after joining."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact.write import draft
from pipeline.bundle.release import FileEntry
from pipeline.bundle.verify import verify, verify_tiers
from pipeline.config.recipes import load_recipe
from pipeline.errors import BundleError
from pipeline.graph.decoder import build_decoder
from pipeline.packs.delivery import PACK_BYTES, Delivery, pack_digest, split
from pipeline.planning.recipes import make_plan
from tests.bundle.test_verify import NOW
from tests.packs.storefront import GB, MODEL, Shop
from tests.real_configs import architecture_of, references

PART = 1_400_000_000


def test_small_files_come_first_and_parts_by_number() -> None:
    sizes = {f"m.data.{number}": PART for number in (10, 2, 1)} | {"tokenizer.json": 7, "m.onnx": 9}
    assert split(sizes) == (("m.onnx", "tokenizer.json", "m.data.1"), ("m.data.2",), ("m.data.10",))


def test_a_file_that_fills_a_pack_exactly_still_goes() -> None:
    assert split({"a": 4, "b": 6, "c": 10, "d": 1}, 10) == (("a", "b"), ("c",), ("d",))


def test_a_file_larger_than_a_pack_is_refused_with_the_figures() -> None:
    with pytest.raises(BundleError, match=r"m\.data\.0 has 11 bytes, a pack holds 10: .* Lower part_bytes"):
        split({"m.data.0": 11}, 10)


NAMES = st.from_regex(r"\A[a-z]{1,8}(\.data\.[0-9]{1,3})?\Z")


@given(st.dictionaries(NAMES, st.integers(0, 1000), min_size=1, max_size=30), st.integers(1000, 5000))
def test_laws_of_the_split(sizes: dict[str, int], pack_bytes: int) -> None:
    packs = split(sizes, pack_bytes)
    assert sorted(name for pack in packs for name in pack) == sorted(sizes)
    assert all(pack and sum(sizes[name] for name in pack) <= pack_bytes for pack in packs)
    for one, two in itertools.pairwise(packs):  # no pack is opened while there is room
        assert sum(sizes[name] for name in one) + sizes[two[0]] > pack_bytes
    assert split(dict(reversed(sizes.items())), pack_bytes) == packs


@given(st.integers(1, 12), st.integers(1, PART))
def test_a_part_more_moves_no_other_file(parts: int, last: int) -> None:
    sizes = {"m.onnx": 10**6} | {f"m.data.{number}": PART for number in range(parts)}
    before, after = split(sizes), split(sizes | {f"m.data.{parts}": last})
    assert after[: len(before) - 1] == before[:-1]
    assert after[len(before) - 1][: len(before[-1])] == before[-1]


@pytest.mark.parametrize(
    ("model", "variant", "packs"),
    [
        ("mimo-8b", "q4", 3),
        ("mimo-8b", "q4_k_m", None),
        ("phi-4", "q4", 6),
        ("phi-4", "q4_k_m", None),
        ("phi-4-mini", "q4", 2),
    ],
)
def test_full_size_models_byte_by_byte_from_their_shapes(
    model: str, variant: str, packs: int | None, tmp_path: Path
) -> None:
    """No file is needed: the drafted sizes are those that quantize will write."""
    architecture, recipe = architecture_of(model, tmp_path), load_recipe(variant)
    source, _ = build_decoder(architecture, references(architecture), 4096)
    drafted = draft(source, make_plan(architecture, recipe), f"{model}_{variant}".replace("-", "_"), recipe.part_bytes)
    sizes = {drafted.model_file: drafted.model.ByteSize()}
    sizes |= dict(zip(drafted.files[1:], drafted.layout.parts, strict=True))
    assert sum(sizes.values()) == drafted.bytes
    assert all(size <= PART for size in drafted.layout.parts)
    sizes |= {"tokenizer.json": 20_000_000, "release.json": 10_000, "model.sig": 4_000}
    found = split(sizes)
    assert -(-sum(sizes.values()) // PACK_BYTES) <= len(found) <= len(drafted.layout.parts)
    assert packs in (None, len(found))
    assert sum(sizes[name] for pack in found for name in pack) == drafted.bytes + 20_014_000
    assert max(sum(sizes[name] for name in pack) for pack in found) <= PACK_BYTES < 1.5 * GB


def test_the_digest_of_a_pack_is_its_places_and_bytes() -> None:
    one, two = FileEntry(size=1, sha256="a" * 64), FileEntry(size=1, sha256="b" * 64)
    digest = pack_digest({"x": one, "y": two})
    assert digest == pack_digest({"y": two, "x": one})
    assert (
        len({digest, pack_digest({"x": two, "y": one}), pack_digest({"x": one}), pack_digest({"z": one, "y": two})})
        == 4
    )


def join(delivery: Delivery, folders: list[Path], target: Path) -> None:
    """The app's rule of docs/stores.md: copy every file of every pack to its place, nothing else."""
    for pack, folder in zip(delivery.packs, folders, strict=True):
        for place in pack.files:
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / place, target / place)


@pytest.mark.parametrize(("group", "variant", "packs"), [("ram_6gb", "q3", 1), ("ram_12gb", "q4", 2)])
def test_android_packs_join_to_what_was_signed(
    shop: Shop, public_key: Path, tmp_path: Path, group: str, variant: str, packs: int
) -> None:
    """As the phone does it: only what Play delivers to the group, and the index in its first pack."""
    root = shop.write_android(tmp_path / "android")
    modules = sorted(path.parent.name for path in root.glob("*/src"))
    folders = [root / module / f"src/main/assets/{module}#group_{group}" for module in modules]
    delivery = Delivery.model_validate_json((folders[0] / "packs.json").read_bytes())
    assert [pack.name for pack in delivery.packs] == modules[:packs] and delivery.variant == variant
    join(delivery, folders[:packs], tmp_path / "joined")
    assert_verifies(tmp_path / "joined", public_key, variant)


def test_ios_packs_join_to_what_was_signed(shop: Shop, public_key: Path, tmp_path: Path) -> None:
    root = shop.write_ios(tmp_path / "ios")
    index = json.loads((root / "packs.json").read_text())
    for variant in index["deliveries"]:
        delivery = Delivery.model_validate(index["deliveries"][variant])
        assert delivery == Delivery.model_validate_json((root / delivery.packs[0].name / "packs.json").read_bytes())
        join(delivery, [root / pack.name for pack in delivery.packs], tmp_path / variant)
        assert_verifies(tmp_path / variant, public_key, variant)


def assert_verifies(joined: Path, public_key: Path, variant: str) -> None:
    report = verify(joined / "bundle", public_key, now=NOW, model=MODEL, variant=variant)
    assert report.ok, report.describe()
    assert verify_tiers(joined / "tiers", public_key, now=NOW, model=MODEL).ok


@pytest.mark.parametrize("store", ["android", "ios"])
def test_big_files_are_linked_and_two_builds_are_equal(shop: Shop, tmp_path: Path, store: str) -> None:
    write: Any = getattr(shop, f"write_{store}")
    before = os.umask(0o077)
    try:
        write(tmp_path / "one")
    finally:
        os.umask(before)
    write(tmp_path / "two")
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    (part,) = (tmp_path / "one").rglob("demo_q4.onnx.data.1")  # q4 alone has it
    assert part.samefile(shop.folders["q4"] / "content/demo_q4.onnx.data.1")


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
