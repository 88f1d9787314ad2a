"""The real huggingface_hub against a hub on loopback: what arrives, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.checkpoint import hub as hub_module
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import SourceLock
from pipeline.checkpoint.sources import fetch_dataset, fetch_model
from pipeline.config.models import ModelConfig
from pipeline.config.sources import HubFile
from pipeline.errors import ResourceError, SourceError
from pipeline.files import read_json, write_json
from tests.checkpoint.hub_server import REPO, REVISION, Hub, serve, sha256

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MIB = 1 << 20


def shard(name: str, count: int) -> bytes:
    return save({name: np.arange(count, dtype=np.float32)})


def files() -> dict[str, bytes]:
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "generation_config.json": b"{}",
        "LICENSE": b"Some licence",
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARDS[0]: shard("a", 100),
        SHARDS[1]: shard("b", 200),
        "README.md": b"not needed",
        "consolidated.safetensors": shard("c", 10),
        "original/model.pth": b"a pickle that is not needed",
        "training_args.bin": b"another",
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(hub_module, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(Hub(files())) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def config(**changes: str) -> ModelConfig:
    source = {"kind": "hub", "repo": REPO, "revision": REVISION} | changes
    return ModelConfig.model_validate(
        {"title": "Tiny", "source": source, "context": 128, "mmlu_mode": "letter", "gate_class": "x"}
    )


def fetch(store: Store, **changes: str) -> SourceLock:
    return fetch_model("tiny", config(**changes), store)


def blobs(store: Store) -> set[str]:
    return {path.name for path in (store.root / "sha256").rglob("*") if path.is_file()}


def assert_nothing_recorded(store: Store) -> None:
    assert not list(store.root.glob("sources/*.json"))


def test_only_the_needed_files_arrive_and_the_lock_describes_them(hub: Hub, store: Store) -> None:
    lock = fetch(store)
    needed = {"config.json", "tokenizer.json", "generation_config.json", "LICENSE", "model.safetensors.index.json"}
    assert {file.name for file in lock.files} == needed | set(SHARDS)
    for file in lock.files:
        assert store.path(file.sha256).read_bytes() == hub.files[file.name]
        assert (file.size, file.sha256) == (len(hub.files[file.name]), sha256(hub.files[file.name]))
    assert (lock.revision, lock.licence, lock.model) == (REVISION, "apache-2.0", "tiny")
    assert {request.path.split("/")[-1] for request in hub.requests if request.method == "GET"} == {
        REVISION,
        *needed,
        *SHARDS,
    }
    assert not list((store.root / "partial").rglob("*.safetensors"))


def test_in_a_fresh_process(hub: Hub, store: Store) -> None:
    """As the command line runs it: nothing has imported huggingface_hub's lazy submodules before."""
    code = (
        "import sys; from pathlib import Path; from pipeline.config.models import ModelConfig\n"
        "from pipeline.checkpoint.sources import fetch_model; from pipeline.checkpoint.blobs import Store\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "fetch_model('tiny', ModelConfig.model_validate_json(sys.argv[1]), Store(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, config().model_dump_json(), str(store.root)]
    subprocess.run(command, check=True)
    hub.requests.clear()
    assert len(fetch(store).files) == 7
    assert hub.requests == []


def test_a_second_fetch_needs_no_network(hub: Hub, store: Store) -> None:
    first = fetch(store)
    hub.requests.clear()
    assert fetch(store) == first
    assert hub.requests == []


def spoil(blob: Path) -> None:
    blob.chmod(0o644)
    with open(blob, "r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"~~~~")


@pytest.mark.parametrize("harm", [Path.unlink, spoil])
def test_a_lost_or_damaged_blob_alone_is_fetched_again(
    hub: Hub, store: Store, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    first = fetch(store)
    digest = first.file(SHARDS[1]).sha256
    harm(store.path(digest))
    hub.requests.clear()
    assert fetch(store) == first
    assert store.path(digest).read_bytes() == hub.files[SHARDS[1]]
    assert len(hub.transfers(SHARDS[1])) == 1
    assert hub.transfers(SHARDS[0]) == []
    assert f"{SHARDS[1]} is damaged in the store, or not there: it is fetched anew" in caplog.text


def test_blobs_of_an_earlier_version_get_their_lists_without_a_transfer(hub: Hub, store: Store) -> None:
    first = fetch(store)
    (record,) = (store.root / "sources").iterdir()
    old = read_json(record)
    for file in old["files"]:
        del file["chunks"]
    write_json(record, old)
    hub.requests.clear()
    assert fetch(store) == first
    assert hub.transfers(SHARDS[0]) == hub.transfers(SHARDS[1]) == []


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "mit"}, "mit"),
        ({"license": "other", "license_name": "llama3", "license_link": "LICENSE"}, "other (llama3 LICENSE)"),
        ({}, "see LICENSE"),
    ],
)
def test_licence(hub: Hub, store: Store, card: dict[str, str], licence: str) -> None:
    hub.card = card
    assert fetch(store).licence == licence


