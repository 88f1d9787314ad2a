"""Checkpoints made by an adversary: refused with the file and tensor named, without hanging, without filling memory.

What a careless publisher gets wrong is tested beside each module; here the files attack the reader.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import complete, gguf
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.gguf import unpack
from pipeline.checkpoint.sources import fetch_model
from pipeline.checkpoint.tensors import INDEX, SINGLE, Checkpoint, read_header
from pipeline.checkpoint.untrusted import MAX_JSON
from pipeline.config.models import ModelConfig
from pipeline.errors import CheckpointError, PipelineError, SourceError
from pipeline.graph.decoder import build_decoder
from pipeline.graph.rope import rope_tables
from tests.checkpoint.test_gguf import Tiny
from tests.families import CASES, make_checkpoint

MEMORY = 100 << 20  # bytes that a refusal may allocate


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A reader that waits on a pipe or loops for hours fails instead of stopping the suite."""

    def stop(*_: object) -> None:
        pytest.fail("still busy after a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(action: Callable[[], object], *parts: str, error: type[PipelineError] = CheckpointError) -> None:
    """`action` must raise `error` in one short line that holds all `parts`, allocating little."""
    tracemalloc.start()
    try:
        with pytest.raises(error) as caught:
            action()
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 1200 and message.isprintable(), message


def safetensors(header: Any, data: int = 0) -> bytes:
    """A file of this header (an object, or its bytes) and `data` zero bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# --- headers


@pytest.mark.parametrize(
    ("header", "data", "parts"),
    [
        ({"a": entry(4, 8, [1])}, 8, ["before tensor 'a'", "belong to no tensor"]),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, 12, ["before tensor 'b'"]),
        ({"a": entry(0, 4, [1])}, 12, ["at the end", "belong to no tensor"]),
        ({}, 4, ["at the end"]),
        ({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}, 16, ["'a' and 'b' share bytes"]),
        ({"a": entry(0, 1 << 62, [1 << 60])}, 16, ["'a'", "of 16"]),
        ({"a": entry(1 << 62, (1 << 62) + 4, [1])}, 4, ["'a'", "of 4"]),
        ({"a": entry(0, 1 << 63, [1 << 61])}, 16, ["'a'", "malformed header entry"]),
        ({"a": entry(0, 0, [0, 1 << 62])}, 0, ["'a'", "positive sizes"]),
        ({"a": entry(0, 4, [1 << 32, 1 << 32])}, 4, ["'a'", "73,786,976,294,838,206,464 bytes"]),
        ({"a": entry(0, 4, [10**4000, 10**4000])}, 4, ["'a'", "malformed header entry"]),
        ({"a": entry(-(1 << 63), 4, [1])}, 4, ["'a'", "malformed header entry"]),
        ({"a": entry(0, 4, [1] * 9)}, 4, ["'a'", "at most 8"]),
        ({"a": entry(0, 4, [3] * 500_000)}, 4, ["'a'", "at most 8"]),
        ({"a": entry(0, 4, [1.0])}, 4, ["'a'", "malformed header entry"]),
        ({"a": entry(0, 4, [float("nan")])}, 4, ["'a'", "malformed header entry"]),
        ({"a": {**entry(0, 4, [1]), "data_offsets": [0, float("inf")]}}, 4, ["'a'", "malformed header entry"]),
        ({"a": {**entry(0, 4, [1]), "data_offsets": {"0": 0, "4": 4}}}, 4, ["'a'", "malformed header entry"]),
        ({"a": entry(0, 4, [1], "F32" * 10_000)}, 4, ["'a'", "dtype 'F32F32"]),
        ({"a" * 1_000_000: 1}, 0, ["tensor 'aaa"]),
        ({"a\n\x1b[2J": 1}, 0, ["tensor 'a\\n\\x1b[2J'"]),
        ({"a\ud800": 1}, 0, ["tensor 'a\\ud800'"]),
        (b'{"a": 1, "a": 2}', 0, ["'a' appears twice"]),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0, ["'dtype' appears twice"]),
        (b'{"a": ' + b"9" * 5_000 + b"}", 0, ["not valid JSON"]),
        (b'{"a": ' + b"[" * 900_000 + b"]" * 900_000 + b"}", 0, ["nested too deeply"]),
        (b'{"a": [' + b"[]," * 699_000 + b"[]]}", 0, ["'a'", "malformed header entry"]),
        (b'{"a": [' + b"{}," * 699_000 + b"{}]}", 0, ["'a'", "malformed header entry"]),
        (b'{"a": [' + b"[]," * 4_000_000 + b"[]]}", 0, [f"at most {MAX_JSON:,}"]),
        ("{}".encode("utf-16"), 0, ["not valid JSON"]),
    ],
)  # fmt: skip
def test_headers(header: Any, data: int, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(safetensors(header, data))
    refusal(lambda: Checkpoint(tmp_path), str(tmp_path / SINGLE), *parts)


def test_many_keys_of_which_the_last_is_given_twice(tmp_path: Path) -> None:
    """Looking for the first key with two places among all keys would take hours."""
    keys = ",".join(f'"{number}":0' for number in [*range(150_000), 149_999])
    (tmp_path / SINGLE).write_bytes(safetensors(f"{{{keys}}}".encode()))
    refusal(lambda: Checkpoint(tmp_path), "'149999' appears twice")


def test_a_sparse_file_with_a_giant_header(tmp_path: Path) -> None:
    with open(tmp_path / SINGLE, "wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)
    refusal(lambda: Checkpoint(tmp_path), f"header of {1 << 40:,} bytes announced")


# --- indexes


def two_shards(folder: Path) -> None:
    for number, name in enumerate(("one", "two")):
        (folder / f"{name}.safetensors").write_bytes(safetensors({f"t{number}": entry(0, 4, [1])}, 4))


ONE, TWO = "one.safetensors", "two.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "parts"),
    [
        ({"t0": TWO, "t1": ONE}, [ONE, "holds tensor 't0'", f"places in {TWO}"]),
        ({"t0": ONE, "t1": TWO, "t2": TWO}, ["1 of 3 tensors", f"'t2' in {TWO}"]),
        ({"t0": ONE, "t2": TWO}, [TWO, "holds tensor 't1'", "no shard"]),
        ({"t0": ONE, "t1": "three.safetensors"}, ["three.safetensors: missing shard"]),
        ({}, ["no usable weight_map"]),
        ({"t0": "x" * 256}, ["plain file name"]),
        ({"t0": "x" * 1_000_000}, ["plain file name"]),
        ({"t0": "ü" * 128}, ["plain file name"]),
        ({"t0": "one\n.safetensors"}, ["plain file name"]),
        ({"t0": "\ud800"}, ["plain file name"]),
        ({"t0": {"../": 1}}, ["plain file name"]),
        ({"t0": "."}, ["plain file name"]),
    ],
)
def test_indexes(weight_map: Any, parts: list[str], tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_index(tmp_path, weight_map)
    refusal(lambda: Checkpoint(tmp_path), str(tmp_path), *parts)


@pytest.mark.parametrize(
    "text",
    [
        b'{"weight_map": {"t0": "one.safetensors", "t0": "two.safetensors"}}',
        b'{"weight_map": [' + b"[]," * 4_000_000 + b"[]]}",
        b'{"weight_map": ' + b"[" * 900_000 + b"}",
        b'{"weight_map": {"a": ' + b"9" * 10_000 + b"}}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_index_files(text: bytes, tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX).write_bytes(text)
    refusal(lambda: Checkpoint(tmp_path), "not a safetensors index")
    refusal(lambda: complete.shard_names({ONE, TWO}, text, "here"), "here", INDEX, error=SourceError)


# --- files that are no files


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_outside(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(safetensors({"a": entry(0, 4, [1])}, 4))
    path.symlink_to(outside)


def as_loop(path: Path) -> None:
    path.symlink_to(path)


def as_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


NO_FILES = [as_pipe, as_device, as_outside, as_loop, as_dangling, Path.mkdir]


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_what_is_no_regular_file_is_not_opened(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / SINGLE).write_bytes(safetensors({"a": entry(0, 4, [1])}, 4))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    refusal(lambda: Checkpoint(folder), str(folder / name), "cannot be read")


@pytest.mark.parametrize("make", [as_pipe, as_device, as_loop, as_dangling, Path.mkdir])
def test_a_config_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    refusal(lambda: read_architecture(tmp_path / "config.json"), "config.json: cannot be read")


def local(folder: Path) -> ModelConfig:
    source = {"kind": "local", "path": str(folder)}
    return ModelConfig.model_validate(
        {"title": "Tiny", "source": source, "context": 128, "mmlu_mode": "letter", "gate_class": "x"}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", CASES["llama-tied"])


@pytest.mark.parametrize("name", ["LICENSE", "config.json", SINGLE, INDEX])
@pytest.mark.parametrize("make", NO_FILES)
def test_local_folders_give_away_nothing_outside(
    name: str, make: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    """A licence that links to a private key would be published with the model."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    store = Store(tmp_path / "store")
    if make is not as_outside and name in {"LICENSE", INDEX}:  # optional, so what is no file is as good as absent
        assert name not in [file.name for file in fetch_model("tiny", local(folder), store).files]
        return
    refusal(lambda: fetch_model("tiny", local(folder), store), str(folder), error=SourceError)
    assert not list(store.root.rglob("*.json"))


def test_the_hubs_own_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--tiny"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    folder.rename(cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert fetch_model("tiny", local(snapshot), Store(tmp_path / "store")).file(SINGLE)
    (tmp_path / "key").write_text("secret")
    (cache / "blobs" / "LICENSE").symlink_to(tmp_path / "key")
    (snapshot / "LICENSE").symlink_to("../../blobs/LICENSE")
    refusal(lambda: fetch_model("tiny", local(snapshot), Store(tmp_path / "store")), "LICENSE", error=SourceError)


@pytest.mark.parametrize("name", [b"LICENSE\xff", b"LICENSE\n0000  config.json", b"NOTICE\x1b[2J"])
def test_local_names_that_are_no_text(name: bytes, folder: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("x")
    refusal(lambda: fetch_model("tiny", local(folder), Store(tmp_path / "s")), "not plain text", error=SourceError)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"data_offsets": [0, Infinity]}}',
        b'{"a": {"data_offsets": [0, ' + b"9" * 4_300 + b"]}}",
        b'{"a": {"data_offsets": [0, true]}}',
        b'{"a": {"data_offsets": [0, "4"]}}',
        b'{"a": [' + b"[]," * 4_000_000 + b"[]]}",
        b'{"a": ' + b"[" * 900_000 + b"}",
    ],
)
def test_headers_at_download(header: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(safetensors(header))
    check = complete.check_file
    refusal(lambda: check(tmp_path / SINGLE, SINGLE, "here"), "here", SINGLE, error=SourceError)


# --- files that change after they were checked


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def swap_for(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        path.unlink()
        make(path)

    return swap


@pytest.mark.parametrize("change", [shrink, grow, Path.unlink, *map(swap_for, NO_FILES)])
def test_a_shard_that_changes_after_its_header_was_read(change: Callable[[Path], None], folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    name = list(checkpoint)[-1]
    checkpoint.rows(name)
    change(folder / SINGLE)
    refusal(lambda: checkpoint.rows(name), str(folder / SINGLE))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
def test_bfloat16_that_is_not_finite(bits: int, tmp_path: Path) -> None:
    values = np.full((3, 5), 0x7F7F, "<u2")  # the largest finite value
    values[2, 1] = bits
    header = safetensors({"w": entry(0, 30, [3, 5], "BF16")})
    (tmp_path / SINGLE).write_bytes(header + values.tobytes())
    checkpoint = Checkpoint(tmp_path)
    assert np.isfinite(checkpoint.rows("w", 0, 2)).all()
    refusal(lambda: checkpoint.rows("w", 1), "'w'", "1 of 10 values", "[2, 1]")


# --- config.json


LLAMA, LONGROPE = CASES["llama-tied"].config, CASES["phi3-longrope"].config


def longrope(**changes: Any) -> dict[str, Any]:
    return LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | changes}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (LLAMA | {"num_hidden_layers": 1_001}, "from 1 to 1,000"),
        (LLAMA | {"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
        (LLAMA | {"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        (LLAMA | {"hidden_size": 10**4000}, "hidden_size is 1000"),
        (LLAMA | {"head_dim": 1 << 20}, "head_dim is 1048576"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (LLAMA | {"num_attention_heads": 1 << 20}, "head_dim is 0"),
        (LLAMA | {"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        (LLAMA | {"vocab_size": -1}, "vocab_size is -1"),
        (LLAMA | {"vocab_size": "9" * 1_000_000}, "vocab_size is '999"),
        (LLAMA | {"max_position_embeddings": 1 << 31}, "max_position_embeddings is 2147483648"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta is 1000"),
        (LLAMA | {"rope_theta": 1e-300}, "rope_theta is 1e-300"),
        (LLAMA | {"rope_theta": 1e308}, "rope_theta is 1e+308"),
        (LLAMA | {"rope_theta": float("nan")}, "rope_theta is nan"),
        (LLAMA | {"rope_theta": True}, "rope_theta is True"),
        (LLAMA | {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        (LLAMA | {"partial_rotary_factor": 1.7e308}, "partial_rotary_factor is 1.7e+308"),
        (LLAMA | {"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0"),
        (LLAMA | {"partial_rotary_factor": 0.01}, "0 of 32 channels"),
        (LLAMA | {"partial_rotary_factor": 0.1}, "3 of 32 channels"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (CASES["qwen2"].config | {"sliding_window": 4, "use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        (LLAMA | {"rope_scaling": {"type": "x" * 1_000_000}}, "rope_scaling type 'xxx"),
        (LLAMA | {"rope_scaling": "x" * 1_000_000}, "rope_scaling is 'xxx"),
        (LLAMA | {"model_type": "llama" * 300_000}, "model_type 'llama"),
        (LLAMA | {"model_type": "gpt", "architectures": ["x" * 1_000_000]}, "architectures ['xxx"),
        (longrope(long_factor=[1.0] * 15), "long_factor must list 16 numbers"),
        (longrope(long_factor=[1.0] * 100_000), "long_factor must list 16 numbers"),
        (longrope(long_factor=[float("nan")] * 16), "long_factor is nan"),
        (longrope(long_factor=[1e-300] * 16), "long_factor is 1e-300"),
        (longrope(short_factor=[10**400] * 16), "short_factor is 1000"),
        (longrope(short_factor=[[1.0]] * 16), "short_factor is [1.0]"),
        (longrope(attention_factor=1e300), "attention_factor is 1e+300"),
    ],
)
def test_configs(config: dict[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal(lambda: read_architecture(tmp_path / "config.json"), str(tmp_path), part)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LLAMA)[:-1] + ', "hidden_size": 64}',
        '{"a": ' + "[" * 900_000,
        '{"a": [' + "[]," * 4_000_000 + "[]]}",
        '{"hidden_size": ' + "9" * 10_000 + "}",
        "\ufeff{}",
    ],
)
def test_config_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    refusal(lambda: read_architecture(tmp_path / "config.json"), "config.json: cannot be read as JSON")


# --- the graph


@pytest.mark.parametrize("case", CASES)
def test_graphs_refer_only_to_bytes_of_files_beside_them(case: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CASES[case])
    graph, rope = build_decoder(read_architecture(tmp_path / "config.json"), Checkpoint(tmp_path), 128)
    sizes = {SINGLE: (tmp_path / SINGLE).stat().st_size, "rope.data": len(rope)}
    found = 0
    for tensor in graph.graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if place:
            found += 1
            assert 0 <= int(place["offset"]) <= int(place["offset"]) + int(place["length"]) <= sizes[place["location"]]
    assert found > 20


# --- GGUF


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid GGUF of two layers."""
    return Tiny().write(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def patched(data: bytes, position: int, value: bytes) -> bytes:
    return data[:position] + value + data[position + len(value) :]


def tensor_field(path: Path, number: int, part: int) -> int:
    """Byte position of a part of a tensor's description: 2 dimension count, 3 dimensions, 4 type, 5 offset."""
    field = GGUFReader(path).tensors[number].field
    return field.offset + sum(int(before.nbytes) for before in field.parts[:part])


@pytest.mark.parametrize(
    ("number", "part", "value", "message"),
    [
        (1, 5, struct.pack("<Q", 0), "inside tensor 'token_embd.weight'"),
        (1, 5, struct.pack("<Q", (1 << 64) - 64), "inside the metadata"),
        (1, 5, struct.pack("<Q", (1 << 63)), "promises data up to byte"),
        (1, 5, struct.pack("<Q", 1 << 40), "promises data up to byte"),
        (1, 5, struct.pack("<Q", 33), "inside tensor 'token_embd.weight'"),
        (0, 2, struct.pack("<I", (1 << 32) - 1), "4,294,967,295 dimensions"),
        (0, 2, struct.pack("<I", 5), "5 dimensions"),
        (0, 3, struct.pack("<2Q", 1 << 32, 1 << 32), "not a readable GGUF"),
        (0, 3, struct.pack("<2Q", 1 << 62, 8), "not a readable GGUF"),
        (0, 3, struct.pack("<2Q", 64, 0), "shape (0, 64)"),
        (0, 3, struct.pack("<2Q", 32, 268), "shape (268, 32)"),
        (0, 4, struct.pack("<I", 999), "not a readable GGUF"),
    ],
)
def test_gguf_tensors(number: int, part: int, value: bytes, message: str, tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny)
    path.write_bytes(patched(tiny, tensor_field(path, number, part), value))
    refusal(lambda: unpack(path, tmp_path), "bad.gguf", message)
    assert not (tmp_path / SINGLE).exists()


def gguf_bytes(*pairs: bytes, pair_count: int | None = None, tensors: int = 0) -> bytes:
    """A GGUF of key-value pairs only."""
    count = len(pairs) if pair_count is None else pair_count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(pairs)


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_pair(key: bytes, kind: int, value: bytes) -> bytes:
    return gguf_text(key) + struct.pack("<I", kind) + value


ARRAY, UINT8, STRING = 9, 0, 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf_bytes(pair_count=(1 << 64) - 1), "promises data"),
        (gguf_bytes(tensors=(1 << 64) - 1), "promises data"),
        (gguf_bytes(gguf_pair(b"k", ARRAY, struct.pack("<IQ", UINT8, 1 << 63))), "promises data"),
        (gguf_bytes(gguf_pair(b"k", ARRAY, struct.pack("<IQ", UINT8, 1 << 20) + bytes(1 << 20))), "more than 9,999"),
        (gguf_bytes(gguf_pair(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 20_000)), "not a readable GGUF"),
        (gguf_bytes(gguf_pair(b"k", STRING, struct.pack("<Q", (1 << 64) - 1))), "promises data"),
        (gguf_bytes(*[gguf_pair(b"k" * 1_000_000, UINT8, b"\0")] * 2), "Duplicate kkk"),
        (gguf_bytes(gguf_pair(b"general.architecture", STRING, gguf_text(b"x" * 1_000_000))), "architecture 'xxx"),
        (gguf_bytes(gguf_pair(b"general.architecture", STRING, gguf_text(b"\xff"))), "cannot be decoded"),
        (gguf_bytes(gguf_pair(b"\xff", UINT8, b"\0")), "not a readable GGUF"),
    ],
)
def test_gguf_metadata(data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_MAX_READS", 9_999)  # the real bound takes long under tracemalloc
    (tmp_path / "bad.gguf").write_bytes(data)
    refusal(lambda: unpack(tmp_path / "bad.gguf", tmp_path), "bad.gguf", message)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.block_count", (1 << 32) - 1, "num_hidden_layers is"),
        ("llama.block_count", 1_001, "num_hidden_layers is"),
        ("llama.embedding_length", (1 << 32) - 1, "hidden_size is"),
        ("llama.attention.key_length", 1 << 20, "head_dim is 1048576"),
        ("llama.context_length", (1 << 32) - 1, "max_position_embeddings is"),
        ("llama.rope.freq_base", float("inf"), "rope_theta is inf"),
    ],
)
def test_gguf_sizes(key: str, value: Any, named: str, tmp_path: Path) -> None:
    model = Tiny()
    model.values[key] = value
    path = model.write(tmp_path / "bad.gguf")
    refusal(lambda: unpack(path, tmp_path), "bad.gguf", named)


@pytest.mark.parametrize("make", NO_FILES)
def test_a_gguf_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / "bad.gguf")
    refusal(lambda: unpack(folder / "bad.gguf", folder), "bad.gguf is not a readable GGUF")


# --- fuzzing: any change gives a readable checkpoint or one of our errors

ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2, 63, 1 << 31, 1 << 63, 10**400, 0.5, float("nan"), float("inf"), 1e308, "", "F16", "..",
     "model.safetensors", "a\n\ud800", [], [0], [1, 2], [1 << 62] * 3, {}, {"type": "longrope"}, {"a": 1}]
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *places(item)]]


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> bytes:
    """JSON with a few values replaced, removed or renamed, and then perhaps a few bytes changed."""
    value = deepcopy(original)
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(places(value) or [({0: 0}, 0)]))
        action = draw(st.sampled_from(["replace", "remove", "rename"]))
        if action == "replace":
            container[key] = deepcopy(draw(ODD))
        elif action == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.text(max_size=3))] = container.pop(key)
    raw = bytearray(json.dumps(value).encode())
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


def try_checkpoint(folder: Path) -> None:
    """Read every tensor of a folder, or be refused."""
    try:
        checkpoint = Checkpoint(folder)
        read = sum(checkpoint.rows(name).size for name, ref in checkpoint.items() if ref.shape)
        assert read <= sum(ref.elements for ref in checkpoint.values())
    except PipelineError as error:
        assert str(error).isprintable()


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": entry(0, 16, [2, 2]),
    "b": entry(16, 22, [3], "F16"),
    "c": entry(22, 26, [1, 2], "BF16"),
}
FUZZ = settings(max_examples=100)


@FUZZ
@given(mutated(HEADER))
def test_fuzzed_headers(header: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / SINGLE
        path.write_bytes(safetensors(header, 26))
        try_checkpoint(path.parent)
        try:
            read_header(path)
        except PipelineError:
            return
        complete.check_file(path, SINGLE, "here")  # what the reader accepts, the download accepts


@FUZZ
@given(mutated({"metadata": {"total_size": 8}, "weight_map": {"t0": ONE, "t1": TWO}}))
def test_fuzzed_indexes(index: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        two_shards(Path(name))
        (Path(name) / INDEX).write_bytes(index)
        try_checkpoint(Path(name))
        try:
            assert set(complete.shard_names({ONE, TWO, "config.json"}, index, "here")) <= {ONE, TWO}
        except PipelineError as error:
            assert str(error).isprintable()


@FUZZ
@given(st.sampled_from(sorted(CASES)).flatmap(lambda case: mutated(CASES[case].config)))
def test_fuzzed_configs(config: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.json"
        path.write_bytes(config)
        try:
            architecture = read_architecture(path)
        except PipelineError as error:
            assert str(error).isprintable()
            return
        assert len(architecture.expected_tensors()) < 20_000 and architecture.parameters > 0
        for factor in (architecture.rope.short_factor, architecture.rope.long_factor):
            assert all(np.isfinite(table).all() for table in rope_tables(architecture.rope, 16, factor))


def test_fuzzed_gguf(tiny: bytes, tmp_path: Path) -> None:
    """Seeded changes of one to eight bytes among the metadata and the tensors' descriptions."""
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(tiny)
    end, rng = GGUFReader(path).data_offset, random.Random(0)
    values = [struct.pack("<Q", value) for value in (0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)]
    refused = 0
    for _ in range(100):
        position = rng.randrange(end)
        value = rng.choice([*values, rng.randbytes(8)])[: rng.choice([1, 4, 8])]
        path.write_bytes(patched(tiny, position, value))
        try:
            unpack(path, tmp_path)
            try_checkpoint(tmp_path)
        except PipelineError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused > 40
