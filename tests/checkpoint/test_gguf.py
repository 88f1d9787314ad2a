"""Unpacking GGUF: a tiny Llama written here, judged by transformers, onnxruntime-genai and the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from safetensors.numpy import load_file

from pipeline.checkpoint.gguf import unpack, unpermute
from pipeline.errors import CheckpointError

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
HEAD = HIDDEN // HEADS
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ċ Ġ", "ĊĠ Ġ", "Ġ Ġ", "ĠĠ Ġ", "Ġ 1"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXT = "the year 2012\n   12 was\n\t  the\n 3rd: don't héllo ½ ² <|im_end|>  x"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


VOCABULARY = [*CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


# --- the formats, from their definition


def q4_1(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, values): blocks of 32 hold fp16 d, fp16 m, then 16 bytes, low nibbles first; value = d·q + m."""
    shape = (rows, columns // 32)
    d = rng.uniform(0.01, 0.1, shape).astype("<f2")
    m = rng.uniform(-0.8, 0, shape).astype("<f2")
    q = rng.integers(0, 16, (*shape, 32), dtype=np.uint8)
    packed = np.concatenate(
        [d[..., None].view(np.uint8), m[..., None].view(np.uint8), q[..., :16] | q[..., 16:] << 4], -1
    )
    values = q.astype(np.float32) * d.astype(np.float32)[..., None] + m.astype(np.float32)[..., None]
    return packed.reshape(rows, -1), values.reshape(rows, columns)


def q8_0(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, values): blocks of 32 hold fp16 d, then 32 signed bytes; value = d·q."""
    shape = (rows, columns // 32)
    d = rng.uniform(0.0005, 0.002, shape).astype("<f2")
    q = rng.integers(-127, 128, (*shape, 32), dtype=np.int8)
    packed = np.concatenate([d[..., None].view(np.uint8), q.view(np.uint8)], -1)
    values = q.astype(np.float32) * d.astype(np.float32)[..., None]
    return packed.reshape(rows, -1), values.reshape(rows, columns)


def llama_cpp_order(rows: int, heads: int) -> list[int]:
    """Where llama.cpp takes each stored q or k row from: in each head 0, d/2, 1, d/2 + 1, …"""
    d = rows // heads
    return [head * d + offset + index for head in range(heads) for index in range(d // 2) for offset in (0, d // 2)]


# --- a tiny model


class Tiny:
    """A GGUF that a test can spoil before it is written."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tensors: dict[str, tuple[np.ndarray, Type]] = {}
        self.expected: dict[str, np.ndarray] = {}
        self.arrays: dict[str, list[Any]] = {
            "tokenizer.ggml.tokens": list(VOCABULARY),
            "tokenizer.ggml.merges": list(MERGES),
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(VOCABULARY) - len(CONTROL)),
        }
        self.architecture = "llama"
        self.values: dict[str, Any] = {
            "llama.block_count": LAYERS,
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": INTERMEDIATE,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 50000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": TEMPLATE,
        }
        self._add("token_embd", "model.embed_tokens", q8_0(rng, len(VOCABULARY), HIDDEN), Type.Q8_0)
        for layer in range(LAYERS):
            self._add_layer(rng, f"blk.{layer}.", f"model.layers.{layer}.")
        self._add_norm(rng, "output_norm", "model.norm")

    def _add(self, ours: str, theirs: str, made: tuple[np.ndarray, np.ndarray], kind: Type, heads: int = 0) -> None:
        stored, values = made
        if heads:
            stored = stored[llama_cpp_order(len(stored), heads)]
        self.tensors[f"{ours}.weight"] = (stored, kind)
        self.expected[f"{theirs}.weight"] = values

    def _add_norm(self, rng: np.random.Generator, ours: str, theirs: str) -> None:
        norm = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        self._add(ours, theirs, (norm, norm), Type.F32)

    def _add_layer(self, rng: np.random.Generator, ours: str, theirs: str) -> None:
        kv = KV_HEADS * HEAD
        self._add_norm(rng, ours + "attn_norm", theirs + "input_layernorm")
        self._add_norm(rng, ours + "ffn_norm", theirs + "post_attention_layernorm")
        for name, target, rows, columns, heads in [
            ("attn_q", "self_attn.q_proj", HIDDEN, HIDDEN, HEADS),
            ("attn_k", "self_attn.k_proj", kv, HIDDEN, KV_HEADS),
            ("attn_v", "self_attn.v_proj", kv, HIDDEN, 0),
            ("attn_output", "self_attn.o_proj", HIDDEN, HIDDEN, 0),
            ("ffn_gate", "mlp.gate_proj", INTERMEDIATE, HIDDEN, 0),
            ("ffn_up", "mlp.up_proj", INTERMEDIATE, HIDDEN, 0),
            ("ffn_down", "mlp.down_proj", HIDDEN, INTERMEDIATE, 0),
        ]:
            self._add(ours + name, theirs + target, q4_1(rng, rows, columns), Type.Q4_1, heads)

    def untie(self) -> None:
        self._add("output", "lm_head", q8_0(np.random.default_rng(1), len(VOCABULARY), HIDDEN), Type.Q8_0)

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        adders: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        }  # fmt: skip
        for key, value in self.values.items():
            adders[type(value)](key, value)
        for key, value in self.arrays.items():
            writer.add_array(key, value)
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied tiny model, unpacked."""
    folder = tmp_path_factory.mktemp("gguf")
    out = folder / "out"
    out.mkdir()
    unpack(Tiny().write(folder / "tiny.gguf"), out)
    return out


# --- weights and config


def test_tensors_are_the_formats_definition_to_the_bit(unpacked: Path) -> None:
    tensors = load_file(unpacked / "model.safetensors")
    expected = Tiny().expected
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)


def test_unpermute_by_hand() -> None:
    """Two heads of four rows: llama.cpp stores 0 2 1 3 | 4 6 5 7."""
    stored = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None] * np.ones((1, 3), int)
    assert unpermute(stored, heads=2)[:, 0].tolist() == list(range(8))


def test_the_safetensors_file_is_aligned_and_in_header_order(unpacked: Path) -> None:
    data = (unpacked / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    offsets = [entry["data_offsets"] for entry in header.values()]
    assert length % 8 == 0
    assert offsets[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(offsets))
    assert len(data) == 8 + length + offsets[-1][1]


def test_transformers_loads_every_tensor(unpacked: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(unpacked, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.config.tie_word_embeddings
    assert (model.config.rms_norm_eps, model.config.rope_theta) == (1e-5, 50000.0)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    assert (model.config.head_dim, model.config.max_position_embeddings) == (HEAD, 128)
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_an_output_matrix_makes_the_head_untied(tmp_path: Path) -> None:
    tiny = Tiny()
    tiny.untie()
    unpack(tiny.write(tmp_path / "untied.gguf"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(head, tiny.expected["lm_head.weight"])


def test_unpacking_twice_gives_equal_bytes(unpacked: Path, tmp_path: Path) -> None:
    unpack(Tiny().write(tmp_path / "again.gguf"), tmp_path)
    for file in unpacked.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_optional_metadata_may_be_absent(tmp_path: Path) -> None:
    tiny = Tiny()
    for key in ("rope.freq_base", "attention.head_count_kv"):
        del tiny.values[f"llama.{key}"]
    for key in ("padding_token_id", "unknown_token_id", "add_bos_token"):
        del tiny.values[f"tokenizer.ggml.{key}"]
    del tiny.values["tokenizer.chat_template"]
    rng = np.random.default_rng(2)
    for layer in range(LAYERS):  # without head_count_kv every head has its own key and value
        for name in ("attn_k", "attn_v"):
            tiny.tensors[f"blk.{layer}.{name}.weight"] = (q4_1(rng, HIDDEN, HIDDEN)[0], Type.Q4_1)
    unpack(tiny.write(tmp_path / "plain.gguf"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["num_key_value_heads"]) == (10000.0, HEADS)
    assert "pad_token_id" not in config
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


# --- tokenizer


def reference_tokens(text: str) -> list[str]:
    """Encode by hand: control tokens, single digits, GPT-2's pattern inside each piece, then merges by rank."""
    import regex

    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    alphabet, found = byte_alphabet(), []
    for piece in regex.split("(" + "|".join(map(regex.escape, CONTROL)) + ")", text):
        if piece in CONTROL:
            found.append(piece)
            continue
        for part in regex.findall(r"\p{N}|[^\p{N}]+", piece):
            for word in [part] if regex.fullmatch(r"\p{N}", part) else pattern.findall(part):
                found += merged([alphabet[byte] for byte in word.encode()])
    return found


