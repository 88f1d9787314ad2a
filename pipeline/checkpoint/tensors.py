"""A checkpoint: safetensors files opened by name, dtype, shape and byte range, memory-mapped, never read whole.

The files are untrusted. Every header is checked before anything is allocated: its length, its JSON, each tensor's
dtype, shape and byte range (exactly as long as the shape says, together the whole file without gap or overlap), every
file name in an index (a regular file of the folder itself, no link), and that index and headers name the same tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint.chunks import AGAIN, Chunks
from pipeline.checkpoint.untrusted import MAX_JSON, open_regular, parse_json, read_json, shown
from pipeline.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
ITEM_BYTES = {dtype: np.dtype(stored).itemsize for dtype, stored in _STORED.items()}
_MAX_DIMENSIONS = 8
_MAX_NAME = 255  # bytes; what file systems allow
_OTHERS = "Index and shards belong to different checkpoints: download all of them again."


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


def read_header(path: Path, chunks: Chunks | None = None, *, follow: bool = False) -> dict[str, TensorRef]:
    """Parse and check the header of one safetensors file.

    Args:
        chunks: its list, where it has one.
        follow: whether `path` may be a symbolic link.

    Raises:
        CheckpointError: naming the file, the tensor and the numbers that disagree.
    """
    try:
        with open_regular(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_JSON):
                sizes = f"{size:,} bytes, header of {length:,} bytes announced (at most {MAX_JSON:,} are read)"
                raise _malformed(path, f"not a safetensors file, or truncated: {sizes}")
            header = file.read(length)
            if chunks and (place := chunks.damage(file.fileno(), 0, memoryview(prefix + header))):
                raise _damaged(chunks, place, "the header")
            entries = parse_json(header)
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise _malformed(path, f"the safetensors header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _malformed(path, "the safetensors header is not a JSON object")
    entries.pop("__metadata__", None)
    data_start, data_size = 8 + length, size - 8 - length
    refs = {name: _parse_entry(name, entry, path, data_start, data_size) for name, entry in entries.items()}
    _check_layout(refs.values(), path, data_start, size)
    return refs


def _malformed(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}. Delete the file and download it again.")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = "missing shard" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return CheckpointError(f"{path}: {reason}. Run the download stage again.")


def _parse_entry(name: str, entry: Any, path: Path, data_start: int, data_size: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end))
        if not sound or not all(shape) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError
        known = dtype in ITEM_BYTES
    except (KeyError, TypeError, ValueError):
        what = f"tensor {shown(name)} has a malformed header entry: {shown(entry)}"
        needed = f"dtype, shape (at most {_MAX_DIMENSIONS} positive sizes) and data_offsets [begin, end]"
        raise _malformed(path, f"{what}. It needs {needed}") from None
    if not known:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has dtype {shown(dtype)}; supported are {', '.join(ITEM_BYTES)}. "
            f"An already quantized checkpoint cannot be a source: use the original weights."
        )
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed or end > data_size:
        given = f"the header gives bytes {begin:,} to {end:,} of {data_size:,}: it is truncated or malformed"
        raise _malformed(path, f"tensor {shown(name)}, {dtype} {list(shape)}, needs {needed:,} bytes, {given}")
    return TensorRef(name, dtype, shape, path.name, data_start + begin, needed)


def _check_layout(refs: Iterable[TensorRef], path: Path, start: int, size: int) -> None:
    """Refuse tensors that share bytes, and bytes between `start` and `size` that belong to no tensor."""
    places = sorted((ref.offset, ref.length, shown(ref.name)) for ref in refs)
    previous, position = "", start
    for offset, length, name in [*places, (size, 0, "")]:
        if offset < position:
            ends = f"the first ends at byte {position:,}, the second starts at {offset:,}"
            raise _malformed(path, f"tensors {previous} and {name} share bytes: {ends}")
        if offset > position:
            gap = f"bytes {position:,} to {offset:,} {f'before tensor {name}' if name else 'at the end'}"
            raise _malformed(path, f"{gap} belong to no tensor of its header, and the format allows no gaps")
        previous, position = name, offset + length


def _damaged(chunks: Chunks, place: range, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: bytes {place.start:,} to {place.stop:,} of {chunks.path} are not those that were downloaded. Blob "
        f"{chunks.sha256} of the store is damaged, or something wrote to it. {AGAIN}"
    )


class Checkpoint(dict[str, TensorRef]):
    """All tensors of a checkpoint folder by name; values are read on demand.

    `Checkpoint(folder)` reads headers only. What is read is compared with the digests that were recorded at download
    where a list of them lies beside the file, as in every folder that comes out of the store. Files are those named by
    `model.safetensors.index.json`, or the single `model.safetensors`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._sizes: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._chunks: dict[str, Chunks | None] = {}
        index = _read_index(folder / INDEX)
        for name in sorted(set(index.values())) or [SINGLE]:
            self._chunks[name] = chunks = Chunks.beside(folder / name)
            refs = read_header(folder / name, chunks)
            if strays := [key for key in refs if index and index.get(key) != name]:
                held = f"holds tensor {shown(strays[0])}, which {INDEX} places in {index.get(strays[0], 'no shard')}"
                raise CheckpointError(f"{folder / name}: {held}. {_OTHERS}")
            self.update(refs)
            self._sizes[name] = max((ref.offset + ref.length for ref in refs.values()), default=0)
        if missing := [key for key in index if key not in self]:
            first = f"the first is {shown(missing[0])} in {index[missing[0]]}"
            lost = f"places {len(missing)} of {len(index)} tensors in shards that do not hold them, {first}"
            raise CheckpointError(f"{folder / INDEX}: {lost}. {_OTHERS}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)  # where it is unpickled, headers are read again

    @contextmanager
    def _open(self, name: str) -> Iterator[FileIO]:
        """The file that holds a tensor, which must be as long as when its header was read; its failures named."""
        path = self.folder / self[name].file
        try:
            with open_regular(path) as file:
                size, expected = os.fstat(file.fileno()).st_size, self._sizes[path.name]
                if size != expected:
                    changed = f"{path} has {size:,} bytes, and had {expected:,} when its header was read"
                    remedy = "Run the download stage again, and let nothing else write there."
                    raise CheckpointError(f"tensor {name!r}: {changed}. {remedy}")
                yield file
        except OSError as error:
            raise _unreadable(path, error) from None

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Ask the system to read rows [start, stop) ahead, where it takes such advice."""
        if hasattr(os, "posix_fadvise"):
            ref = self[name]
            row = ref.length // ref.shape[0]
            with self._open(name) as file:
                advice = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(file.fileno(), ref.offset + start * row, (stop - start) * row, advice)

    def rows(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor as a new float32 array, or in `out`; only those bytes are read, none stay
        mapped.

        Raises:
            CheckpointError: a value is NaN or infinite (tensor, place and count are named), the file became shorter, or
                its bytes are not those that were downloaded.
        """
        ref = self[name]
        raw = self._read(name, start, ref.shape[0] if stop is None else stop)
        if ref.dtype == "BF16":
            from pipeline.checkpoint.widen import widen_bfloat16

            values = np.empty(raw.shape, np.float32) if out is None else out
            bad = widen_bfloat16(raw.reshape(-1), values.view(np.uint32).reshape(-1))
        else:
            values = raw.astype(np.float32, copy=False)
            bad = not np.isfinite(values).all()
            if out is not None:
                out[...] = values
        if bad:
            places = np.argwhere(~np.isfinite(values))
            first = [int(places[0][0]) + start, *map(int, places[0][1:])]
            raise CheckpointError(
                f"tensor {name!r} in {self.folder / ref.file}: {len(places):,} of {values.size:,} values are NaN or "
                f"infinite, the first at {first}. Quantizing it would ship garbage: use an intact checkpoint."
            )
        return values

    def require_finite(self) -> None:
        """Read every tensor once, some megabytes at a time. Raises CheckpointError as `rows` does, at the first that is
        not finite: found here, not as logits that overflow hours later."""
        for name, ref in self.items():
            step = max(1, (8 << 20) * ref.shape[0] // ref.length) if ref.shape else 1
            for start in range(0, ref.shape[0] if ref.shape else 0, step):
                self.rows(name, start, min(start + step, ref.shape[0]))

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        ref, chunks = self[name], self._chunks[self[name].file]
        row = ref.length // ref.shape[0]
        shape, offset = (stop - start, *ref.shape[1:]), ref.offset + start * row
        if mapped := self._maps.get(ref.file):
            return np.frombuffer(mapped, _STORED[ref.dtype], math.prod(shape), offset).reshape(shape)
        with self._open(name) as file:
            raw = np.fromfile(file, _STORED[ref.dtype], math.prod(shape), offset=offset)
            if raw.size and chunks and (place := chunks.damage(file.fileno(), offset, raw.view(np.uint8).data)):
                raise self._damaged(name, chunks, place)
        return raw.reshape(shape)

    def check(self, name: str, offset: int, length: int) -> None:
        """Compare bytes that a runtime will map: those of a tensor, which a graph places at `offset` of its file.

        Raises:
            CheckpointError: the tensor lies elsewhere, or its bytes are not those that were downloaded.
        """
        ref = self.get(name)
        if ref is None or ref.offset != offset or ref.length < length:
            raise CheckpointError(
                f"{self.folder}: the graph places tensor {name!r} in bytes {offset:,} to {offset + length:,}, where "
                f"this checkpoint does not hold it: it was exported from another one. Run the export stage again."
            )
        chunks = self._chunks[ref.file]
        if chunks and (place := chunks.damage_in(offset, length)):
            raise self._damaged(name, chunks, place)

    def _damaged(self, name: str, chunks: Chunks, place: range) -> CheckpointError:
        """Which of the tensors that share a chunk is the wrong one cannot be known: all are named."""
        others = [
            shown(ref.name)
            for ref in self.values()
            if ref.file == chunks.path.name and ref.offset < place.stop and ref.offset + ref.length > place.start
            if ref.name != name
        ]
        listed = f" (or {', '.join(others[:_MAX_DIMENSIONS])} there)" if others else ""
        return _damaged(chunks, place, f"tensor {name!r}{listed}")

    def trust(self) -> None:
        """Map the files, and compare what is read no more: as a runtime does with weights that it has checked."""
        for name in self._sizes.keys() - self._maps.keys():
            with open(self.folder / name, "rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.length for ref in self.values())


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → shard; nothing when there is no index."""
    try:
        weight_map = read_json(path)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("weight_map is not a filled JSON object")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _malformed(path, f"not a safetensors index (no usable weight_map: {error})") from None
    for name in weight_map.values():
        plain = isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & {"/", "\\"}
        if not plain or not name.isprintable() or len(name.encode()) > _MAX_NAME:
            what = f"names the file {shown(name)}, which is not a plain file name inside the folder"
            raise CheckpointError(f"{path}: {what}. It is malformed or hostile; download it from its publisher.")
    return weight_map
