"""A folder that anybody may have edited is answered with problems, whatever is in it, and never with a traceback."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.packs.android_rules import check_android
from pipeline.packs.ios_rules import check_ios
from tests.packs.storefront import Shop
from tests.packs.test_android import GROUPS, swap
from tests.packs.test_ios import MANIFEST

CHECKS: dict[str, Callable[[Path], Any]] = {"android": check_android, "ios": check_ios}


@pytest.mark.parametrize("store", CHECKS)
def test_damaged_texts_are_problems(shop: Shop, tmp_path: Path, store: str) -> None:
    """Every text in turn: cut, emptied, bits turned, lines doubled. A damage that means nothing may pass."""
    root = getattr(shop, f"write_{store}")(tmp_path / store)
    rng = random.Random(5)
    texts = [
        path for path in root.rglob("*") if path.suffix in {".json", ".gradle", ".xml", ".properties", ".entitlements"}
    ]
    assert len(texts) >= 6
    for path in texts:
        good = path.read_bytes()
        path.unlink()  # a link to what was signed
        flipped = bytearray(good)
        for _ in range(8):
            flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        for bad in (b"", b"[" * 100_000, b"\xff\xfe", good[: len(good) // 2], bytes(flipped), good + good):
            path.write_bytes(bad)
            for problem in CHECKS[store](root):
                assert str(problem).isprintable()
        path.write_bytes(good)
    assert CHECKS[store](root) == []


@pytest.mark.parametrize("store", CHECKS)
@pytest.mark.parametrize("name", [b"\xff", b"a\x1b[2J", "ä".encode()])
def test_names_that_a_terminal_should_not_see(shop: Shop, tmp_path: Path, store: str, name: bytes) -> None:
    root = getattr(shop, f"write_{store}")(tmp_path / store)
    folder = next(path for path in root.rglob("*") if path.name.endswith(("#group_ram_12gb", "q4-r7-p1")))
    (folder / os.fsdecode(name)).write_bytes(b"")
    problems = CHECKS[store](root)
    assert [problem.rule for problem in problems] == ["regular-files"]
    assert all(str(problem).isascii() and str(problem).isprintable() for problem in problems)


@pytest.mark.parametrize("number", ["9" * 5000, "١٢", "-1", "1e9", "0x10", ""])
@pytest.mark.parametrize("end", ["min", "max"])
def test_numbers_that_are_none(shop: Shop, tmp_path: Path, number: str, end: str) -> None:
    root = shop.write_android(tmp_path / "android")
    swap(
        root,
        GROUPS,
        f'ram-{end}-bytes="{"5250000000" if end == "min" else "10500000000"}"',
        f'ram-{end}-bytes="{number}"',
    )
    assert "selector-ram" in {problem.rule for problem in check_android(root)}


@pytest.mark.parametrize("version", ["8..10", ".", "99999999999", "8.10.0-alpha01", "latest"])
def test_versions_that_are_none(shop: Shop, tmp_path: Path, version: str) -> None:
    root = shop.write_android(tmp_path / "android")
    swap(root, "build.gradle", "8.10.0'", f"{version}'")
    check_android(root)


def test_a_fifo_is_not_read(shop: Shop, tmp_path: Path) -> None:
    root = shop.write_ios(tmp_path / "ios")
    (root / MANIFEST).unlink()
    os.mkfifo(root / MANIFEST)
    assert {"regular-files", "every-pack"} <= {problem.rule for problem in check_ios(root)}


def test_a_folder_that_is_a_link_is_not_followed(shop: Shop, tmp_path: Path) -> None:
    root = shop.write_ios(tmp_path / "ios")
    outside = Path(shutil.move(root / "demo-q3-r7-p1", tmp_path / "outside"))
    (root / "demo-q3-r7-p1").symlink_to(outside)
    rules = {problem.rule for problem in check_ios(root)}
    assert {"regular-files", "selectors", "index-files"} <= rules