def big(hub: Hub) -> None:
    """Make the second shard larger than huggingface_hub's 10 MB unit of transfer."""
    hub.files[SHARDS[1]] = shard("b", 4 * MIB)  # 16 MiB
    hub.drop_at[SHARDS[1]] = 12 * MIB


def test_an_interrupted_transfer_resumes_within_one_run(hub: Hub, store: Store) -> None:
    big(hub)
    hub.drops = 1
    lock = fetch(store)
    first, second = hub.transfers(SHARDS[1])
    assert first.start == 0 and 0 < second.start <= 12 * MIB
    assert second.sent == len(hub.files[SHARDS[1]]) - second.start
    assert store.path(lock.file(SHARDS[1]).sha256).read_bytes() == hub.files[SHARDS[1]]


def test_an_interrupted_transfer_resumes_in_the_next_run(hub: Hub, store: Store) -> None:
    big(hub)
    hub.drops = 1000
    with pytest.raises(SourceError, match=r"connection broke.*resumes where it stopped"):
        fetch(store)
    assert_nothing_recorded(store)
    assert sha256(hub.files[SHARDS[1]]) not in blobs(store)
    hub.drops = 0
    hub.requests.clear()
    lock = fetch(store)
    (transfer,) = hub.transfers(SHARDS[1])
    assert transfer.start > 0
    assert hub.transfers(SHARDS[0]) == []
    assert store.path(lock.file(SHARDS[1]).sha256).read_bytes() == hub.files[SHARDS[1]]


@pytest.mark.parametrize("name", ["config.json", SHARDS[0]])
def test_wrong_bytes_of_the_right_size(hub: Hub, store: Store, name: str) -> None:
    good = hub.files[name]
    hub.served[name] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(SourceError, match=f"{name}: wrong bytes. Expected"):
        fetch(store)
    assert_nothing_recorded(store)
    assert sha256(hub.served[name]) not in blobs(store)
    hub.served.clear()
    assert fetch(store).file(name).sha256 == sha256(good)


@pytest.mark.parametrize("extra", [b"", b"tail"])
def test_another_length_than_declared(hub: Hub, store: Store, extra: bytes) -> None:
    hub.served[SHARDS[0]] = hub.files[SHARDS[0]] + extra if extra else hub.files[SHARDS[0]][:-7]
    with pytest.raises(SourceError, match=rf"{SHARDS[0]} is truncated or changed: {len(hub.served[SHARDS[0]])} bytes"):
        fetch(store)
    assert_nothing_recorded(store)
    hub.served.clear()
    fetch(store)  # nothing stale is in the way


@pytest.mark.parametrize("consistent", [True, False])
def test_lfs_pointer_served_in_place_of_weights(hub: Hub, store: Store, consistent: bool) -> None:
    hub.served[SHARDS[0]] = POINTER
    if consistent:  # a mirror that reports the pointer's own size
        hub.linked_size[SHARDS[0]] = len(POINTER)
    with pytest.raises(SourceError, match=f"{SHARDS[0]} is a git-LFS pointer"):
        fetch(store)
    assert_nothing_recorded(store)
    hub.served.clear()
    hub.linked_size.clear()
    fetch(store)


def test_lfs_pointer_committed_as_a_file(hub: Hub, store: Store) -> None:
    hub.files["tokenizer.json"] = POINTER
    with pytest.raises(SourceError, match=r"tokenizer.json is a git-LFS pointer"):
        fetch(store)
    assert_nothing_recorded(store)


