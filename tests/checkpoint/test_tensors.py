"""Safetensors files are read in place, and a damaged or hostile one is refused before anything is allocated."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.checkpoint.tensors import Checkpoint, read_header
from pipeline.errors import CheckpointError


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_values_of_every_dtype(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    bfloat16 = (values.view(np.uint32) >> 16).astype("<u2")
    data = values.tobytes() + values.astype("<f2").tobytes() + bfloat16.tobytes()
    header = {
        "__metadata__": {"format": "pt"},
        "single": entry(0, 84, [7, 3]),
        "half": entry(84, 126, [7, 3], "F16"),
        "brain": entry(126, 168, [7, 3], "BF16"),
    }
    write_raw(tmp_path / "model.safetensors", header, data)
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint) == ["single", "half", "brain"]
    assert checkpoint.weight_bytes == 168
    assert checkpoint["half"].elements == 21
    np.testing.assert_array_equal(checkpoint.rows("single"), values)
    np.testing.assert_array_equal(checkpoint.rows("half", 2, 5), values.astype(np.float16).astype(np.float32)[2:5])
    want = (bfloat16.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(checkpoint.rows("brain", 6), want[6:])


def test_references_point_at_the_bytes_in_the_file(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name, ref in Checkpoint(tmp_path).items():
        assert raw[ref.offset : ref.offset + ref.length] == tensors[name].tobytes()
        assert ref.file == "model.safetensors"


def test_shards_named_by_the_index(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 2), np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    assert {name: ref.file for name, ref in checkpoint.items()} == index["weight_map"]
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors: missing shard" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b", "..", "", "a\0b", 7, ["a"], None])
def test_index_may_not_leave_the_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    message = refusal(tmp_path)
    assert repr(name) in message
    assert "plain file name" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": ["a"]}', "[" * 100_000, "\xff"])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert "not a safetensors index" in refusal(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in ("one", "two"):
        save_file({"a": np.zeros((2, 2), np.float32)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "two.safetensors: holds tensor 'a', which" in (message := refusal(tmp_path))
    assert "places in one.safetensors" in message


GOOD = entry(0, 16, [2, 2])


@pytest.mark.parametrize(
    ("header", "size", "parts"),
    [
        ({"a": GOOD, "b": entry(8, 24, [2, 2])}, 24, ["'a' and 'b' share bytes"]),
        ({"a": entry(0, 16, [2, 3])}, 16, ["'a'", "[2, 3]", "24 bytes", "0 to 16 of 16"]),
        ({"a": GOOD}, 15, ["'a'", "0 to 16 of 15", "truncated"]),
        ({"a": entry(16, 0, [2, 2])}, 16, ["'a'", "16 to 0"]),
        ({"a": entry(0, 16, [1 << 62, 1 << 62])}, 16, ["'a'"]),
        ({"a": entry(-16, 0, [2, 2])}, 16, ["'a'", "malformed header entry"]),
        ({"a": entry(0, 16, [2.0, 2])}, 16, ["'a'", "malformed header entry"]),  # type: ignore[list-item]
        ({"a": entry(0, 16, [True, 4])}, 16, ["'a'", "malformed header entry"]),
        ({"a": {**GOOD, "data_offsets": [0]}}, 16, ["'a'", "malformed header entry"]),
        ({"a": {**GOOD, "dtype": ["F32"]}}, 16, ["'a'", "malformed header entry"]),
        ({"a": {**GOOD, "shape": "22"}}, 16, ["'a'", "malformed header entry"]),
        ({"a": {"dtype": "F32"}}, 16, ["'a'", "malformed header entry"]),
        ({"a": "x" * 100_000}, 16, ["'a'", "malformed header entry"]),
        ({"a": entry(0, 4, [2, 2], "I8")}, 4, ["'a'", "I8", "original weights"]),
        (b'{"a": 1, "a": 2}', 0, ["'a' appears twice"]),
        (b'["a"]', 0, ["not a JSON object"]),
        (b"7", 0, ["not a JSON object"]),
        (b"{", 0, ["not valid JSON"]),
        (b"\xff\xfe", 0, ["not valid JSON"]),
        (b"[" * 100_000, 0, ["not valid JSON"]),
        (b'{"a": ' + b"9" * 5_000 + b"}", 0, ["not valid JSON"]),
    ],
)
def test_bad_headers(header: Any, size: int, parts: list[str], tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(size))
    message = refusal(tmp_path)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 101_000_000, 600])
def test_absurd_header_lengths_allocate_nothing(length: int, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": GOOD}, b"", length)
    with pytest.raises(CheckpointError, match=f"header of {length:,} bytes announced"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\x01\x02", b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_are_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "not a safetensors file, or truncated" in refusal(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert "missing shard" in refusal(tmp_path)


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, np.float32), (np.inf, np.float32), (-np.inf, np.float16)])
def test_values_that_are_not_finite(bad: float, dtype: type, tmp_path: Path) -> None:
    values = np.zeros((6, 4), dtype)
    values[5, 2] = values[5, 3] = bad
    save_file({"w": values}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.rows("w", 0, 5).any()
    with pytest.raises(CheckpointError, match=r"'w' in .*model.safetensors: 2 of 8 values .* first at \[5, 2\]"):
        checkpoint.rows("w", 4, 6)


@pytest.mark.parametrize(("name", "shift", "more"), [("b", 0, 0), ("a", 4, 0), ("a", 0, 4)])
def test_a_graph_of_another_checkpoint_is_told_to_be_exported_again(
    tmp_path: Path, name: str, shift: int, more: int
) -> None:
    save_file({"a": np.ones(6, np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    ref = checkpoint["a"]
    checkpoint.check("a", ref.offset, ref.length)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' .*exported from another one. Run the export stage"):
        checkpoint.check(name, ref.offset + shift, ref.length + more)
