"""A checkpoint: safetensors files opened by name, dtype, shape and byte range, memory-mapped, never read whole.

The files are untrusted. Every header is checked before anything is allocated: its length, its JSON, each tensor's
dtype, shape and byte range (inside the file, exactly as long as the shape says, overlapping no other), and every file
name in an index (a plain name inside the folder).

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import CheckpointError

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: `length` bytes at `offset` of the file named `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _check_name(name: Any, where: Path) -> str:
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in {".", ".."} or "\0" in name:
        raise CheckpointError(
            f"{where}: names the file {name!r}, which is not a plain file name inside the folder. "
            f"The checkpoint is malformed or hostile; download it again from its publisher."
        )
    return name


def read_header(path: Path) -> dict[str, TensorRef]:
    """Parse and check the header of one safetensors file.

    Raises:
        CheckpointError: naming the file, the tensor and the numbers that disagree.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: {size:,} bytes, header of {length:,} bytes announced. "
                f"Delete it and download again."
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is not valid JSON ({error}). Delete the file and download it again."
        ) from None
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{path}: the safetensors header is not a JSON object. Delete the file, download it again."
        )
    entries.pop("__metadata__", None)
    data_start, data_size = 8 + length, size - 8 - length
    refs = {name: _parse_entry(name, entry, path, data_start, data_size) for name, entry in entries.items()}
    _check_overlap(refs.values(), path)
    return refs


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(
            f"{path}: {twice!r} appears twice in the header; which one is meant cannot be known. Download it again."
        )
    return dict(pairs)


def _parse_entry(name: str, entry: Any, path: Path, data_start: int, data_size: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError
        known = dtype in ITEM_BYTES
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {name!r} has a malformed header entry: {reprlib.repr(entry)}. It needs dtype, shape and "
            f"data_offsets [begin, end]. Delete the file and download it again."
        ) from None
    if not known:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype}; supported are {', '.join(ITEM_BYTES)}. "
            f"An already quantized checkpoint cannot be a source: use the original weights."
        )
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed or end > data_size:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {needed:,} bytes, the header "
            f"gives bytes {begin:,} to {end:,} of {data_size:,}. The file is truncated or malformed; download it again."
        )
    return TensorRef(name, dtype, shape, path.name, data_start + begin, needed)


def _check_overlap(refs: Any, path: Path) -> None:
    previous = None
    for ref in sorted((ref for ref in refs if ref.length), key=lambda ref: ref.offset):
        if previous and ref.offset < previous.offset + previous.length:
            raise CheckpointError(
                f"{path}: tensors {previous.name!r} and {ref.name!r} share bytes: the first ends at byte "
                f"{previous.offset + previous.length:,}, the second starts at {ref.offset:,}. The file is malformed; "
                f"download it again."
            )
        previous = ref


class Checkpoint(Mapping[str, TensorRef]):
    """All tensors of a checkpoint folder by name; values are read on demand.

    `Checkpoint(folder)` reads headers only. Files are those named by `model.safetensors.index.json`, or the single
    `model.safetensors`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._refs: dict[str, TensorRef] = {}
        for name in self._shards():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing shard. Run the download stage again.")
            for key, ref in read_header(path).items():
                if key in self._refs:
                    raise CheckpointError(
                        f"{folder}: tensor {key!r} is in {self._refs[key].file} and again in {name}; which one is "
                        f"meant cannot be known. Remove the shard that does not belong to this checkpoint."
                    )
                self._refs[key] = ref

    def _shards(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return ["model.safetensors"]
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            raise CheckpointError(
                f"{index}: not a safetensors index (no weight_map). Delete it and download the checkpoint again."
            ) from None
        return sorted({_check_name(name, index) for name in names})

    def __getitem__(self, name: str) -> TensorRef:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor as a new float32 array; only those bytes are touched.

        Raises:
            CheckpointError: a value is NaN or infinite (tensor, place and count are named).
        """
        ref = self._refs[name]
        raw = np.memmap(
            self.folder / ref.file,
            dtype={"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[ref.dtype],
            mode="r",
            offset=ref.offset,
            shape=ref.shape,
        )[start:stop]
        if ref.dtype == "BF16":
            values = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            values = raw.astype(np.float32)
        bad = ~np.isfinite(values)
        if bad.any():
            first = [int(index[0]) for index in np.nonzero(bad)]
            first[0] += start
            raise CheckpointError(
                f"tensor {name!r} in {self.folder / ref.file}: {int(bad.sum()):,} of {values.size:,} values are NaN or "
                f"infinite, the first at {first}. Quantizing it would ship garbage: use an intact checkpoint."
            )
        return values

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.length for ref in self._refs.values())
