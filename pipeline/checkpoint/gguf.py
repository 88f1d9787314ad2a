"""Unpack a GGUF file into the folder Hugging Face tools and onnxruntime-genai read: safetensors, config, tokenizer.

Done once, at download, so that everything behind it knows one checkpoint format. Three things differ from a copy:

- weights are dequantized to F32 by the format's definition, so nothing is lost that the GGUF still had;
- llama.cpp stores the rows of q and k in the order its rotary embedding wants; the Hugging Face order is restored;
- the tokenizer is rebuilt from the vocabulary and merges with the pre-tokenizer the file *names*. Loaders that assume
  plain GPT-2 splitting lose SmolLM's digit splitting and encode every number differently.

Only what is checked is accepted: one architecture, one vocabulary type, one pre-tokenizer, and exactly the tensors
that architecture has. Anything else is an error here rather than a model that is subtly wrong later.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, TokenType, dequantize, get_tensor_name_map
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from pipeline.checkpoint.architecture import Architecture, parse_architecture
from pipeline.checkpoint.untrusted import open_regular, shown
from pipeline.errors import CheckpointError
from pipeline.files import write_bytes, write_json

T = TypeVar("T")
Shape = tuple[int, ...]

ARCHITECTURE = "llama"
VOCABULARY = "gpt2"  # byte-level BPE, in GGUF's vocabulary
# The name in tokenizer.ggml.pre → the regular expressions that cut text, one after the other, before BPE.
# They are written as splits because that is the one form transformers and onnxruntime-genai read alike:
# genai runs Digits + ByteLevel as a single pattern and encodes "\n 3" differently.
PRE_TOKENIZERS = {
    "smollm": (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
}
_MAX_READS = 300_000  # values of metadata: SmolLM2, whose vocabulary is the one supported, has 247,312
_MAX_DIMENSIONS = 4  # of a tensor; GGML's own limit
_FALSE_ONLY = ("add_bos_token", "add_eos_token", "add_space_prefix")
_INSTEAD = "Use the model's safetensors release instead."


def unpack(gguf: Path, out: Path) -> None:
    """Write `gguf` into the existing folder `out` as a Hugging Face Llama checkpoint.

    Files: model.safetensors (F32), config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
    special_tokens_map.json. The GGUF is memory-mapped and tensors are written one by one, so the peak is one
    dequantized tensor. Equal input gives equal bytes.

    Raises:
        CheckpointError: the file is truncated or malformed, or is not a Llama with the supported tokenizer, or a
            tensor is missing, unexpected, misshapen, of an unknown type, or not finite. `out` may then hold some
            files: callers give a temporary folder.
    """
    file = _File(gguf)
    file.expect("general.architecture", ARCHITECTURE, "architecture")
    config = _config(file)
    architecture = parse_architecture(config, gguf)
    names = _tensor_names(architecture)
    _check_tensors(file, names, architecture.expected_tensors())
    _check_places(file)

    tokenizer = _tokenizer(file)
    ids, special = _special_tokens(file)
    write_json(out / "config.json", config | ids)
    write_json(out / "generation_config.json", ids)
    write_bytes(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_json(out / "tokenizer_config.json", _tokenizer_config(file, architecture, tokenizer) | special)
    write_json(out / "special_tokens_map.json", special)
    _write_safetensors(file, out / "model.safetensors", names, architecture)


# --- reading --------------------------------------------------------------------------------------------------------


class _BoundedReader(GGUFReader):
    """GGUFReader that reads nothing past the end of the file, and no more values than a model has.

    The library returns a short array instead, so a damaged length makes it loop (almost) for ever, and it makes an
    object of every element of an array and follows arrays of arrays as deep as they go.
    """

    _reads = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if isinstance(self.data, np.memmap):
            # The same mapping; slices of it are three times cheaper. The library's annotation is narrower than its use.
            self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
        self._reads += 1
        if self._reads > _MAX_READS:
            raise ValueError(f"its metadata holds more than {_MAX_READS:,} values")
        if dtype is np.uint64 and int(count) > _MAX_DIMENSIONS:  # the one such read longer than two is a shape
            raise ValueError(f"a tensor has {int(count):,} dimensions")
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,} but promises data up to byte {end:,}")
        return super()._get(int(offset), dtype, count, override_order)


class _File:
    """A GGUF file: its tensors by name, and its key-value pairs, each read with the type it must have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path), np.errstate(over="ignore"):  # offsets that wrap around: `_check_places` finds them
                self.reader = _BoundedReader(path)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            why = f"{reason}. It is probably truncated or damaged: fetch it again"
            raise self.wrong(f" is not a readable GGUF file: {why}.") from error
        if self.reader.byte_order == "S":
            raise self.wrong(" is a GGUF file of the other byte order; convert it to little-endian first.")
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def wrong(self, what: str) -> CheckpointError:
        """The error that this file, named first, is `what`."""
        return CheckpointError(f"{self.path.name}{what}")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`; `default` when it is absent. A missing key without default, or another type, raises."""
        if not self.has(key):
            if default is None:
                raise self.wrong(f" has no metadata key {key!r}, which a {ARCHITECTURE} model needs.")
            return default
        try:
            value = self.reader.fields[key].contents()
        except (UnicodeDecodeError, IndexError) as error:
            raise self.wrong(f": metadata key {key!r} cannot be decoded: {error}.") from error
        if type(value) is not kind:
            raise self.wrong(f": metadata key {key!r} holds a {type(value).__name__}, not a {kind.__name__}.")
        return value

    def has(self, key: str) -> bool:
        return key in self.reader.fields

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer above zero; how large it may be, `parse_architecture` knows."""
        if (value := self.get(key, int, default)) <= 0:
            raise self.wrong(f": metadata key {key!r} is {value}; it must be positive.")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that is the same float32 (1e-05, not 9.999999747378752e-06)."""
        return float(str(np.float32(self.get(key, float, default))))

    def expect(self, key: str, supported: str, what: str) -> None:
        """Raise unless the string at `key` is the one supported."""
        value = self.get(key, str)
        if value != supported:
            raise self.wrong(f" has {what} {shown(value)}; only {supported!r} can be unpacked. {_INSTEAD}")


def _config(file: _File) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, without the ids of special tokens, for `parse_architecture` to check."""
    heads = file.positive("llama.attention.head_count")
    kv_heads = file.positive("llama.attention.head_count_kv", heads)
    hidden = file.positive("llama.embedding_length")
    head_dim = file.positive("llama.attention.key_length", max(hidden // heads, 1))
    vocab = len(file.get("tokenizer.ggml.tokens", list))
    rotary = file.positive("llama.rope.dimension_count", head_dim)
    value_dim = file.positive("llama.attention.value_length", head_dim)
    scaling = file.get("llama.rope.scaling.type", str, "none")
    problems = [
        (rotary != head_dim, f"rotary size {rotary} is not the head size {head_dim} (partial rotary)"),
        (value_dim != head_dim, f"value size {value_dim} is not the key size {head_dim}"),
        (scaling != "none", f"rope scaling {shown(scaling)} is not supported"),
        (file.positive("llama.vocab_size", vocab) != vocab, f"llama.vocab_size is not the {vocab} tokens it lists"),
    ]
    for wrong, text in problems:
        if wrong:
            raise file.wrong(f": {text}. {_INSTEAD}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": file.positive("llama.feed_forward_length"),
        "num_hidden_layers": file.positive("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": file.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.decimal("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "max_position_embeddings": file.positive("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


# --- tensors --------------------------------------------------------------------------------------------------------


def _tensor_names(architecture: Architecture) -> dict[str, str]:
    """GGUF name → Hugging Face name, in the order written, which is that of execution: exactly the tensors a Llama
    has."""
    order = [architecture.embedding.name]
    for layer in range(architecture.layers):
        matrices = [matrix.name for matrix in architecture.body(layer)]
        before, between = (f"model.layers.{layer}.{name}_layernorm.weight" for name in ("input", "post_attention"))
        order += [before, *matrices[:4], between, *matrices[4:]]
    order += ["model.norm.weight"] if architecture.tied else ["model.norm.weight", architecture.head.name]
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, architecture.layers)
    return {str(table.get_name(name, (".weight",))): name for name in order}


def _check_tensors(file: _File, names: dict[str, str], shapes: dict[str, Shape]) -> None:
    tensors = file.tensors
    for problem, wrong in (("lacks", names.keys() - tensors.keys()), ("also holds", tensors.keys() - names.keys())):
        if wrong:
            listed = ", ".join(map(shown, sorted(wrong)[:5])) + (", …" if len(wrong) > 5 else "")
            what = f" {problem} {len(wrong)} tensor(s) that do not fit its {ARCHITECTURE} metadata: {listed}"
            raise file.wrong(f"{what}. Biases, experts and rope factors are not supported. {_INSTEAD}")
    for name, target in names.items():
        shape = tuple(int(d) for d in reversed(tensors[name].shape))  # GGUF lists the fastest dimension first
        if shape != shapes[target]:
            raise file.wrong(f": tensor {name!r} has shape {shape}; its metadata promises {shapes[target]}.")


def _check_places(file: _File) -> None:
    """Refuse tensors whose bytes lie in the metadata or are another's too."""
    previous, position = "the metadata", file.reader.data_offset
    for tensor in sorted(file.reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < position:
            what = f": tensor {tensor.name!r} starts at byte {tensor.data_offset:,}, inside {previous}"
            raise file.wrong(f"{what}, which ends at {position:,}. The file is damaged: fetch it again.")
        previous, position = f"tensor {tensor.name!r}", tensor.data_offset + tensor.n_bytes


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of a q or k projection's rows.

    `rows` is [heads · d, in]. Inside each head llama.cpp interleaves the halves, (0, d/2, 1, d/2 + 1, …), because its
    rotary embedding turns neighbouring rows together; Hugging Face turns row i with row i + d/2.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _write_safetensors(file: _File, path: Path, names: dict[str, str], architecture: Architecture) -> None:
    """The safetensors layout: u64 header length, JSON header padded to 8 bytes, then the data in header order.

    The tensors are little-endian float32, rows of q and k in Hugging Face's order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, shapes = 0, architecture.expected_tensors()
    for name in names.values():
        end = offset + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    heads = {"attn_q": architecture.heads, "attn_k": architecture.kv_heads}
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor, what = file.tensors[name], f": tensor {name!r}"
            try:
                values = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise file.wrong(f"{what} has type {tensor.tensor_type.name}, which cannot be dequantized.") from error
            if not np.isfinite(values).all():
                raise file.wrong(f"{what} holds values that are not finite. It is damaged.")
            if (projection := name.split(".")[-2]) in heads:
                values = unpermute(values, heads[projection])
            out.write(np.ascontiguousarray(values, dtype="<f4").data)


# --- tokenizer ------------------------------------------------------------------------------------------------------


def _tokenizer(file: _File) -> Tokenizer:
    file.expect("tokenizer.ggml.model", VOCABULARY, "vocabulary type")
    pre = file.get("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        what = f" wants pre-tokenizer {shown(pre)}; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        raise file.wrong(f"{what}. A wrong guess would encode text differently from training. {_INSTEAD}")
    for flag in _FALSE_ONLY:
        if file.get(f"tokenizer.ggml.{flag}", bool, False):
            raise file.wrong(f": tokenizer.ggml.{flag} is true, which is not supported.")
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise file.wrong(f": {len(types)} token types for {len(tokens)} tokens.")
    tokenizer = Tokenizer(_bpe(file, tokens))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):  # these are found in text before it is split
            tokenizer.add_tokens([AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)])
    return tokenizer


def _bpe(file: _File, tokens: list[Any]) -> BPE:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise file.wrong(": tokenizer.ggml.tokens lists a token twice, or something not a string.")
    merges = [tuple(str(merge).split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    for number, merge in enumerate(merges):
        if len(merge) != 2 or "".join(merge) not in vocab or not all(part in vocab for part in merge):
            needed = "it must name two tokens of the vocabulary whose concatenation is one too"
            raise file.wrong(f": tokenizer.ggml.merges[{number}] is {shown(' '.join(merge))}; {needed}.")
    return BPE(vocab=vocab, merges=merges)


def _special_tokens(file: _File) -> tuple[dict[str, int], dict[str, str]]:
    """Ids as config.json names them (bos_token_id, …), tokens as tokenizer_config.json does (bos_token, …)."""
    ids, named, tokens = {}, {}, file.get("tokenizer.ggml.tokens", list)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        key = f"tokenizer.ggml.{theirs}_token_id"
        if ours in ("unk", "pad") and not file.has(key):
            continue
        index = file.get(key, int)
        if not 0 <= index < len(tokens):
            raise file.wrong(f": {key} is {index}, outside the {len(tokens)} tokens.")
        named[f"{ours}_token"] = tokens[index]
        if ours != "unk":
            ids[f"{ours}_token_id"] = index
    return ids, named


def _tokenizer_config(file: _File, architecture: Architecture, tokenizer: Tokenizer) -> dict[str, Any]:
    flags = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    config = {
        # GPT2Tokenizer would rebuild the pre-tokenizer and lose the digit splitting of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # the class's default adds token_type_ids
        "added_tokens_decoder": {str(index): {flag: getattr(token, flag) for flag in flags} for index, token in added},
        "model_max_length": architecture.max_position,
        "clean_up_tokenization_spaces": False,
    }
    if file.has("tokenizer.chat_template"):
        config["chat_template"] = file.get("tokenizer.chat_template", str)
    return config
