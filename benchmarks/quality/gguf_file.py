"""A checkpoint as the GGUF that llama.cpp converts it to, and what of a GGUF is weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names and the order of q and k as in llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.files import read_json

_PRE_TOKENIZER = "smollm"  # how llama.cpp calls the splitting that tokenizer.json has


def write_gguf(path: Path, folder: Path, architecture: Architecture) -> None:
    """Write the Llama checkpoint in `folder` with its tokenizer: matrices in float16, norms in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_hyperparameters(writer, architecture, read_json(folder / "config.json"))
    _add_tokenizer(writer, folder, architecture.vocab)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, architecture.layers)
    for name, values in _tensors(Checkpoint(folder), architecture):
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, architecture: Architecture, config: dict) -> None:
    writer.add_block_count(architecture.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(architecture.hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_vocab_size(architecture.vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab: int) -> None:
    tokenizer = read_json(folder / "tokenizer.json")
    tokens = [f"[unused{number}]" for number in range(vocab)]
    types = [gguf.TokenType.NORMAL] * vocab
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number] = token
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab).add_to_gguf(writer, quiet=True)


def _tensors(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[tuple[str, np.ndarray]]:
    heads = {"q_proj": architecture.heads, "k_proj": architecture.kv_heads}
    for name in checkpoint:
        values = checkpoint.rows(name)
        if role := next((role for role in heads if role in name), None):
            values = rotary_order(values, heads[role])
        yield name, values if values.ndim == 1 else values.astype(np.float16)


def rotary_order(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads · head_dim, columns], in the order that llama.cpp rotates: pairs side by side."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer_bytes(path: Path) -> int:
    """Bytes of the tokenizer in a GGUF's metadata, keys and types included: ONNX has it in files beside the model."""
    fields = gguf.GGUFReader(path).fields.values()
    return sum(part.nbytes for field in fields if field.name.startswith("tokenizer.") for part in field.parts)
