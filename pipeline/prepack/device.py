"""What a phone does after a download: prepack slice after slice, then map. Needs ONNX Runtime, nothing else of ours.

    python -m pipeline.prepack.device FOLDER

The folder is a bundle's content: prepack.json, the slices' graphs, a merged graph for each kernel class, the model's
parts. What a phone makes is `prepacked/` in it, which may be deleted at any time: `<n>.data`, the packed bytes of slice
n, and `ready.json` once all are there.

Opening slice n makes ONNX Runtime pack its matrices and save them (`n.onnx`, `n.raw`). The saved graph names packed
bytes by their hash, so its SHA-256 tells the kernel class. If no class fits, the model is loaded as ever, with its
weights packed in private memory. Else the ranges that the merged graph reads are copied to where it reads them:

- each on a multiple of 64 bytes. ONNX Runtime (1.31) saves packed bytes at any offset, but kernels look for them from
  the next multiple of 32 on: mapped from another offset they give wrong products, without an error;
- without the codes, which ONNX Runtime saves once more: the merged graph reads those of the download.

prepack.json has the SHA-256 of every `<n>.data`, and is signed: a file is whole if it has that digest.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime as ort

from pipeline.errors import BundleError
from pipeline.files import atomic_file, read_json, require_free_space, sha256_of, write_json
from pipeline.machine import kernel_class

PREPACK_FILE = "prepack.json"
PREPACKED = "prepacked"
READY = "ready.json"
VERSION = 1
_SAVING = {
    "session.optimized_model_external_initializers_min_size_in_bytes": "0",
    "session.save_external_prepacked_constant_initializers": "1",
}
_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class Packed:
    """What a slice is in one kernel class.

    Attributes:
        saved: SHA-256 of the graph that ONNX Runtime saves.
        raw: bytes of the data that it saves.
        kept: (offset in the raw data, length, offset in the slice's data), by the last.
        bytes, data: of the slice's data, and its SHA-256.
    """

    saved: str
    raw: int
    kept: Sequence[Sequence[int]]
    bytes: int
    data: str


@dataclass(frozen=True)
class Kernels:
    """A kernel class: the merged graph's file name, and its slices in order."""

    graph: str
    slices: Sequence[Packed]


@dataclass(frozen=True)
class Prepacking:
    """prepack.json: what there is to prepack.

    Attributes:
        graph: the model's own graph, which every processor can load.
        parts: the files that hold its weights.
        slices: the graphs of the slices, in the order of packing.
        limit: bytes of codes in one slice, for whoever adds a class.
        classes: by name.
    """

    graph: str
    parts: Sequence[str]
    slices: Sequence[str]
    limit: int
    classes: Mapping[str, Kernels]

    @classmethod
    def read(cls, folder: Path) -> Prepacking:
        """Raises BundleError when the file is absent, of another version, or names a file that is not there."""
        path = folder / PREPACK_FILE
        try:
            document = read_json(path)
            if (version := document.pop("version")) != VERSION:
                raise BundleError(f"{path}: version {version}, this program reads {VERSION}. Update the program.")
            classes = {
                name: Kernels(values["graph"], [Packed(**item) for item in values["slices"]])
                for name, values in document.pop("classes").items()
            }
            found = cls(classes=classes, **document)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{path}: not readable ({error!r}). Fetch the bundle again.") from None
        if wrong := [name for name, kernels in classes.items() if len(kernels.slices) != len(found.slices)]:
            raise BundleError(f"{path}: class {wrong[0]!r} is of another number of slices than {len(found.slices)}.")
        names = [found.graph, *found.parts, *found.slices, *(kernels.graph for kernels in classes.values())]
        if bad := [name for name in names if name != Path(name).name or not (folder / name).is_file()]:
            raise BundleError(
                f"{path}: {len(bad)} of {len(names)} files that it names are not beside it, the first is {bad[0]!r}. "
                f"Fetch the bundle again."
            )
        return found

    def write(self, folder: Path) -> None:
        """Write prepack.json."""
        write_json(folder / PREPACK_FILE, asdict(self) | {"version": VERSION})


@dataclass(frozen=True)
class Outcome:
    """What to load: the merged graph of kernel class `kernels`, or, with `why`, the model's own graph."""

    graph: str
    kernels: str | None = None
    why: str = ""


def prepack(folder: Path, say: Callable[[str], None] = print) -> Outcome:
    """Prepack what is not prepacked yet in `folder`, and decide which graph this processor loads.

    Raises:
        BundleError: a file is missing, or ONNX Runtime refuses a slice.
        ResourceError: the disk has too little room; nothing was begun.
    """
    work = Prepacking.read(folder)
    (folder / PREPACKED).mkdir(exist_ok=True)
    names = [f"{number}.data" for number in range(len(work.slices))]
    for path in (folder / PREPACKED).iterdir():
        if path.name not in names:  # ready.json, what a kill left, slices of another bundle
            path.unlink()
    # The first slice is always packed: it tells what this processor is, and files may have come from another.
    found = [None, *(_digest(folder / PREPACKED / name) for name in names[1:])]
    for number, name in enumerate(names):
        if all(found[number] != kernels.slices[number].data for kernels in work.classes.values()):
            (folder / PREPACKED / name).unlink(missing_ok=True)
    _require_room(folder, work, found)
    fitting = dict(work.classes)
    for number, name in enumerate(work.slices):
        kept = {key: item for key, item in fitting.items() if item.slices[number].data == found[number]}
        fitting = kept or _pack(folder, work, number, fitting)
        if not fitting:
            shutil.rmtree(folder / PREPACKED)
            why = f"this processor packs {name} as none of the bundle's {len(work.classes)} kernel classes does"
            say(f"{folder}: {why}: the weights will be in private memory")
            return Outcome(work.graph, None, why)
        say(f"{name}: slice {number + 1} of {len(work.slices)} is packed{' already' if kept else ''}")
    kernels = next(iter(fitting))
    outcome = Outcome(fitting[kernels].graph, kernels)
    write_json(folder / PREPACKED / READY, {"kernels": kernels, **_made_by(folder)})
    return outcome


def choose(folder: Path) -> Outcome:
    """Which graph to load now: the merged one if `prepack` came to its end and its files are there, else the own one.

    Raises BundleError as `Prepacking.read`.
    """
    work = Prepacking.read(folder)
    try:
        ready = read_json(folder / PREPACKED / READY)
        kernels = ready.pop("kernels")
        if ready != _made_by(folder):
            return Outcome(work.graph, None, "prepacked for another bundle, runtime or processor: prepack again")
        chosen = work.classes[kernels]
    except FileNotFoundError:
        return Outcome(work.graph, None, "not prepacked")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Outcome(work.graph, None, f"{PREPACKED}/{READY} is not readable ({error!r}): prepack again")
    for number, packed in enumerate(chosen.slices):  # beyond the end of a mapped file is a bus error, not an exception
        path = folder / PREPACKED / f"{number}.data"
        if (size := path.stat().st_size if path.is_file() else 0) != packed.bytes:
            why = f"{PREPACKED}/{path.name} has {size:,} bytes in place of {packed.bytes:,}: prepack again"
            return Outcome(work.graph, None, why)
    return Outcome(chosen.graph, kernels)


def save_slice(source: Path, target: Path, number: int) -> tuple[Path, Path]:
    """Open the slice `source` so that ONNX Runtime packs it and saves `<number>.onnx` and `.raw` in `target`.

    Raises BundleError when the runtime refuses it, or cannot write.
    """
    graph, raw = saved_files(target, number)
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False  # an arena keeps what it has taken
    options.log_severity_level = 3
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", raw.name)
    for key, value in _SAVING.items():
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no public base class
        raise BundleError(f"{source}: ONNX Runtime {ort.__version__} cannot prepack it: {error}") from None
    return graph, raw


def saved_files(target: Path, number: int) -> tuple[Path, Path]:
    """The graph and the data that ONNX Runtime saves of a slice."""
    return target / f"{number}.onnx", target / f"{number}.raw"


def kept_bytes(raw: Path, kept: Iterable[Sequence[int]]) -> Iterator[bytes]:
    """The bytes of a slice's data, in pieces: ranges of the raw data, with zeros between them."""
    written = 0
    with open(raw, "rb") as file:
        for offset, length, target in kept:
            yield bytes(target - written)
            file.seek(offset)
            for start in range(0, length, _CHUNK):
                yield file.read(min(_CHUNK, length - start))
            written = target + length


def _pack(folder: Path, work: Prepacking, number: int, fitting: Mapping[str, Kernels]) -> dict[str, Kernels]:
    """Write a slice's data; those of the classes `fitting` that it is of. If it is of none, nothing is written."""
    where = folder / PREPACKED
    graph, raw = save_slice(folder / work.slices[number], where, number)
    seen = (sha256_of(graph), raw.stat().st_size)
    fits = {key: item for key, item in fitting.items() if (item.slices[number].saved, item.slices[number].raw) == seen}
    if fits:
        packed = next(iter(fits.values())).slices[number]
        with atomic_file(where / f"{number}.data") as file:
            file.writelines(kept_bytes(raw, packed.kept))
        fits = {
            key: item for key, item in fits.items() if item.slices[number].data == _digest(where / f"{number}.data")
        }
    for path in (graph, raw):
        path.unlink()
    return fits


def _require_room(folder: Path, work: Prepacking, found: Sequence[str | None]) -> None:
    """Raise ResourceError unless the disk holds the slices that are not among `found`, in the class that needs most:
    their data, and the raw data of one."""
    peaks = [0]
    for kernels in work.classes.values():
        missing = [item for item, digest in zip(kernels.slices, found, strict=True) if item.data != digest]
        peaks.append(sum(item.bytes for item in missing) + max((item.raw for item in missing), default=0))
    require_free_space(folder, max(peaks), f"prepack {work.graph}")


def _digest(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def _made_by(folder: Path) -> dict[str, str]:
    """What a phone's prepacked files are good for."""
    bundle = sha256_of(folder / PREPACK_FILE)
    return {"bundle": bundle, "onnxruntime": ort.__version__, "processor": kernel_class()}


if __name__ == "__main__":
    started, where = time.monotonic(), Path(sys.argv[1])
    if sys.argv[2:]:  # a slice to be saved: for its kernel class
        save_slice(where, Path(sys.argv[2]), int(sys.argv[3]))
        result = {}
    else:
        result = asdict(prepack(where, lambda line: print(line, file=sys.stderr)))
    print(json.dumps(result | {"seconds": time.monotonic() - started}))
