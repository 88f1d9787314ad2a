"""What an update costs is counted to the byte, and a tensor that changes moves no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from pipeline import cli
from pipeline.bundle import release
from pipeline.errors import BundleError
from pipeline.publish import update_size
from pipeline.publish.update_size import compare, differing_pages
from tests.artifact.exported import Exported, export
from tests.bundle.conftest import CREATED, Maker
from tests.families import CASES, make_checkpoint
from tests.publish.conftest import Line
from tests.recipes import load_recipe

PAGE = 4096
CHANGED = "model.layers.1.mlp.down_proj.weight"


def pages(*seeds: int) -> bytes:
    """One page of random bytes for each seed."""
    return b"".join(np.random.default_rng(seed).bytes(PAGE) for seed in seeds)


def of(update: update_size.Update, name: str) -> update_size.FileUpdate:
    return next(file for file in update.files if file.name == f"content/demo_q4.onnx.data.{name}")


def test_each_kind_of_change_is_counted(line: Line) -> None:
    old = line.bundle(7, part_0=pages(1, 2, 3), part_1=pages(4), part_2=pages(5, 6), part_3=pages(8), part_4=pages(9))
    new = line.bundle(
        8,
        part_0=pages(1, 7, 3) + b"tail",  # a page changed, a short one added
        part_1=pages(4),
        part_2=pages(6, 5),  # pages that changed places
        part_3=None,
        part_4=None,
        part_5=pages(8),  # under another name
        part_6=pages(10, 1),
    )
    update = compare(old, new)
    found = {name: of(update, name) for name in "0123456"}
    statuses = ["changed", "unchanged", "changed", "gone", "gone", "renamed", "new"]
    assert [file.status for file in found.values()] == statuses
    columns = ("whole_bytes", "changed_page_bytes", "new_page_bytes")
    counts = {name: tuple(getattr(file, column) for column in columns) for name, file in found.items()}
    assert counts["0"] == (3 * PAGE + 4, PAGE + 4, PAGE + 4)
    assert counts["2"] == (2 * PAGE, 2 * PAGE, 0)
    assert counts["6"] == (2 * PAGE, 2 * PAGE, PAGE)
    assert counts["1"] == counts["3"] == counts["4"] == counts["5"] == (0, 0, 0)
    if shutil.which("zstd"):
        assert PAGE < found["0"].delta_bytes < PAGE + 200 and found["2"].delta_bytes < 200
    assert {file.name for file in update.files if file.status == "changed"} >= {"model.sig", "content/release.json"}


@pytest.mark.parametrize("sizes", [(0, 0), (0, 10), (10, 0), (5000, 5000), (9000, 4096), (4096, 9000), (12288, 12288)])
def test_pages_at_the_same_offset(sizes: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.integers(0, 256, size).astype(np.uint8) for size in sizes)
    new[: min(sizes) // 2] = old[: min(sizes) // 2]
    new[-4096:] = old[-len(new[-4096:]) :] if sizes[0] == sizes[1] else new[-4096:]
    (tmp_path / "old").write_bytes(old.tobytes())
    (tmp_path / "new").write_bytes(new.tobytes())
    starts = range(0, len(new), PAGE)
    pairs = [(new[start : start + PAGE].tobytes(), old[start : start + PAGE].tobytes()) for start in starts]
    expected = [len(ours) * (ours != theirs) for ours, theirs in pairs]
    assert list(differing_pages(tmp_path / "old", tmp_path / "new")) == expected


# --- two plans that differ in one tensor's data ----------------------------------------------------------------------


def bundled(exported: Exported, maker: Maker, where: Path, number: int) -> Path:
    """A signed bundle of the quantized checkpoint."""
    artifact = where / "artifact"
    exported.write(load_recipe("q4"), artifact, part_bytes=1 << 20)
    paths = {file.name: file for file in artifact.iterdir()}
    (where / "unused").mkdir()
    document = maker.document(
        where / "unused",
        signing=maker.config.model_copy(update={"release": number}),
        created=CREATED,
        files=release.describe_files(paths),
    )
    return maker.write(where / "bundle", document, paths)


def test_one_changed_tensor_changes_its_own_pages_only(tmp_path: Path, maker: Maker) -> None:
    first, second = (make_checkpoint(tmp_path / name, CASES["llama-untied"]) for name in ("first", "second"))
    tensors = load_file(second / "model.safetensors")
    assert CHANGED in tensors
    tensors[CHANGED] = tensors[CHANGED][::-1].copy()
    save_file(tensors, second / "model.safetensors")
    exports = [export(first), export(second)]
    folders = [tmp_path / "a", tmp_path / "b"]
    old, new = (bundled(*item) for item in zip(exports, [maker] * 2, folders, [7, 8], strict=True))
    places = exports[0].draft(load_recipe("q4"), 1 << 20).layout.places
    touched = {
        page
        for name, place in places.items()
        if "layers.1" in name and "down_proj" in name
        for page in range(place.offset // PAGE, -(-(place.offset + place.length) // PAGE))
    }
    data = next(name for name in (old / "content").iterdir() if ".data" in name.name).name
    differing = np.flatnonzero(list(differing_pages(old / "content" / data, new / "content" / data)))
    assert len(differing) and set(differing.tolist()) <= touched
    update = compare(old, new)
    parts = [file for file in update.files if ".data" in file.name]
    assert sum(file.changed_page_bytes for file in parts) <= len(touched) * PAGE
    assert update.totals["changed_page_bytes"] < update.totals["whole_bytes"] / 2


# --- refusals and output ---------------------------------------------------------------------------------------------


def test_folders_that_are_no_bundles_are_refused(line: Line, maker: Maker, tmp_path: Path) -> None:
    good = line.bundle()
    with pytest.raises(BundleError, match="is no bundle"):
        compare(good, tmp_path)
    with pytest.raises(BundleError, match="is a refusal"):
        compare(maker.refusal(tmp_path / "refusal"), good)
    with pytest.raises(BundleError, match="are not releases of one bundle"):
        compare(good, line.bundle(8, variant="q3"))
    bad = line.bundle(8)
    (bad / "content" / "demo_q4.onnx.data.0").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"has 5 bytes, release\.json says 30,000"):
        compare(good, bad)
    (bad / "content" / "release.json").write_text("{}")
    with pytest.raises(BundleError, match=r"its release\.json is none \(the whole: "):
        compare(good, bad)


def test_the_command_prints_a_table_or_json(line: Line) -> None:
    arguments = ["update-size", str(line.bundle()), str(line.bundle(8, part_1=b"new"))]
    table = CliRunner().invoke(cli.cli, arguments).output
    assert "demo q4 release 7 → demo q4 release 8: bytes to download" in table and "whole files" in table
    value = json.loads(CliRunner().invoke(cli.cli, [*arguments, "--json"]).output)
    assert value["new"]["release"] == 8 and value["total"]["whole_bytes"] > 3
    assert {file["name"]: file["status"] for file in value["files"]}["content/demo_q4.onnx.data.1"] == "changed"


def test_without_zstd_there_is_no_delta_and_it_says_so(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    update = compare(line.bundle(), line.bundle(8, part_1=b"new"))
    assert update.totals["delta_bytes"] is None and "zstd is not installed" in update.describe()
