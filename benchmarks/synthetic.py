r"""Checkpoints of real models' exact size and layout with synthetic weights, streamed to disk.

    python -m benchmarks.synthetic mimo-8b build/mimo-8b
    python -m benchmarks.synthetic phi-4 build/phi-4-short --layers 2 --seed 1
    python -m benchmarks.synthetic phi-4 build/talking-phi-4 --talking artifacts/smollm2-135m/reference

Names, shapes, dtype (bf16), shards and index are those of the published checkpoints: tensors in the order of the
modules, a new shard before 5 GB would be exceeded, tensors sorted by name inside a shard. The values of config.json are
the published ones, as public copies give them. The tokenizer has the real layout (byte-level BPE, number of tokens,
special tokens at their ids, splitting pattern); its merges are invented.

Every value depends on (seed, tensor name, row, column) alone: any tensor can be made again by itself, and the files are
the same for any number of threads. Weights are Student-t, times log-normal factors per row and per column (input
channel): heavy-tailed, as trained ones are. With σ = 0.02 and norms near 1 a forward pass stays finite. A talking model
holds a small model's function instead (`benchmarks.talking`), and that one's tokenizer.

The index is written last, so its existence means that the checkpoint is complete.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, islice, product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import click
import numpy as np

from benchmarks.published import MODELS, Model, Vocabulary
from benchmarks.talking import Embedded, Talking
from pipeline.checkpoint.architecture import read_architecture
from pipeline.compiled import compiled
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.files import atomic_file, disk_full, read_json, require_free_space, write_bytes, write_json
from pipeline.machine import cores
from pipeline.progress import Progress

Shape = tuple[int, ...]
Make = Callable[[str, Shape], "Values | Embedded"]
"""A tensor's name and shape → its values."""

