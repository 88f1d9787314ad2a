"""Synthetic checkpoints: the real sizes to the byte without writing them, and narrow ones written and opened."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import synthetic
from benchmarks.published import MODELS
from benchmarks.synthetic import Values, header, main, shards, tensors, tokenizer_json, write_checkpoint
from pipeline.checkpoint.architecture import Architecture, check_tensors, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.sources import fetch_model
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import ModelConfig
from pipeline.config.sources import LocalSource
from pipeline.errors import CheckpointError, ConfigError, ResourceError
from pipeline.files import write_json
from pipeline.graph.genai import Generation, genai_config
from tests.real_configs import architecture_of

# Model: tensors, bytes of weights, shards.
PUBLISHED = {
    "mimo-8b": (451, 15_666_819_072, 4),
    "phi-4": (243, 29_319_014_400, 6),
    "phi-4-mini": (194, 2 * 3_836_021_760, 2),
    "phi-tiny-moe": (1957, 7_510_440_576, 2),
}
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
TEXTS = [
    "The quick brown fox doesn't jump; it can't.",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # naïve\n\n",
    "Tiếng Việt, 日本語 and 🙂",
    "   42\t7\n\n 8",
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the real models, `narrow-…` ones of the same families and vocabulary sizes, in 20 to 40 MB."""
    for name, model in list(MODELS.items()):
        few = replace(model.vocabulary, base=1000, size=1010)
        head = {"head_dim": 16} if "head_dim" in model.config else {}
        config = model.config | NARROW | head
        if config.get("rope_scaling"):
            config["rope_scaling"] = config["rope_scaling"] | {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
        monkeypatch.setitem(MODELS, f"narrow-{name}", replace(model, config=config, vocabulary=few))


def architecture(model: str, folder: Path) -> Architecture:
    (folder / "config.json").write_text(json.dumps(MODELS[model].config))
    return read_architecture(folder / "config.json")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- sizes and layout, nothing written -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_full_size_is_the_published_one(model: str) -> None:
    shapes = tensors(model)
    ends, names = [], []
    for file in shards(shapes).values():
        raw = header(shapes, file)
        assert len(raw) % 8 == 0 and int.from_bytes(raw[:8], "little") == len(raw) - 8
        entries = json.loads(raw[8:])
        assert entries.pop("__metadata__") == {"format": "pt"}
        assert {entry["dtype"] for entry in entries.values()} == {"BF16"}
        ends.append(max(entry["data_offsets"][1] for entry in entries.values()))
        names += entries
    assert (len(names), sum(ends), len(ends)) == PUBLISHED[model]
    assert set(names) == set(shapes) and max(ends) <= 5_000_000_000


@pytest.mark.parametrize("model", PUBLISHED)
def test_tensors_are_what_the_architecture_expects(model: str, tmp_path: Path) -> None:
    shapes = tensors(model)
    extra = {name: shapes.pop(name) for name in list(shapes) if name.startswith("model.mtp_layers.0.")}
    assert shapes == architecture(model, tmp_path).expected_tensors()
    assert len(extra) == (16 if model == "mimo-8b" else 0)
    assert sum(map(math.prod, extra.values())) == (210_790_400 if model == "mimo-8b" else 0)


@pytest.mark.parametrize("model", ["mimo-8b", "phi-4"])
def test_the_configuration_describes_the_same_architecture_as_the_tests_own(model: str, tmp_path: Path) -> None:
    assert architecture(model, tmp_path) == architecture_of(model, tmp_path)


@pytest.mark.parametrize("model", PUBLISHED)
def test_shards_split_as_huggingface_hub_does(model: str) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    shapes = tensors(model)
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: 2 * math.prod(shape),
        get_storage_id=lambda _: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="5GB",
    )
    assert shards(shapes) == {file: sorted(names) for file, names in split.filename_to_tensors.items()}


def test_cutting_keeps_the_first_layers() -> None:
    cut, full = tensors("mimo-8b", 2), tensors("mimo-8b")
    assert full.items() >= cut.items()
    assert set(full) - set(cut) == {name for name in full if name.startswith("model.layers.")} - set(cut)
    assert "model.layers.1.mlp.up_proj.weight" in cut and "model.layers.2.mlp.up_proj.weight" not in cut


