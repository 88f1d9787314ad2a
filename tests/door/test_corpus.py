"""A corpus of odd checkpoints: honoured, harmless, or refused at download or export, and never later: corpus.yaml."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import yaml
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.blobs import Store
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.graph.decoder import ROPE_FILE
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import download, export
from pipeline.workspace import GENAI_CONFIG, MODEL_FILE, Workspace
from tests import tiny
from tests.families import CASES, Case, transformers_model

CONTEXT = 64


class Row(BaseModel):
    """One oddity, as corpus.yaml describes it."""

    model_config = ConfigDict(extra="forbid")
    odd: str
    fate: Literal["honoured", "harmless", "refused"]
    said: list[str] = []
    family: str = "llama-tied"
    files: dict[str, dict[str, Any]] = {}
    removed: dict[str, list[str] | None] = {}
    text: dict[str, str] = {}
    tensors: dict[str, dict[str, Any] | None] = {}
    renamed: dict[str, str] = {}
    cut: str = ""
    remedy: dict[str, Any] = {}
    genai: dict[str, Any] = {}


ROWS = [Row(**row) for row in yaml.safe_load(Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8"))]


def make_odd(folder: Path, row: Row) -> None:
    """A small model of the row's family, and what is odd about it."""
    tiny.make_model(folder, CASES[row.family])
    for name, keys in row.files.items():
        write_json(folder / name, (read_json(folder / name) if (folder / name).exists() else {}) | keys)
    for name, gone in row.removed.items():
        if gone is None:
            (folder / name).unlink()
        else:
            kept = {key: value for key, value in read_json(folder / name).items() if key not in gone}
            write_json(folder / name, kept)
    for name, text in row.text.items():
        (folder / name).write_text(text)
    weights = folder / "model.safetensors"
    if row.tensors:
        tensors = load_file(weights)
        for name, change in row.tensors.items():
            if change is None:
                del tensors[name]
            elif "like" in change:
                tensors[name] = tensors[change["like"]] + np.float32(change["add"])
            else:
                tensors[name] = np.ones(change["shape"], change["dtype"])
        save_file(tensors, weights)
    if row.cut:
        (folder / row.cut).write_bytes((folder / row.cut).read_bytes()[:-1000])
    for old, new in row.renamed.items():
        (folder / old).rename(folder / new)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.copy_configs(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def taken(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workspace]:
    """Download and export a row, its entry changed; a refusal is raised."""
    monkeypatch.setenv("PIPELINE_STORE", str(project / "store"))
    monkeypatch.chdir(project)

    def take(row: Row, **entry: Any) -> Workspace:
        name = re.sub(r"\W+", "-", f"{row.odd}-{row.family}").lower()[:40].strip("-")
        folder = project / "checkpoints" / name
        if not folder.exists():
            make_odd(folder, row)
        values = tiny.model_entry(folder) | {"context": CONTEXT} | entry
        (project / "configs/models" / f"{name}.yaml").write_text(yaml.safe_dump(values))
        download.run(name)
        export.run(name)
        return Workspace(name)

    return take


def exported(workspace: Workspace) -> tuple[bytes, Any]:
    """The graph without the checkpoint's digest and with its tables of rotation, and genai_config.json."""
    graph = onnx.load(workspace.export / MODEL_FILE, load_external_data=False)
    del graph.metadata_props[:]
    tables = (workspace.export / ROPE_FILE).read_bytes()
    return graph.SerializeToString() + tables, read_json(workspace.export / GENAI_CONFIG)


def assert_logits(workspace: Workspace, row: Row) -> None:
    """The export gives transformers' logits of the checkpoint as it is."""
    import torch

    folder = workspace.weights(Store())
    values = read_json(folder / "config.json") | dict.fromkeys(("pad_token_id", "eos_token_id"))
    values |= {"rope_theta": rope["rope_theta"]} if (rope := values.pop("rope_parameters", None)) else {}
    values |= {"rope_scaling": values.get("rope_scaling") or None}  # transformers fails on an empty one
    values.pop("auto_map", None)
    ids = np.random.default_rng(0).integers(3, 320, 40).tolist()
    with torch.no_grad():
        theirs = transformers_model(folder, Case(values, CASES[row.family].transformers_type))(torch.tensor([ids]))
    ours, _ = OnnxDecoder(workspace.reference(Store()) / MODEL_FILE).run(ids, None)
    reference = theirs.logits[0].numpy()
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.odd)
def test_an_odd_checkpoint(row: Row, taken: Callable[..., Workspace]) -> None:
    if row.fate == "refused":
        with pytest.raises(PipelineError) as caught:
            taken(row)
        message = str(caught.value)
        assert all(part in message for part in row.said), message
        assert "\n" not in message and "/partial/" not in message
        if row.remedy:
            taken(row, **row.remedy)
        return
    workspace, plain = taken(row), exported(taken(Row(odd="plain", fate="harmless", family=row.family)))
    graph, settings = exported(workspace)
    if row.fate == "harmless":
        assert graph == plain[0] or row.tensors  # which move the others
        assert settings == plain[1]
    else:
        assert (graph, settings) != plain
        found = settings["search"] | settings["model"]
        assert {key: found.get(key) for key in row.genai} == row.genai
    if "config.json" in {*row.files, *row.removed} or row.tensors:
        assert_logits(workspace, row)


def test_the_corpus_is_large_and_names_each_row_once() -> None:
    assert len(ROWS) >= 60
    assert len({row.odd for row in ROWS}) == len(ROWS)
