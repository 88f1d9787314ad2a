"""What DVC sees of the export: it changes when the weights do, though it holds none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.calibrate.texts import encoder
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.complete import TOKENIZER_FILES
from pipeline.errors import CheckpointError
from pipeline.graph.speculative import MTP_FILE
from pipeline.runtime.chat import read_template
from pipeline.stages import download, export
from pipeline.workspace import Workspace
from tests import tiny
from tests.families import CASES, Case, add_mtp, make_checkpoint


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The tiny model's, in a folder of its own with `checkpoint/` as its source."""
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    return Workspace(tiny.MODEL)


def _build(workspace: Workspace) -> dict[str, bytes]:
    download.run(tiny.MODEL)
    export.run(tiny.MODEL)
    return {file.name: file.read_bytes() for file in workspace.export.iterdir()}


def test_other_weights_are_another_export(workspace: Workspace) -> None:
    """Else calibrate, quantize and validate would not run again, and old weights would be released as new ones."""
    first = _build(workspace)
    make_checkpoint(Path("checkpoint"), tiny.CASE, seed=1)
    second = _build(workspace)
    assert {name for name in first if first[name] != second[name]} == {"model.onnx"}
    graphs = [onnx.load_model_from_string(files["model.onnx"]) for files in (first, second)]
    assert graphs[0].graph == graphs[1].graph  # same shapes: only the digest tells them apart


def test_the_same_weights_are_the_same_export_to_the_byte(workspace: Workspace) -> None:
    first = _build(workspace)
    make_checkpoint(Path("checkpoint"), tiny.CASE)  # same bytes, written again
    assert _build(workspace) == first


def test_a_multi_token_head_is_a_graph_of_its_own_where_it_is_whole(workspace: Workspace) -> None:
    case = Case(CASES["mimo"].config | {"max_position_embeddings": tiny.CONTEXT}, "qwen2")
    make_checkpoint(Path("checkpoint"), case)
    add_mtp(Path("checkpoint"))
    assert MTP_FILE in _build(workspace)
    tensors = load_file("checkpoint/model.safetensors")
    del tensors["model.mtp_layers.0.final_layernorm.weight"]
    save_file(tensors, "checkpoint/model.safetensors")
    assert MTP_FILE not in _build(workspace)
    tensors["model.mtp_layers.0.final_layernorm.weight"] = np.ones(7, np.float32)
    save_file(tensors, "checkpoint/model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"final_layernorm\.weight' has shape \[7\], config.json asks for \[128\]"
    ):
        _build(workspace)


def test_files_of_an_earlier_source_do_not_stay(workspace: Workspace) -> None:
    stale = Path("checkpoint/generation_config.json")
    stale.write_text('{"eos_token_id": 7}')
    assert b'"eos_token_id": [\n      7,\n      2\n    ]' in _build(workspace)["genai_config.json"]
    stale.unlink()
    files = _build(workspace)
    assert "generation_config.json" not in files
    assert b"7" not in files["genai_config.json"].split(b'"eos_token_id"')[1].split(b"]")[0]


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, np.float32),
        ("model.embed_tokens.weight", -np.inf, np.float32),
        ("model.norm.weight", np.inf, np.float16),
    ],
)
def test_weights_that_are_not_finite_are_refused_at_download(
    name: str, value: float, dtype: type, workspace: Workspace
) -> None:
    """Else calibration would say, hours later, that activations overflow, and name no tensor."""
    path = Path("checkpoint/model.safetensors")
    tensors = {key: values.astype(dtype) for key, values in load_file(path).items()}
    damaged = {key: values.copy() for key, values in tensors.items()}
    damaged[name].reshape(-1)[-1] = value
    save_file(damaged, path)
    with pytest.raises(CheckpointError, match=rf"'{name}' in .*: 1 of [\d,]+ values are NaN or infinite, the first at"):
        download.run(tiny.MODEL)
    assert not workspace.lock.exists()
    path.unlink()
    save_file(tensors, path)
    _build(workspace)


def test_all_that_is_measured_reads_the_tokenizer_that_ships(workspace: Workspace) -> None:
    """The reference folder has the export's tokenizer files, and no other of the checkpoint's beside them."""
    checkpoint = Path("checkpoint")
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }  # fmt: skip
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfor %}")
    (checkpoint / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    files = _build(workspace)
    assert json.loads(files["tokenizer.json"]) == {**content, "normalizer": None, "padding": None}
    assert "must compose text to NFC" in files["tokenizer_notes.json"].decode()
    reference = workspace.reference(Store())
    assert {name for name in TOKENIZER_FILES if (reference / name).exists()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (reference / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    phone = genai.Tokenizer(str(workspace.export))
    text = "Tie\u0302\u0301ng"
    assert encoder(reference)(text) == phone.encode(text).tolist()
    assert read_template(reference)("a", "b") == "a\nb\n"


def test_a_tokenizer_that_cannot_ship_is_refused_by_download(workspace: Workspace) -> None:
    path = Path("checkpoint/tokenizer.json")
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not honour the normalizer Lowercase"):
        download.run(tiny.MODEL)
    assert not workspace.lock.exists()
