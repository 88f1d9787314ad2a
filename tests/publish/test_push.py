"""Only what verifies is published, everything is written before what names it, and nothing is ever changed."""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.bundle import keys
from pipeline.errors import BundleError, ResourceError
from pipeline.publish import push as pushing
from pipeline.publish.fetch import fetch
from pipeline.publish.places import Folder, Place, open_place
from pipeline.publish.push import push
from tests.bundle.conftest import Maker
from tests.publish.conftest import NOW, PARTS, SMALL, Line

FILES = len(PARTS | SMALL) + 1  # with release.json


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty store of each kind; fsspec's memory stands for S3."""
    if request.param == "folder":
        return open_place(str(tmp_path / "store"))
    made = Place(MemoryFileSystem(skip_instance_cache=True), f"/{uuid.uuid4().hex}", "s3://bucket/x")
    return made


@pytest.fixture
def send(store: Place, public_key: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Push to `store`."""
    monkeypatch.setattr(pushing, "open_place", lambda address: store)
    monkeypatch.setattr("pipeline.publish.fetch.open_place", lambda address: store)
    return lambda bundle: push(bundle, "there", public_key, now=NOW)


def contents(store: Any) -> dict[str, bytes]:
    """Every file of a store."""
    if isinstance(store, Folder):
        return {
            str(file.relative_to(store.root)): file.read_bytes()
            for file in Path(store.root).rglob("*")
            if file.is_file()
        }
    names = store.filesystem.find(store.root)
    return {name.removeprefix(f"{store.root}/"): store.filesystem.cat_file(name) for name in names}


def test_files_lie_under_their_digest_and_signatures_under_their_release(
    store: Any, send: Any, line: Line, tmp_path: Path, public_key: Path
) -> None:
    bundle = line.bundle()
    assert send(bundle).startswith(f"demo q4 release 7: {FILES} of {FILES} files, ")
    files = contents(store)
    signature = (bundle / "model.sig").read_bytes()
    assert files.pop("bundles/demo/q4/7/model.sig") == files.pop("bundles/demo/q4/latest.sig") == signature
    assert files == {
        f"blobs/sha256/{hashlib.sha256(file.read_bytes()).hexdigest()}": file.read_bytes()
        for file in (bundle / "content").iterdir()
    }
    assert fetch("there", "demo", tmp_path / "to", public_key, variant="q4", now=NOW).document.release == 7


def test_a_release_is_published_once(store: Any, send: Any, line: Line) -> None:
    bundle = line.bundle()
    send(bundle)
    before = contents(store)
    assert f"0 of {FILES} files, 0 bytes" in send(bundle) and f"{FILES} were there" in send(bundle)
    assert contents(store) == before


def test_the_next_release_writes_what_changed_and_moves_the_pointer(store: Any, send: Any, line: Line) -> None:
    send(line.bundle())
    before = contents(store)
    following = line.bundle(8, part_1=b"new")
    assert f"2 of {FILES} files" in send(following)
    after = contents(store)
    assert after.pop("bundles/demo/q4/latest.sig") == (following / "model.sig").read_bytes()
    del before["bundles/demo/q4/latest.sig"]
    assert before.items() <= after.items()


def test_other_bytes_under_a_published_number_are_refused(store: Any, send: Any, line: Line) -> None:
    send(line.bundle())
    before = contents(store)
    with pytest.raises(BundleError, match=r"demo q4 release 7 is published with another signature"):
        send(line.bundle(part_1=b"new"))
    assert contents(store) == before


def test_a_lower_release_than_published_is_refused(store: Any, send: Any, line: Line) -> None:
    older = line.bundle(9)
    send(older)
    send(line.bundle(10))
    before = contents(store)
    for bundle in (line.bundle(8), older):
        with pytest.raises(BundleError, match="older than what is published, release 10"):
            send(bundle)
    assert contents(store) == before


def test_variants_and_models_do_not_meet(store: Any, send: Any, line: Line) -> None:
    send(line.bundle(9))
    send(line.bundle(8, variant="q3"))
    assert {name for name in contents(store) if not name.startswith("blobs")} == {
        "bundles/demo/q4/9/model.sig",
        "bundles/demo/q4/latest.sig",
        "bundles/demo/q3/8/model.sig",
        "bundles/demo/q3/latest.sig",
    }


def test_a_killed_push_published_nothing_and_goes_on(
    store: Any, send: Any, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, sent = type(store).put, []

    def dying(self: Any, *arguments: Any) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(arguments)
        put(self, *arguments)

    bundle = line.bundle()
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put", dying)
        with pytest.raises(KeyboardInterrupt):
            send(bundle)
    assert all(name.startswith("blobs/") for name in contents(store))
    assert f"{FILES - 3} of {FILES} files" in send(bundle)


def test_a_blob_of_another_size_is_neither_trusted_nor_replaced(store: Any, send: Any, line: Line) -> None:
    bundle = line.bundle()
    name = f"blobs/sha256/{hashlib.sha256(SMALL['demo_q4.onnx']).hexdigest()}"
    store.write(name, b"short")
    with pytest.raises(BundleError, match=r"has 5 bytes, demo_q4\.onnx has 500: it was not written by push"):
        send(bundle)
    assert store.read(name) == b"short" and "bundles/demo/q4/latest.sig" not in contents(store)


def test_a_store_that_loses_bytes_is_noticed(
    store: Any, send: Any, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = line.bundle()
    if isinstance(store, Folder):
        monkeypatch.setattr("pipeline.publish.places.files.sha256_of", lambda path: "0" * 64)
        expected = "reads back with sha256 000"
    else:
        monkeypatch.setattr(store.filesystem, "put_file", lambda source, key: store.filesystem.pipe_file(key, b"x"))
        expected = "has 1 bytes after the upload"
    with pytest.raises(BundleError, match=expected):
        send(bundle)


# --- what may be published -------------------------------------------------------------------------------------------


def spoil(bundle: Path) -> None:
    (bundle / "content" / "README.md").write_bytes(b"x" * len(SMALL["README.md"]))


@pytest.mark.parametrize(
    ("harm", "found"), [(spoil, "modified"), (lambda bundle: (bundle / "model.sig").unlink(), "missing-signature")]
)
def test_a_bundle_that_does_not_verify_is_refused(harm: Any, found: str, store: Any, send: Any, line: Line) -> None:
    bundle = line.bundle()
    harm(bundle)
    with pytest.raises(BundleError, match=f"so it is not published: {found}: "):
        send(bundle)
    assert contents(store) == {}


def test_a_refusal_is_no_bundle(store: Any, send: Any, maker: Maker, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"demo/q4 was refused, there is no bundle: mean KL 0\.31"):
        send(maker.refusal(tmp_path / "refusal"))
    assert contents(store) == {}


def test_a_development_bundle_needs_the_word(line: Line, stranger: Maker, tmp_path: Path) -> None:
    maker = Maker(stranger.private, kind="development")
    (tmp_path / "dev").mkdir()
    bundle = Line(maker, tmp_path / "dev").bundle()
    key = tmp_path / "dev.pem"
    keys.export_public_key(maker.key, key)
    with pytest.raises(BundleError, match="development-key"):
        push(bundle, str(tmp_path / "store"), key, now=NOW)
    assert "release 7" in push(bundle, str(tmp_path / "store"), key, now=NOW, allow_development=True)


def test_tiers_follow_the_bundles_that_they_name(store: Any, send: Any, line: Line) -> None:
    bundle = line.bundle()
    tiers = line.tiers(bundle)
    with pytest.raises(BundleError, match=r"demo tiers release 7 names q4 release 7, which is not published"):
        send(tiers)
    send(bundle)
    with pytest.raises(BundleError, match="is published with another signature"):
        send(line.tiers(line.bundle(part_1=b"other")))
    assert "demo tiers release 7: 1 of 1 files" in send(tiers)
    assert contents(store)["tiers/demo/latest.sig"] == (tiers / "model.sig").read_bytes()


def test_a_full_disk_is_known_before_the_first_byte(
    line: Line, tmp_path: Path, public_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ResourceError, match="not enough disk to publish"):
        push(line.bundle(), str(tmp_path / "store"), public_key, now=NOW)


def test_a_file_is_no_store(line: Line, tmp_path: Path, public_key: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=re.escape("is a file, and a place to publish to is a folder")):
        push(line.bundle(), str(tmp_path / "file"), public_key, now=NOW)


def test_what_the_library_raises_is_one_of_ours(send: Any, store: Any, line: Line, monkeypatch: Any) -> None:
    if isinstance(store, Folder):
        return
    monkeypatch.setattr(store.filesystem, "ls", lambda *a, **k: 1 / 0)
    with pytest.raises(BundleError, match=r"bundles/demo/q4 failed \(ZeroDivisionError: .*AWS_ENDPOINT_URL"):
        send(line.bundle())