SHARD_BYTES = 5_000_000_000  # transformers' max_shard_size when these checkpoints were published
SIGMA = 0.02
_VERSION = 1  # of the values: raise it when they change
_CHUNK = 1 << 20  # bytes made and written at a time, per thread: they stay in the cache
_SYNC = 1 << 28  # bytes between two waits for the disk
_SMALL_FILES = 1 << 25  # bytes, at least those of everything beside the weights
_BESIDE = ("LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_INDEX = "model.safetensors.index.json"
_OURS = b"Synthetic weights for benchmarks: "  # how the LICENSE begins that this command writes
_NOTICE = """seeded random numbers in the layout of a published model.

They hold nothing of that model, compute nothing useful, and may be used for any purpose (CC0-1.0).
Only the names, shapes and configuration values are the published ones.
"""
_TALKING_NOTICE = """the function of a small model in the layout of a large one.

They hold nothing of the large model. The licence of the small model's weights follows.

"""


# --- tensors and shards ----------------------------------------------------------------------------------------------


def _config(model: str, layers: int | None) -> dict[str, Any]:
    """config.json of a model, cut to its first `layers` layers. Raises ConfigError for what does not exist."""
    if model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no synthetic checkpoint is known as {model!r}.{hint} There are: {', '.join(MODELS)}.")
    config = MODELS[model].config
    if layers is None:
        return config
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ConfigError(f"{model} has {config['num_hidden_layers']} layers; it cannot be cut to {layers}.")
    return config | {"num_hidden_layers": layers}


def tensors(model: str, layers: int | None = None) -> dict[str, Shape]:
    """Name → shape of every tensor, in the order of the published model's modules; `layers` cuts the decoder.

    Raises ConfigError for an unknown model or an impossible number of layers.
    """
    config = _config(model, layers)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layer = {"phi3": _fused_layer, "phimoe": _mixture_layer}.get(config["model_type"], _separate_layer)(config)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    layer_norm = config["model_type"] == "phimoe"
    shapes |= {f"model.norm.{part}": (hidden,) for part in ("weight", "bias")[: 1 + layer_norm]}
    for number in range(config.get("num_nextn_predict_layers", 0)):
        shapes |= {f"model.mtp_layers.{number}.{name}": shape for name, shape in _mtp_layer(config).items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    if config.get("lm_head_bias"):
        shapes["lm_head.bias"] = (vocab,)
    return shapes


def _widths(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Hidden size, query width, key width, intermediate size."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim", hidden // heads)
    return hidden, heads * head, config["num_key_value_heads"] * head, config["intermediate_size"]


def _norms(hidden: int, *names: str, parts: tuple[str, ...] = ("weight",)) -> dict[str, Shape]:
    return {f"{name}_layernorm.{part}": (hidden,) for name in names for part in parts}


def _separate_attention(config: dict[str, Any]) -> dict[str, Shape]:
    hidden, query, key, _ = _widths(config)
    shapes: dict[str, Shape] = {}
    for name, rows in (("q", query), ("k", key), ("v", key)):
        shapes |= {f"self_attn.{name}_proj.weight": (rows, hidden), f"self_attn.{name}_proj.bias": (rows,)}
    return shapes | {"self_attn.o_proj.weight": (hidden, query)}


def _gated(config: dict[str, Any]) -> dict[str, Shape]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    return {
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }


def _separate_layer(config: dict[str, Any]) -> dict[str, Shape]:
    return _separate_attention(config) | _gated(config) | _norms(config["hidden_size"], "input", "post_attention")


def _mixture_layer(config: dict[str, Any]) -> dict[str, Shape]:
    hidden, inner, experts = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    each = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    return {
        **_separate_attention(config),
        "self_attn.o_proj.bias": (hidden,),
        "block_sparse_moe.gate.weight": (experts, hidden),
        **{
            f"block_sparse_moe.experts.{expert}.{name}.weight": shape
            for expert, (name, shape) in product(range(experts), each.items())
        },
        **_norms(hidden, "input", "post_attention", parts=("weight", "bias")),
    }


def _mtp_layer(config: dict[str, Any]) -> dict[str, Shape]:
    """MiMo's multi-token prediction: a decoder layer behind a projection of [hidden state, embedding]."""
    hidden = config["hidden_size"]
    return {
        **_norms(hidden, "input", "post_attention", "token", "hidden"),
        "input_proj.weight": (hidden, 2 * hidden),
        **_norms(hidden, "final"),
        **_separate_attention(config),
        **_gated(config),
    }


def _fused_layer(config: dict[str, Any]) -> dict[str, Shape]:
    hidden, query, key, intermediate = _widths(config)
    return {
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.qkv_proj.weight": (query + 2 * key, hidden),
        "mlp.gate_up_proj.weight": (2 * intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        **_norms(hidden, "input", "post_attention"),
    }


def _bytes(shape: Shape) -> int:
    return 2 * math.prod(shape)


def shards(shapes: dict[str, Shape]) -> dict[str, list[str]]:
    """File name → its tensors in the order of the file: transformers' rule for `SHARD_BYTES`, then sorted by name."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if groups[-1] and filled + _bytes(shape) > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _bytes(shape)
    count = len(groups)
    return {f"model-{number:05}-of-{count:05}.safetensors": sorted(group) for number, group in enumerate(groups, 1)}


def header(shapes: dict[str, Shape], names: list[str]) -> bytes:
    """The first bytes of a safetensors file that holds `names` one behind the other, padded to 8 as the library does.

    Format: https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + _bytes(shapes[name])
        entries[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- values ----------------------------------------------------------------------------------------------------------


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantiles at (i + ½)/65536, float32: Student-t, row factors, column factors; each of mean square 1.

    Student-t with 6 degrees of freedom by the expansion of Abramowitz and Stegun, 26.7.5. Rounded to 2⁻¹⁶, so that the
    last bit of a mathematical library's logarithm does not decide a value.
    """
    normal = NormalDist()
    half = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768)])
    z = np.concatenate([half, -half[::-1]])
    student = z + (z**3 + z) / (4 * 6) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * 6**2)
    rounded = []
    for table in (student, np.exp(0.15 * z), np.exp(0.3 * z)):
        unit = table / np.sqrt(np.mean(table**2))
        rounded.append((np.round(unit * 65536) / 65536).astype(np.float32))
    return rounded[0], rounded[1], rounded[2]


@compiled(nogil=True)
def _hash(x: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood, 2014): uint64 to uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled(nogil=True)
def _draw(stream: int, table: np.ndarray, out: np.ndarray) -> None:
    """Fill float32 `out` with entries of `table`; four 16-bit indices come from one hash of a counter."""
    mask, golden = np.uint64(0xFFFF), np.uint64(0x9E3779B97F4A7C15)
    whole = len(out) // 4
    for block in range(whole):
        bits = _hash(stream + np.uint64(block) * golden)
        out[4 * block] = table[bits & mask]
        out[4 * block + 1] = table[(bits >> np.uint64(16)) & mask]
        out[4 * block + 2] = table[(bits >> np.uint64(32)) & mask]
        out[4 * block + 3] = table[bits >> np.uint64(48)]
    bits = _hash(stream + np.uint64(whole) * golden)
    for j in range(4 * whole, len(out)):
        out[j] = table[bits & mask]
        bits >>= np.uint64(16)


@compiled(nogil=True)
def _fill(
    key: int, start: int, table: np.ndarray, rows: np.ndarray, columns: np.ndarray, mean: float, out: np.ndarray
) -> None:
    """bf16 bits of rows from `start` on into uint16 `out`, [rows, columns], rounded to nearest, ties to even."""
    values = np.empty(out.shape[1], np.float32)
    bits = values.view(np.uint32)
    for i in range(len(out)):
        _draw(_hash(key + np.uint64(start + i)), table, values)
        for j in range(len(values)):
            values[j] = (values[j] * rows[i]) * columns[j] + mean
        for j in range(len(values)):
            out[i, j] = (bits[j] + np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


def _key(seed: int, name: str, part: str) -> np.uint64:
    digest = hashlib.sha256(f"{_VERSION}:{seed}:{name}:{part}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


class Values:
    """One tensor's values: bf16 bits of any range of rows (a vector is one row)."""

    def __init__(self, name: str, shape: Shape, seed: int):
        self.rows, self.columns = shape if len(shape) == 2 else (1, *shape)
        self._key = _key(seed, name, "values")
        self._table, row_table, column_table = _tables()
        norm = len(shape) == 1 and not name.endswith(".bias")
        self._mean = np.float32(1.0 if norm else 0.0)
        sigma = np.float32(0.1 if norm else SIGMA)
        self._row_factors = np.ones(self.rows, np.float32)
        self._column_factors = np.ones(self.columns, np.float32)
        if len(shape) == 2:
            _draw(_key(seed, name, "rows"), row_table, self._row_factors)
            _draw(_key(seed, name, "columns"), column_table, self._column_factors)
        self._row_factors *= sigma

    def make(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as uint16 [rows, columns]: the upper halves of float32."""
        out = np.empty((stop - start, self.columns), np.uint16)
        _fill(self._key, start, self._table, self._row_factors[start:stop], self._column_factors, self._mean, out)
        return out


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE (GPT-2's), the printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _merges(count: int) -> Iterator[tuple[str, str]]:
    """The first `count` merges that make words of two letters, then of three, then of four; Ġ, a space, may come first.

    As in a trained vocabulary, every token is what its own text is encoded to: some implementations look whole words up
    before they merge. Pairs outrank longer tokens, so a word is split where its pairs leave it split; words of four
    letters whose middle pair would be merged first are left out.
    """
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    pairs = [left + right for left in "Ġ" + letters for right in letters]
    rank = {pair: number for number, pair in enumerate(pairs)}
    triples = (
        (pair, last) if rank[pair] <= rank[pair[1] + last] else (pair[0], pair[1] + last)
        for pair, last in product(pairs, letters)
    )
    fours = (
        (left, right)
        for left, right in product(pairs, pairs[len(letters) :])
        if rank[left] <= rank[left[1] + right[0]] or rank[right] < rank[left[1] + right[0]]
    )
    return islice(chain(((pair[0], pair[1]) for pair in pairs), triples, fours), count)


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """A tokenizer.json of the `tokenizers` library with this layout and invented merges."""
    merges = list(_merges(vocabulary.base - 256))
    tokens = _byte_symbols() + [left + right for left, right in merges]
    reserved = iter(range(vocabulary.size))
    added = []
    for number in range(vocabulary.base, vocabulary.size):
        content = vocabulary.special.get(number) or f"<|dummy_{next(reserved)}|>"
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.append({"id": number, "content": content, **flags, "special": content not in vocabulary.plain})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": vocabulary.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _tokenizer_settings(vocabulary: Vocabulary, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json."""
    decoder = {
        str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokenizer["added_tokens"]
    }
    common = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "errors": "replace", "unk_token": None}
    return common | vocabulary.settings | {"added_tokens_decoder": decoder}


# --- files -----------------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, model: str, seed: int = 0, layers: int | None = None, small: Path | None = None
) -> bool:
    """Write a checkpoint of `model` to `folder`; return False if it is there already, complete, with the same seed.

    Memory: a megabyte or two per core and the factors of one shard's tensors (5 MB), whatever the model; for a talking
    one also the small model's tensors that are in work. What a killed run or another seed left is replaced.

    Args:
        small: a checkpoint whose function the model computes, so that it talks.

    Raises:
        ConfigError: an unknown model, more layers than it has, or a small model that does not fit into it.
        CheckpointError: `folder` holds files that this function did not write; they are left alone.
        ResourceError: the disk is too small, or not writable.
    """
    config, shapes = _config(model, layers), tensors(model, layers)
    files = shards(shapes)
    total = sum(map(_bytes, shapes.values()))
    mark = f"{model}, {config['num_hidden_layers']} layers, seed {seed}, version {_VERSION}"
    talking = Talking(small, config) if small else None
    if talking:
        mark += f", talking: {talking.mark}"
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total, "synthetic": mark}, "weight_map": weight_map}
    if _is_complete(folder, index, files, shapes):
        return False
    with disk_full(f"write a synthetic {model} to {folder}"):
        _clear(folder)
        require_free_space(folder, total + _SMALL_FILES, f"write a synthetic {model} to {folder}")
        _write_small_files(folder, config, MODELS[model], talking)
        chunks = sum(len(_ranges(shape)) for shape in shapes.values())
        with Progress(f"synthetic {model}", chunks, "chunks", total) as progress:
            for written in _write_shards(folder, files, shapes, partial(_values, seed=seed, talking=talking)):
                progress.advance(read=written)
        write_json(folder / _INDEX, index)
    return True


def _values(name: str, shape: Shape, seed: int, talking: Talking | None) -> Values | Embedded:
    return (talking and talking.values(name, shape)) or Values(name, shape, seed)


def _is_complete(folder: Path, index: Any, files: dict[str, list[str]], shapes: dict[str, Shape]) -> bool:
    if not all((folder / name).is_file() for name in _BESIDE):
        return False
    try:
        return read_json(folder / _INDEX) == index and all(
            (folder / file).stat().st_size == len(header(shapes, names)) + sum(_bytes(shapes[name]) for name in names)
            for file, names in files.items()
        )
    except (OSError, ValueError):
        return False


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, its index first. Raises CheckpointError if the folder is not ours."""
    if not folder.exists():
        return
    licence = folder / "LICENSE"
    ours = folder.is_dir() and licence.is_file() and licence.read_bytes().startswith(_OURS)
    if not ours and not (folder.is_dir() and all(path.name.startswith(".LICENSE.") for path in folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and was not written by this command; a synthetic checkpoint would overwrite what is "
            f"there. Name a new folder, or remove this one yourself."
        )
    (folder / _INDEX).unlink(missing_ok=True)
    for pattern in ("model-*.safetensors", ".model*", ".*.json.*", ".LICENSE.*", "special_tokens_map.json"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_small_files(folder: Path, config: dict[str, Any], model: Model, talking: Talking | None = None) -> None:
    notice = _TALKING_NOTICE.encode() + talking.licence if talking else _NOTICE.encode()
    write_bytes(folder / "LICENSE", _OURS + notice)  # first: it marks the folder as ours
    write_json(folder / "config.json", talking.config if talking else config)
    if talking:
        talking.copy_files(folder)
        return
    write_json(folder / "generation_config.json", model.generation)
    tokenizer = tokenizer_json(model.vocabulary)
    write_bytes(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False).encode())
    write_json(folder / "tokenizer_config.json", _tokenizer_settings(model.vocabulary, tokenizer))


def _ranges(shape: Shape) -> list[tuple[int, int]]:
    """Ranges of rows of about `_CHUNK` bytes that cover a tensor."""
    rows, columns = shape if len(shape) == 2 else (1, *shape)
    step = max(1, _CHUNK // (2 * columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _write_shards(folder: Path, files: dict[str, list[str]], shapes: dict[str, Shape], make: Make) -> Iterator[int]:
    """Write the shards one after the other, all cores on each; yield the bytes of every chunk that is written."""
    with ThreadPoolExecutor(cores()) as pool:
        for file, names in files.items():
            with atomic_file(folder / file) as stream:
                start = header(shapes, names)
                stream.write(start)
                stream.flush()
                waiting = 0
                tasks = _tasks(stream.fileno(), len(start), names, shapes, make)
                for written in pool.map(lambda task: task(), tasks):
                    yield written
                    waiting += written
                    if waiting > _SYNC:  # the disk works while the cores make the next chunks
                        os.fsync(stream.fileno())
                        waiting = 0


def _tasks(fd: int, offset: int, names: list[str], shapes: dict[str, Shape], make: Make) -> Iterator[Callable[[], int]]:
    """One function per chunk of a shard; each makes its rows and writes them where they belong."""
    for name in names:
        values = make(name, shapes[name])
        for start, stop in _ranges(shapes[name]):
            yield partial(_write_chunk, fd, offset + 2 * start * shapes[name][-1], values, start, stop)
        offset += _bytes(shapes[name])


def _write_chunk(fd: int, offset: int, values: Values | Embedded, start: int, stop: int) -> int:
    data = memoryview(values.make(start, stop)).cast("B")
    size = len(data)
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return size


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Choice(list(MODELS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Another seed gives other weights.")
@click.option("--layers", type=int, help="Only the first so many decoder layers (default: all).")
@click.option(
    "--talking",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Checkpoint and tokenizer of a small model, whose function MODEL's shapes then compute.",
)
def main(model: str, folder: Path, seed: int, layers: int | None, talking: Path | None) -> None:
    """Write a synthetic checkpoint with the exact size and layout of MODEL to FOLDER."""
    start = time.monotonic()
    try:
        made = write_checkpoint(folder, model, seed, layers, talking)
        needed = read_architecture(talking / "config.json").layers if talking else 0
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    shapes = tensors(model, layers)
    total, seconds = sum(map(_bytes, shapes.values())), time.monotonic() - start
    done = f"written in {seconds:.0f} s, {total / seconds / 1e6:,.0f} MB/s" if made else "already there"
    click.echo(f"{folder}: {len(shapes)} tensors, {total:,} bytes, {len(shards(shapes))} shards, {done}")
    if layers and layers < needed:
        click.echo(f"With {layers} of {needed} layers it computes the small model's first ones, and does not talk.")


if __name__ == "__main__":
    main()