@pytest.mark.parametrize("layers", [0, -1, 41])
def test_an_impossible_cut_is_refused(layers: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="40 layers"):
        write_checkpoint(tmp_path / "out", "phi-4", layers=layers)
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'phi-4'"):
        tensors("phi4")


# --- values ----------------------------------------------------------------------------------------------------------


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_values_do_not_depend_on_how_they_are_cut() -> None:
    values = Values("model.layers.0.mlp.up_proj.weight", (37, 51), seed=3)
    whole = values.make(0, 37)
    parts = [Values("model.layers.0.mlp.up_proj.weight", (37, 51), 3).make(i, i + 1) for i in range(37)]
    assert np.array_equal(np.concatenate(parts), whole)
    for other in (
        Values("model.layers.0.mlp.up_proj.weight", (37, 51), 4),
        Values("model.layers.1.mlp.up_proj.weight", (37, 51), 3),
    ):
        assert np.mean(other.make(0, 37) == whole) < 0.01


def test_values_are_pinned() -> None:
    """Files made last year are the files made today. If this must change, raise `_VERSION`."""
    bits = Values("model.layers.0.mlp.down_proj.weight", (512, 130), 0).make(0, 512)
    assert (
        hashlib.sha256(bits.astype("<u2").tobytes()).hexdigest()
        == "f38c77547da7632066cf6ba804adfd29a28dd0e7a98f3e626c2c96b29e5ced3d"
    )


def test_values_are_rounded_to_nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's conversion, over a table that is on or beside every kind of tie."""
    import torch

    table = (np.arange(65536, dtype=np.uint32) * np.uint32(0x2001) + np.uint32(0x3F000000)).view(np.float32)
    ones = np.ones(65536, np.float32)
    monkeypatch.setattr(synthetic, "_tables", lambda: (table, ones, ones))
    monkeypatch.setattr(synthetic, "SIGMA", 1.0)
    bits = Values("x.weight", (64, 4096), 0).make(0, 64)
    drawn = np.empty(4096, np.float32)
    values = Values("x.weight", (64, 4096), 0)
    for row in range(64):
        synthetic._draw(np.uint64(synthetic._hash(values._key + np.uint64(row))), table, drawn)
        expected = torch.from_numpy(drawn.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        assert np.array_equal(bits[row], expected)


def test_matrices_look_like_trained_weights() -> None:
    weights = floats(Values("model.layers.0.self_attn.q_proj.weight", (1024, 2048), 0).make(0, 1024)).astype(np.float64)
    assert np.isfinite(weights).all() and abs(weights.mean()) < 1e-4
    assert weights.std() == pytest.approx(0.02, rel=0.03)
    assert 3.5 < np.mean(weights**4) / np.mean(weights**2) ** 2 < 30
    columns, rows = weights.std(axis=0), weights.std(axis=1)
    assert 0.2 < np.log(columns).std() < 0.4 and 0.1 < np.log(rows).std() < 0.25


def test_neighbours_are_not_correlated() -> None:
    weights = floats(Values("model.layers.0.mlp.up_proj.weight", (1024, 1024), 0).make(0, 1024)).astype(np.float64)
    for shift in (1, 2, 3, 4, 512):
        for axis in (0, 1):
            correlation = np.mean(weights * np.roll(weights, shift, axis)) / np.mean(weights**2)
            assert abs(correlation) < 0.01


def test_norms_are_near_one_and_biases_small() -> None:
    norm = floats(Values("model.norm.weight", (4096,), 0).make(0, 1))
    assert norm.mean() == pytest.approx(1, abs=0.01) and norm.std() == pytest.approx(0.1, rel=0.1) and norm.min() > 0
    bias = floats(Values("model.layers.0.self_attn.q_proj.bias", (4096,), 0).make(0, 1))
    assert abs(bias.mean()) < 0.002 and bias.std() == pytest.approx(0.02, rel=0.1)


# --- written checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_written_checkpoint_opens_and_is_byte_for_byte_what_the_library_writes(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save

    monkeypatch.setattr(synthetic, "SHARD_BYTES", 5_000_000 if model == "phi-tiny-moe" else 20_000_000)
    assert write_checkpoint(tmp_path / "out", f"narrow-{model}", seed=5, layers=2)
    out = tmp_path / "out"
    checkpoint, found = Checkpoint(out), read_architecture(out / "config.json")
    shapes = tensors(f"narrow-{model}", 2)
    assert found.layers == 2
    notes = check_tensors(found, checkpoint)
    assert len(notes) == (model == "mimo-8b") and all("left out 16 tensors" in note for note in notes)
    assert {name: ref.shape for name, ref in checkpoint.items()} == shapes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: ref.file for name, ref in checkpoint.items()}
    assert index["metadata"]["total_size"] == checkpoint.weight_bytes
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 2
    for number, file in enumerate(files, 1):
        assert file == f"model-{number:05}-of-{len(files):05}.safetensors"
        held = {}
        for name, ref in checkpoint.items():
            if ref.file == file:
                values = Values(name, ref.shape, 5)
                held[name] = torch.from_numpy(values.make(0, values.rows)).view(torch.bfloat16).reshape(ref.shape)
        assert save(held, metadata={"format": "pt"}) == (out / file).read_bytes()