def test_weights_truncated_before_they_were_uploaded(hub: Hub, store: Store) -> None:
    hub.files[SHARDS[0]] = hub.files[SHARDS[0]][:-8]
    with pytest.raises(
        SourceError, match=rf"{SHARDS[0]} is not whole: .* needs 400 bytes, the header gives bytes 0 to 400 of 392"
    ):
        fetch(store)
    assert sha256(hub.files[SHARDS[0]]) not in blobs(store)


def test_missing_shard_is_found_before_any_weights_move(hub: Hub, store: Store) -> None:
    del hub.files[SHARDS[1]]
    with pytest.raises(SourceError, match=rf"1 of 2 shards .* missing: {SHARDS[1]}"):
        fetch(store)
    assert hub.transfers(SHARDS[0]) == []
    assert_nothing_recorded(store)


def test_pickles_are_refused_before_anything_moves(hub: Hub, store: Store) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"cos\nsystem\n"}
    with pytest.raises(SourceError, match=r"Python pickles \(pytorch_model.bin\)"):
        fetch(store)
    assert [request.method for request in hub.requests] == ["GET"]


GATED = (403, "GatedRepo")


@pytest.mark.parametrize("fault", [(401, "GatedRepo"), GATED, (401, None), (403, None)])
@pytest.mark.parametrize("where", ["api_fault", "file_fault"])
def test_gated_without_token(hub: Hub, store: Store, where: str, fault: tuple[int, str | None]) -> None:
    setattr(hub, where, fault)
    with pytest.raises(SourceError, match=rf"HTTP {fault[0]}.*accept its licence at {hub.url}/{REPO},.*HF_TOKEN"):
        fetch(store)
    assert_nothing_recorded(store)
    assert blobs(store) == set()


def test_gated_names_the_configured_licence_page(hub: Hub, store: Store) -> None:
    hub.api_fault = GATED
    page = "https://example.org/licence"
    with pytest.raises(SourceError, match=page):
        fetch_model("tiny", config().model_copy(update={"licence_page": page}), store)


def test_token_opens_a_gated_model_and_is_never_shown_or_stored(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SourceError, match="token in use has no access") as refused:
        fetch(store)
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch(store)
    everything = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert b"hf_right" not in everything and b"hf_wrong" not in everything


def test_unknown_revision_and_repository(hub: Hub, store: Store) -> None:
    with pytest.raises(SourceError, match=rf"no such revision.*{hub.url}/{REPO}"):
        fetch(store, revision="f" * 40)
    with pytest.raises(SourceError, match="no such repository"):
        fetch(store, repo="acme/other")
    assert hub.transfers("config.json") == []


def test_a_file_that_is_listed_but_not_served(hub: Hub, store: Store) -> None:
    hub.file_fault = (404, "EntryNotFound")
    with pytest.raises(SourceError, match="lists this file but does not serve it"):
        fetch(store)


def test_rate_limit_and_server_faults_keep_the_status(hub: Hub, store: Store) -> None:
    for status in (429, 500):
        hub.api_fault = (status, None)
        with pytest.raises(SourceError, match=f"answered HTTP {status}"):
            fetch(store)