def merged(symbols: list[str]) -> list[str]:
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(MERGES)}
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def test_the_tokenizer_splits_digits_and_round_trips(unpacked: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    encoded = tokenizer(TEXT)
    assert encoded.keys() == {"input_ids", "attention_mask"}
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == reference_tokens(TEXT)
    assert tokenizer.decode(encoded["input_ids"]) == TEXT
    assert tokenizer.tokenize(" 12") == ["Ġ", "1", "2"], "the merge '1 2' must not apply across digits"


def test_special_tokens_and_chat_template_survive(unpacked: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    assert tokenizer.all_special_ids == [1, 2, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe<|im_end|>\n"
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nthe\n"


def test_onnxruntime_genai_encodes_alike(unpacked: Path, tmp_path: Path) -> None:
    """Its tokenizer reads the same files with code of its own; white space before digits is where it can differ."""
    import onnxruntime_genai
    from transformers import AutoTokenizer

    folder = genai_folder(unpacked, tmp_path)
    genai = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    for text in (
        TEXT,
        "a  5   b 6\n\n 7\n  x",
        "\t4 we'll they'd 1.5e10",
        "½ Ⅷ ① ²",
        "<|im_start|>user\n12<|im_end|>\n",
    ):
        ids = tokenizer(text)["input_ids"]
        assert genai.encode(text).tolist() == ids, text
        assert genai.decode(np.array(ids, np.int32)) == tokenizer.decode(ids, skip_special_tokens=True)


def genai_folder(unpacked: Path, folder: Path) -> Path:
    """The tokenizer files beside the smallest model that onnxruntime-genai agrees to open."""
    import onnx
    from onnx import TensorProto, helper

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((unpacked / name).read_bytes())
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)],
        "cast",
        [tensor("input_ids", TensorProto.INT64, ["batch", "length"])],
        [tensor("logits", TensorProto.FLOAT, ["batch", "length"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    decoder = {
        "filename": "model.onnx", "head_size": HEAD, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"},
    }  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model_config = {"type": "llama", "vocab_size": len(VOCABULARY), "context_length": 128, "decoder": decoder, **ids}
    (folder / "genai_config.json").write_text(json.dumps({"model": model_config, "search": {"max_length": 128}}))
    return folder


# --- what is refused


def spoil_value(key: str, value: Any) -> Callable[[Tiny], None]:
    return lambda tiny: tiny.values.__setitem__(key, value)


def spoil_array(key: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Tiny], None]:
    return lambda tiny: tiny.arrays.__setitem__(key, change(tiny.arrays[key]))


def spoil_tensor(name: str, data: np.ndarray, kind: Type = Type.F32) -> Callable[[Tiny], None]:
    return lambda tiny: tiny.tensors.__setitem__(name, (data, kind))


def with_nan(tiny: Tiny) -> None:
    tiny.tensors["blk.1.attn_norm.weight"][0][3] = np.nan


def other_architecture(tiny: Tiny) -> None:
    tiny.architecture = "qwen2"


BAD = {
    "architecture": (other_architecture, "architecture 'qwen2'; only 'llama'"),
    "missing key": (lambda tiny: tiny.values.pop("llama.block_count"), "no metadata key 'llama.block_count'"),
    "wrong type": (spoil_value("llama.block_count", "two"), "holds a str, not a int"),
    "zero": (spoil_value("llama.attention.head_count", 0), "is 0; it must be positive"),
    "eps": (spoil_value("llama.attention.layer_norm_rms_epsilon", float("nan")), "rms_norm_eps is nan; a number from"),
    "heads": (spoil_value("llama.attention.head_count_kv", 3), "4 heads do not divide over 3 KV heads"),
    "partial rotary": (spoil_value("llama.rope.dimension_count", 8), "rotary size 8 is not the head size 16"),
    "rope scaling": (spoil_value("llama.rope.scaling.type", "yarn"), "rope scaling 'yarn'"),
    "vocabulary size": (spoil_value("llama.vocab_size", 99), "not the 268 tokens"),
    "missing tensor": (lambda tiny: tiny.tensors.pop("blk.1.ffn_up.weight"), "lacks 1 tensor.*blk.1.ffn_up.weight"),
    "bias": (spoil_tensor("blk.0.attn_q.bias", np.zeros(HIDDEN, np.float32)), "also holds 1 tensor.*attn_q.bias"),
    "shape": (spoil_tensor("output_norm.weight", np.ones(32, np.float32)), r"shape \(32,\).*promises \(64,\)"),
    "type": (spoil_tensor("output_norm.weight", np.ones(64, np.int32), Type.I32), "type I32.*cannot be dequantized"),
    "not finite": (with_nan, "blk.1.attn_norm.weight.*not finite"),
    "vocabulary type": (spoil_value("tokenizer.ggml.model", "llama"), "vocabulary type 'llama'"),
    "pre-tokenizer": (spoil_value("tokenizer.ggml.pre", "qwen2"), "pre-tokenizer 'qwen2'; known are smollm"),
    "start token": (spoil_value("tokenizer.ggml.add_bos_token", True), "add_bos_token is true"),
    "stop id": (spoil_value("tokenizer.ggml.eos_token_id", 268), "eos_token_id is 268, outside the 268 tokens"),
    "token twice": (spoil_array("tokenizer.ggml.tokens", lambda a: [*a[:-1], a[5]]), "lists a token twice"),
    "merge": (spoil_array("tokenizer.ggml.merges", lambda a: [*a, "a b"]), r"merges\[9\] is 'a b'"),
    "token types": (spoil_array("tokenizer.ggml.token_type", lambda a: a[1:]), "267 token types for 268 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_unpacked_exactly_is_refused(case: str, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    tiny = Tiny()
    spoil(tiny)
    with pytest.raises(CheckpointError, match=message) as caught:
        unpack(tiny.write(tmp_path / "bad.gguf"), tmp_path)
    assert "bad.gguf" in str(caught.value)


def test_truncated_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    whole = Tiny().write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 24, *range(30, len(whole), len(whole) // 40), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut.gguf is not a readable GGUF"):
            unpack(cut, tmp_path)


def test_damaged_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    """Any byte of the header may be wrong: the answer is an error of ours or a readable checkpoint, and it is quick."""
    whole = Tiny().write(tmp_path / "whole.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for position in range(0, 1200, 13):
        damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            unpack(damaged, tmp_path)
        except CheckpointError:
            refused += 1
        else:
            load_file(tmp_path / "model.safetensors")
    assert refused > 40


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html>" * 10)
    for name in ("page.gguf", "absent.gguf", "."):
        with pytest.raises(CheckpointError, match="not a readable GGUF"):
            unpack(tmp_path / name, tmp_path)
