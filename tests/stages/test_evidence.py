"""What is read of the store is what was downloaded: damage stops every stage that reads it, and the remedy works."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import SINGLE, Checkpoint
from pipeline.errors import CheckpointError, PipelineError, SourceError
from pipeline.files import read_json, write_json
from pipeline.preflight import guard
from pipeline.stages import calibrate, download, export, parity, quantize, sensitivity, validate
from pipeline.workspace import REFERENCE, Workspace
from tests import tiny
from tests.conftest import ROOT

WORKSPACE = Workspace(tiny.MODEL)
DAMAGED = 64 << 10  # bytes
STAGES: dict[str, Callable[[], object]] = {
    "calibrate": lambda: calibrate.run(tiny.MODEL),
    "sensitivity": lambda: sensitivity.run(tiny.MODEL),
    "quantize": lambda: quantize.run(tiny.MODEL, "q4"),
    "parity": lambda: parity.run(tiny.MODEL),
    "reference": lambda: validate.run(tiny.MODEL, REFERENCE),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The tiny model, exported and calibrated, in the current directory; its store."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        store = tiny.make_store(folder / "store")
        patch.setenv("PIPELINE_STORE", str(store.root))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(tiny.copy_configs(folder))
        for stage in (download, export, calibrate):
            stage.run(tiny.MODEL)
        yield store


@pytest.fixture(autouse=True)
def _there(prepared: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared.root.parent)


def zero(store: Store, tensor: str) -> str:
    """Zero 64 KiB of a tensor inside the blob of the weights, whose SHA-256 is returned."""
    digest = WORKSPACE.read_lock().file(SINGLE).sha256
    blob, ref = store.path(digest), Checkpoint(WORKSPACE.weights(store))[tensor]
    assert ref.length >= DAMAGED
    blob.chmod(0o644)
    with open(blob, "r+b") as file:
        file.seek(ref.offset + (ref.length - DAMAGED) // 2)
        file.write(bytes(DAMAGED))
    blob.chmod(0o444)
    return digest


@pytest.mark.parametrize("name", STAGES)
def test_damage_stops_a_stage_and_the_remedy_lets_it_go_on(prepared: Store, name: str) -> None:
    tensor = "model.layers.1.mlp.down_proj.weight"
    digest = zero(prepared, tensor)
    with pytest.raises(CheckpointError) as error:
        STAGES[name]()
    parts = (f"'{tensor}'", digest, str(WORKSPACE.root / "reference" / SINGLE), "`python -m pipeline download MODEL`")
    assert all(part in str(error.value) for part in parts)
    assert re.match(r"tensor '.*: bytes [\d,]+ to [\d,]+ of ", str(error.value))
    download.run(tiny.MODEL)
    STAGES[name]()


def test_a_damaged_tokenizer_stops_an_export(prepared: Store) -> None:
    blob = prepared.path(WORKSPACE.read_lock().file("tokenizer.json").sha256)
    blob.chmod(0o644)
    with open(blob, "r+b") as file:
        file.seek(os.path.getsize(blob) // 2)
        file.write(b"~~~~")
    with pytest.raises(SourceError, match=r"tokenizer.json: blob [0-9a-f]{64} .* is damaged"):
        export.run(tiny.MODEL)
    download.run(tiny.MODEL)
    export.run(tiny.MODEL)


def test_a_lock_of_an_earlier_version_is_refused_until_the_next_download(prepared: Store) -> None:
    lock = read_json(WORKSPACE.lock)
    for file in lock["files"]:
        del file["chunks"]
    write_json(WORKSPACE.lock, lock)
    for record in (prepared.root / "sources").iterdir():
        if json.loads(record.read_text())["files"][0].keys() >= {"chunks"}:
            content = read_json(record)
            for file in content["files"]:
                del file["chunks"]
            write_json(record, content)
    with pytest.raises(SourceError, match=r"digests of its chunks.*`python -m pipeline download MODEL`"):
        quantize.run(tiny.MODEL, "q4")
    download.run(tiny.MODEL)
    quantize.run(tiny.MODEL, "q4")


def test_an_export_for_another_context_is_refused_until_it_is_made_again(prepared: Store) -> None:
    quantize.run(tiny.MODEL, "q4")
    tiny.edit(Path(f"configs/models/{tiny.MODEL}.yaml"), context=tiny.CONTEXT // 2)
    for stage, variant in (("calibrate", ""), ("quantize", "q4"), ("validate", "reference"), ("validate", "q4")):
        with pytest.raises(PipelineError, match=r"context of 8,192 tokens.* is 4,096. Run `python -m pipeline export"):
            guard.before(stage, tiny.MODEL, variant)
    export.run(tiny.MODEL)
    with pytest.raises(PipelineError, match=r"export tiny` and `python -m pipeline quantize tiny q4` again"):
        guard.before("validate", tiny.MODEL, "q4")
    for name in ("calibrate", "quantize", "reference"):
        STAGES[name]()
    guard.before("validate", tiny.MODEL, "q4")
    validate.run(tiny.MODEL, "q4")
