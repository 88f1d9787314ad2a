"""release.json and refusal.json: deterministic, strict, and written only when the files are as described."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from pipeline import files as file_tools
from pipeline.bundle import release
from pipeline.errors import BundleError

CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)


def sources(tmp_path: Path, names: list[str]) -> dict[str, Path]:
    (tmp_path / "files").mkdir(exist_ok=True)
    for name in names:
        (tmp_path / "files" / name).write_bytes(name.encode())
    return {name: tmp_path / "files" / name for name in names}


def document(maker: Any, tmp_path: Path, **changes: Any) -> release.Release:
    (tmp_path / "sources").mkdir(exist_ok=True)
    return maker.document(tmp_path / "sources", **changes)


def test_times_are_utc_and_expiry_counts_days(maker: Any, tmp_path: Path) -> None:
    hanoi = CREATED.astimezone(timezone(timedelta(hours=7)))
    made = document(maker, tmp_path, created=hanoi)
    assert (made.created, made.expires) == ("2026-01-31T12:00:00Z", "2027-01-31T12:00:00Z")
    assert release.parse_time(made.created) == CREATED


def test_source_date_epoch_wins(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert release.build_time() == datetime(1970, 1, 2, tzinfo=UTC)
    for bad in ("yesterday", "1" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", bad)
        with pytest.raises(BundleError, match="SOURCE_DATE_EPOCH"):
            release.build_time()


def test_the_written_document_reads_back_equal(good_bundle: Path) -> None:
    raw = (good_bundle / "content/release.json").read_bytes()
    read = release.Release.model_validate_json(raw)
    assert read.files == release.describe_files({name: good_bundle / "content" / name for name in read.files})
    assert set(read.files) == set(os.listdir(good_bundle / "content")) - {"release.json"}
    assert "ORT_DISABLE_TELEMETRY=1" in read.telemetry


def test_the_type_of_the_kv_cache_is_signed(maker: Any, tmp_path: Path) -> None:
    assert document(maker, tmp_path, kv_cache="int8").model_dump(mode="json")["kv_cache"] == "int8"
    with pytest.raises(BundleError, match="kv_cache"):
        document(maker, tmp_path, kv_cache="int4")


def test_files_are_linked_not_copied(maker: Any, tmp_path: Path) -> None:
    bundle = maker.bundle(tmp_path / "bundle")
    assert (bundle / "content/LICENSE").samefile(tmp_path / "bundle-sources/LICENSE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": {"kl_mean": float("nan")}}, "should be a finite number"),
        ({"verdict": {"deep": [{"kl": float("inf")}]}}, "should be a finite number"),
        ({"verdict": {"when": CREATED}}, "verdict.when"),
        ({"source": {"revision": "a" * 40}}, "source.files"),
        ({"source": {"revision": "a" * 40, "files": {}, "path": "/home"}}, "source.path"),
        ({"context": 0}, "context"),
        ({"model": "No Such Name"}, "model"),
        ({"created": datetime(2026, 1, 1)}, "has no time zone"),
        ({"created": datetime(9999, 12, 1, tzinfo=UTC)}, "beyond the year 9999"),
    ],
)
def test_a_document_that_cannot_be_written(maker: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        document(maker, tmp_path, **change)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["manifest.json"], "cannot be a file of a bundle"),
        (["release.json"], "cannot be a file of a bundle"),
        ([".hidden"], "cannot be a file of a bundle"),
        (["LICENSE", "license"], "differ only in case"),
    ],
)
def test_names_that_no_bundle_may_hold(maker: Any, tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        release.assemble(tmp_path / "content", sources(tmp_path, names), document(maker, tmp_path))
    assert not (tmp_path / "content").exists()


@pytest.mark.parametrize("spoil", ["missing", "grown", "folder"])
def test_a_file_that_changed_meanwhile_leaves_the_old_bundle(maker: Any, tmp_path: Path, spoil: str) -> None:
    bundle = maker.bundle(tmp_path / "bundle")
    before = {path.name: file_tools.sha256_of(path) for path in (bundle / "content").iterdir()}
    made = document(maker, tmp_path)
    given = {name: tmp_path / "sources" / name for name in made.files}
    given["tokenizer.json"].unlink()
    if spoil == "grown":
        given["tokenizer.json"].write_bytes(b"longer than it was promised to be")
    elif spoil == "folder":
        given["tokenizer.json"].mkdir()
    with pytest.raises(BundleError, match=r"tokenizer\.json .* promises 19 bytes"):
        release.assemble(bundle / "content", given, made)
    assert {path.name: file_tools.sha256_of(path) for path in (bundle / "content").iterdir()} == before
    assert sorted(os.listdir(bundle)) == ["content", "model.sig"]


def test_the_document_must_list_the_files_given(maker: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"disagree about .*LICENSE"):
        release.assemble(tmp_path / "content", {}, document(maker, tmp_path))


def test_a_missing_file_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"wanted in the bundle as a\.onnx"):
        release.describe_files({"a.onnx": tmp_path / "nowhere"})
