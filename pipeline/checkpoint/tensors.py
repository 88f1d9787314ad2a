"""A checkpoint: safetensors files opened by name, dtype, shape and byte range, memory-mapped, never read whole.

The files are untrusted. Every header is checked before anything is allocated: its length, its JSON, each tensor's
dtype, shape and byte range (exactly as long as the shape says, together the whole file without gap or overlap), every
file name in an index (a regular file of the folder itself, no link), and that index and headers name the same tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
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
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_DIMENSIONS = 8
_MAX_NAME = 255  # bytes; what file systems allow


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
    plain = isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & {"/", "\\"}
    if not plain or not name.isprintable() or len(name.encode()) > _MAX_NAME:
        raise CheckpointError(
            f"{where}: names the file {shown(name)}, which is not a plain file name inside the folder. "
            f"The checkpoint is malformed or hostile; download it again from its publisher."
        )
    return name


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
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: {size:,} bytes, header of {length:,} bytes "
                    f"announced (at most {MAX_JSON:,} are read). Delete it and download again."
                )
            header = file.read(length)
            if chunks and (place := chunks.damage(file.fileno(), 0, memoryview(prefix + header))):
                raise _damaged(chunks, place, "the header")
            entries = parse_json(header)
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
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
    _check_layout(refs.values(), path, data_start, size)
    return refs


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
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has a malformed header entry: {shown(entry)}. It needs dtype, shape (at "
            f"most {_MAX_DIMENSIONS} positive sizes) and data_offsets [begin, end]. Delete the file and download it "
            f"again."
        ) from None
    if not known:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has dtype {shown(dtype)}; supported are {', '.join(ITEM_BYTES)}. "
            f"An already quantized checkpoint cannot be a source: use the original weights."
        )
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed or end > data_size:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {list(shape)} and dtype {dtype} needs {needed:,} bytes, the header "
            f"gives bytes {begin:,} to {end:,} of {data_size:,}. The file is truncated or malformed; download it again."
        )
    return TensorRef(name, dtype, shape, path.name, data_start + begin, needed)


def _check_layout(refs: Iterable[TensorRef], path: Path, start: int, size: int) -> None:
    """Refuse tensors that share bytes, and bytes between `start` and `size` that belong to no tensor."""
    previous, position = None, start
    for ref in sorted(refs, key=lambda ref: ref.offset):
        if previous and ref.offset < position:
            raise CheckpointError(
                f"{path}: tensors {shown(previous.name)} and {shown(ref.name)} share bytes: the first ends at byte "
                f"{position:,}, the second starts at {ref.offset:,}. The file is malformed; download it again."
            )
        if ref.offset > position:
            raise _unclaimed(path, position, ref.offset, f"before tensor {shown(ref.name)}")
        previous, position = ref, ref.offset + ref.length
    if position != size:
        raise _unclaimed(path, position, size, "at the end")


def _unclaimed(path: Path, begin: int, end: int, where: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: bytes {begin:,} to {end:,} {where} belong to no tensor of its header. The format allows no gaps: "
        f"the file is malformed, or was changed; download it again."
    )


def _damaged(chunks: Chunks, place: range, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: bytes {place.start:,} to {place.stop:,} of {chunks.path} are not those that were downloaded. Blob "
        f"{chunks.sha256} of the store is damaged, or something wrote to it. {AGAIN}"
    )


class Checkpoint(Mapping[str, TensorRef]):
    """All tensors of a checkpoint folder by name; values are read on demand.

    `Checkpoint(folder)` reads headers only. What is read is compared with the digests that were recorded at download
    where a list of them lies beside the file, as in every folder that comes out of the store. Files are those named by
    `model.safetensors.index.json`, or the single `model.safetensors`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._refs: dict[str, TensorRef] = {}
        self._sizes: dict[str, int] = {}
        self._chunks: dict[str, Chunks | None] = {}
        index = self._read_index()
        for name in sorted(set(index.values())) if index else [SINGLE]:
            self._add_shard(name, index)
        if index and (missing := [key for key in index if key not in self._refs]):
            raise CheckpointError(
                f"{folder / INDEX}: places {len(missing)} of {len(index)} tensors in shards that do not hold them, the "
                f"first is {shown(missing[0])} in {index[missing[0]]}. Index and shards belong to different "
                f"checkpoints: download all of them again."
            )

    def _add_shard(self, name: str, index: dict[str, str] | None) -> None:
        self._chunks[name] = chunks = Chunks.beside(self.folder / name)
        refs = read_header(self.folder / name, chunks)
        for key, ref in refs.items():
            if key in self._refs:
                raise CheckpointError(
                    f"{self.folder}: tensor {shown(key)} is in {self._refs[key].file} and again in {name}; which one "
                    f"is meant cannot be known. Remove the shard that does not belong to this checkpoint."
                )
            if index and index.get(key) != name:
                raise CheckpointError(
                    f"{self.folder / name}: holds tensor {shown(key)}, which {INDEX} places in "
                    f"{index.get(key, 'no shard')}. Index and shards belong to different checkpoints: download all of "
                    f"them again."
                )
            self._refs[key] = ref
        self._sizes[name] = max((ref.offset + ref.length for ref in refs.values()), default=0)

    def _read_index(self) -> dict[str, str] | None:
        """Tensor → shard; None when there is no index."""
        path = self.folder / INDEX
        try:
            weight_map = read_json(path)["weight_map"]
            if not isinstance(weight_map, dict) or not weight_map:
                raise TypeError("weight_map is not a filled JSON object")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a safetensors index (no usable weight_map: {error}). Delete it and download "
                f"the checkpoint again."
            ) from None
        return {key: _check_name(name, path) for key, name in weight_map.items()}

    def __getitem__(self, name: str) -> TensorRef:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    @contextmanager
    def _open(self, name: str) -> Iterator[FileIO]:
        """The file that holds a tensor, which must be as long as when its header was read; its failures named."""
        path = self.folder / self._refs[name].file
        try:
            with open_regular(path) as file:
                size, expected = os.fstat(file.fileno()).st_size, self._sizes[path.name]
                if size != expected:
                    raise CheckpointError(
                        f"tensor {name!r}: {path} has {size:,} bytes, and had {expected:,} when its header was read. "
                        f"Run the download stage again, and let nothing else write there."
                    )
                yield file
        except OSError as error:
            raise _unreadable(path, error) from None

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Ask the system to read rows [start, stop) ahead, where it takes such advice."""
        if hasattr(os, "posix_fadvise"):
            ref, row = self._refs[name], self._row_bytes(name)
            with self._open(name) as file:
                advice = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(file.fileno(), ref.offset + start * row, (stop - start) * row, advice)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor as a new float32 array; only those bytes are read, none stay mapped.

        Raises:
            CheckpointError: a value is NaN or infinite (tensor, place and count are named), the file became shorter, or
                its bytes are not those that were downloaded.
        """
        ref = self._refs[name]
        raw = self._read(name, start, ref.shape[0] if stop is None else stop)
        if ref.dtype == "BF16":
            from pipeline.checkpoint.widen import widen_bfloat16

            values = np.empty(raw.shape, np.float32)
            bad = widen_bfloat16(raw.reshape(-1), values.view(np.uint32).reshape(-1))
        else:
            values = raw.astype(np.float32, copy=False)
            bad = not np.isfinite(values).all()
        if bad:
            self._refuse(name, values, start)
        return values

    def _row_bytes(self, name: str) -> int:
        ref = self._refs[name]
        return math.prod(ref.shape[1:]) * ITEM_BYTES[ref.dtype]

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        ref, row = self._refs[name], self._row_bytes(name)
        dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[ref.dtype]
        raw = np.empty((stop - start, *ref.shape[1:]), dtype)
        data = left = memoryview(raw.reshape(-1)).cast("B") if raw.size else memoryview(b"")
        with self._open(name) as file:
            file.seek(ref.offset + start * row)
            while left:
                if not (count := file.readinto(left)):
                    raise CheckpointError(
                        f"tensor {name!r}: {self.folder / ref.file} ends {len(left):,} bytes before row {stop:,} does. "
                        f"The file changed after it was opened: run the download stage again."
                    )
                left = left[count:]
            chunks = self._chunks[ref.file]
            if data and chunks and (place := chunks.damage(file.fileno(), ref.offset + start * row, data)):
                raise self._damaged(name, chunks, place)
        return raw

    def check(self, name: str, offset: int, length: int) -> None:
        """Compare bytes that a runtime will map: those of a tensor, which a graph places at `offset` of its file.

        Raises:
            CheckpointError: the tensor lies elsewhere, or its bytes are not those that were downloaded.
        """
        ref = self._refs.get(name)
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
        shared = [
            ref.name
            for ref in self._refs.values()
            if ref.file == chunks.path.name and ref.offset < place.stop and ref.offset + ref.length > place.start
        ]
        others = [shown(other) for other in shared if other != name]
        listed = f" (or {', '.join(others[:_MAX_DIMENSIONS])} there)" if others else ""
        return _damaged(chunks, place, f"tensor {name!r}{listed}")

    def _refuse(self, name: str, values: np.ndarray, start: int) -> None:
        bad = ~np.isfinite(values)
        first = [int(index[0]) for index in np.nonzero(bad)]
        first[0] += start
        raise CheckpointError(
            f"tensor {name!r} in {self.folder / self._refs[name].file}: {int(bad.sum()):,} of {values.size:,} values "
            f"are NaN or infinite, the first at {first}. Quantizing it would ship garbage: use an intact checkpoint."
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.length for ref in self._refs.values())