def test_files_are_the_same_for_any_threads_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a", "narrow-phi-4", layers=1)
    monkeypatch.setattr(synthetic, "cores", lambda: 5)
    monkeypatch.setattr(synthetic, "_CHUNK", 12345)
    monkeypatch.setattr(synthetic, "_SYNC", 1 << 20)
    write_checkpoint(tmp_path / "b", "narrow-phi-4", layers=1)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_complete_folder_is_kept_and_another_seed_replaces_it(tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path, "narrow-phi-4", layers=1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert not write_checkpoint(tmp_path, "narrow-phi-4", layers=1)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    first = digests(tmp_path)
    assert write_checkpoint(tmp_path, "narrow-phi-4", seed=1, layers=1)
    second = digests(tmp_path)
    assert {name for name in first if first[name] != second[name]} == {
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_a_damaged_folder_is_written_again(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "narrow-phi-4", layers=1)
    before = digests(tmp_path)
    if name.endswith(".safetensors"):
        os.truncate(tmp_path / name, 1000)
    else:
        (tmp_path / name).unlink()
    assert write_checkpoint(tmp_path, "narrow-phi-4", layers=1)
    assert digests(tmp_path) == before


def test_an_interrupted_run_leaves_no_index_and_the_next_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 15_000_000)
    write_checkpoint(tmp_path / "whole", "narrow-phi-4")
    original, calls = synthetic._write_chunk, []

    def fail(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(synthetic, "_write_chunk", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "cut", "narrow-phi-4")
    assert "model.safetensors.index.json" not in digests(tmp_path / "cut")
    # What SIGKILL leaves besides: temporary files, and shards under a name that the next run does not use.
    for name in (".model-00002-of-00002.safetensors.abc", "model-00001-of-00009.safetensors", ".config.json.xyz"):
        (tmp_path / "cut" / name).write_bytes(b"left over")
    monkeypatch.setattr(synthetic, "_write_chunk", original)
    write_checkpoint(tmp_path / "cut", "narrow-phi-4")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"precious")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="was not written by this command"):
        write_checkpoint(tmp_path, "narrow-phi-4", layers=1)
    assert digests(tmp_path) == before


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=15_666_819_072))
    with pytest.raises(ResourceError, match=r"mimo-8b.*15,700,373,504 bytes needed"):
        write_checkpoint(tmp_path / "out", "mimo-8b")
    assert not (tmp_path / "out").exists()


def test_the_download_stage_takes_it_as_a_local_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "narrow-mimo-8b", layers=1)
    source = LocalSource(kind="local", path=str(tmp_path / "model"))
    entry = ModelConfig(title="t", source=source, context=64, mmlu_mode="letter", gate_class="g")
    lock = fetch_model("narrow", entry, Store(tmp_path / "store"))
    assert lock.licence == "see LICENSE"
    assert {file.name for file in lock.files} == {path.name for path in (tmp_path / "model").iterdir()}