def test_offline(store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(SourceError, match="cannot be reached") as refused:
            fetch(store)
    assert "secret" not in str(refused.value)
    assert_nothing_recorded(store)


ODD = json.dumps(
    {"id": REPO, "sha": REVISION, "siblings": [{"rfilename": "a", "size": 1, "lfs": {"sha256": 5, "size": 1}}]}
).encode()


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[]", b"{}", b"null", ODD])
def test_something_that_is_not_a_hub(hub: Hub, store: Store, body: bytes) -> None:
    hub.api_body = body
    with pytest.raises(SourceError, match="does not answer like a Hub"):
        fetch(store)


def test_a_hub_that_declares_no_hash(hub: Hub, store: Store) -> None:
    description = hub.description()
    del description["siblings"][0]["blobId"]
    hub.api_body = json.dumps(description).encode()
    with pytest.raises(SourceError, match=r"no usable size or hash for config.json"):
        fetch(store)


@pytest.mark.parametrize("digest", ["../../sources/x", "", "F" * 64])
def test_a_hub_that_declares_a_path_as_hash(hub: Hub, store: Store, digest: str) -> None:
    description = hub.description()
    for sibling in description["siblings"]:
        if sibling["rfilename"] == SHARDS[1]:
            sibling["lfs"]["sha256"] = digest
            sibling["blobId"] = None
    hub.api_body = json.dumps(description).encode()
    with pytest.raises(SourceError, match=rf"no usable size or hash for {SHARDS[1]}"):
        fetch(store)


def test_a_hub_that_answers_with_another_revision(hub: Hub, store: Store) -> None:
    hub.api_body = json.dumps(hub.description() | {"sha": "e" * 40}).encode()
    with pytest.raises(SourceError, match="answered with revision eeee"):
        fetch(store)


def test_too_little_disk_is_known_before_weights_move(hub: Hub, store: Store) -> None:
    description = hub.description()
    for sibling in description["siblings"]:
        if sibling["rfilename"] == SHARDS[1]:
            sibling["size"] = 1 << 60
    hub.api_body = json.dumps(description).encode()
    with pytest.raises(
        ResourceError, match=r"not enough disk to download hub acme/tiny.*point PIPELINE_STORE at a larger disk"
    ):
        fetch(store)
    assert hub.transfers(SHARDS[0]) == []


def test_names_that_leave_the_folder_are_never_requested(hub: Hub, store: Store) -> None:
    index = {"weight_map": {"a": "../../outside.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files["../../outside.safetensors"] = shard("a", 1)
    with pytest.raises(SourceError, match="leaves its folder"):
        fetch(store)
    assert not any("outside" in request.path for request in hub.requests)


# --- dataset files


MEMBER = "all/dev-00000-of-00001.parquet"


@pytest.fixture
def dataset_hub(hub: Hub) -> Hub:
    hub.dataset = True
    hub.files = {
        MEMBER: b"PAR1 the development split",
        "all/test-00000-of-00001.parquet": b"PAR1",
        "README.md": b"card",
    }
    return hub


def member(name: str = MEMBER, repo: str = REPO, revision: str = REVISION) -> HubFile:
    return HubFile(kind="hub", repo=repo, revision=revision, member=name)


def test_one_file_of_a_dataset_arrives_and_is_then_kept(dataset_hub: Hub, store: Store) -> None:
    path = fetch_dataset(member(), store)
    assert path.read_bytes() == dataset_hub.files[MEMBER]
    assert {request.path for request in dataset_hub.requests} == {
        f"/api/datasets/{REPO}/revision/{REVISION}",
        f"/datasets/{REPO}/resolve/{REVISION}/{MEMBER}",
        f"/cdn/{MEMBER}",
    }
    dataset_hub.requests.clear()
    assert fetch_dataset(member(), store) == path
    assert dataset_hub.requests == []


def test_a_dataset_without_the_file_names_the_nearest(dataset_hub: Hub, store: Store) -> None:
    with pytest.raises(SourceError, match=r"no file 'dev.parquet'\. Nearest: all/dev-00000-of-00001\.parquet"):
        fetch_dataset(member("dev.parquet"), store)
    assert_nothing_recorded(store)


def test_wrong_bytes_of_a_dataset_are_refused(dataset_hub: Hub, store: Store) -> None:
    dataset_hub.served[MEMBER] = b"PAR1 another split by far.."[: len(dataset_hub.files[MEMBER])]
    with pytest.raises(SourceError, match="wrong bytes"):
        fetch_dataset(member(), store)
    assert_nothing_recorded(store)
    assert not blobs(store)


def test_a_dataset_s_errors_speak_of_its_own_page(dataset_hub: Hub, store: Store) -> None:
    with pytest.raises(SourceError, match=rf"no such revision. Take a commit id from .*/datasets/{REPO}"):
        fetch_dataset(member(revision="f" * 40), store)
    dataset_hub.file_fault = (401, "GatedRepo")
    with pytest.raises(SourceError, match=rf"The dataset is gated or private: .*/datasets/{REPO}"):
        fetch_dataset(member(), store)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ""])
def test_a_dataset_file_outside_its_repository_is_never_asked_for(dataset_hub: Hub, store: Store, name: str) -> None:
    with pytest.raises(SourceError, match="leaves its folder"):
        fetch_dataset(member(name), store)
    assert dataset_hub.requests == []