def test_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["phi-4", str(tmp_path / "out"), "--layers", "99"])
    assert done.exit_code == 1 and "40 layers" in done.output
    assert CliRunner().invoke(main, ["phi-5", str(tmp_path / "out")]).exit_code == 2


# --- the tokenizer ---------------------------------------------------------------------------------------------------

IDS = {
    "mimo-8b": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|file_sep|>": 151664},
    "phi-4": {
        "<|dummy_0|>": 100256, "<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265,
        "<|im_sep|>": 100266, "<|dummy_85|>": 100349, "<|dummy_87|>": 100351,
    },
    "phi-4-mini": {"<|endoftext|>": 199999, "<|assistant|>": 200019, "<|end|>": 200020, "<|user|>": 200021},
    "phi-tiny-moe": {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|end|>": 32007, "<|user|>": 32010},
}  # fmt: skip
SIZES = {
    "mimo-8b": (151643, 151665),
    "phi-4": (100256, 100352),
    "phi-4-mini": (199998, 200029),
    "phi-tiny-moe": (32000, 32011),
}
PROMPTS = {
    "mimo-8b": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "phi-4": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
    "phi-4-mini": "<|user|>Hi<|end|><|assistant|>",
    "phi-tiny-moe": "<|user|>\nHi<|end|>\n<|assistant|>\n",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with each model's configuration and tokenizer; no weights."""
    made = {}
    for name in PUBLISHED:
        made[name] = tmp_path_factory.mktemp(name)
        synthetic._write_small_files(made[name], MODELS[name].config, MODELS[name])
    return made


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_tokenizer_has_the_real_layout(model: str, folders: dict[str, Path]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folders[model] / "tokenizer.json"))
    assert (tokenizer.get_vocab_size(False), tokenizer.get_vocab_size()) == SIZES[model]
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZES[model][1]))
    assert {token: tokenizer.token_to_id(token) for token in IDS[model]} == IDS[model]
    for token, number in IDS[model].items():
        assert tokenizer.encode(token).ids == [number]
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 1.5  # merges are used


def test_every_token_is_the_encoding_of_its_text(folders: dict[str, Path]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folders["phi-4-mini"] / "tokenizer.json"))
    numbers = range(256, SIZES["phi-4-mini"][0], 7)  # the other models' tokens are the first of these
    texts = [tokenizer.id_to_token(number).replace("Ġ", " ") for number in numbers]
    assert [found.ids for found in tokenizer.encode_batch_fast(texts)] == [[number] for number in numbers]


def test_every_merge_makes_a_token_from_earlier_ones() -> None:
    content = tokenizer_json(MODELS["phi-4-mini"].vocabulary)["model"]
    vocab, merges = content["vocab"], [merge.split(" ") for merge in content["merges"]]
    assert len(merges) == len(vocab) - 256
    for number, (left, right) in enumerate(merges, 256):
        assert vocab[left + right] == number > max(vocab[left], vocab[right])
    for model in ("mimo-8b", "phi-4"):
        shorter = tokenizer_json(MODELS[model].vocabulary)["model"]
        assert shorter["merges"] == content["merges"][: len(shorter["merges"])]


@pytest.mark.parametrize("model", PUBLISHED)
def test_text_goes_through_transformers_and_onnxruntime_genai(model: str, folders: dict[str, Path]) -> None:
    import onnxruntime_genai as genai
    from transformers import PreTrainedTokenizerFast

    folder = folders[model]
    architecture = read_architecture(folder / "config.json")
    settings = genai_config(architecture, Generation((2,), 1, 2, {"do_sample": False}, ()), "model.onnx", 64)
    write_json(folder / "genai_config.json", settings)
    phone, fast = genai.Tokenizer(str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        ids = fast(text)["input_ids"]
        assert fast.decode(ids) == text
        assert phone.encode(text).tolist() == ids and phone.decode(np.array(ids, np.int32)) == text
    chat = [{"role": "user", "content": "Hi"}]
    assert fast.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == PROMPTS[model]
    assert phone.apply_chat_template(json.dumps(chat), add_generation_prompt=True) == PROMPTS[model]
    assert phone.encode(PROMPTS[model]).tolist() == fast(PROMPTS[model])["input_ids"]
