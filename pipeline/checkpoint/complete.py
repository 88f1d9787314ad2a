"""Which files of a source make a checkpoint, and whether they are whole. Reads headers only, never weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.checkpoint.blobs import checked_name
from pipeline.checkpoint.tensors import INDEX, SINGLE, read_header
from pipeline.checkpoint.untrusted import MAX_JSON, open_regular, parse_json, shown
from pipeline.errors import CheckpointError, PipelineError, SourceError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a checkpoint may say about its tokenizer; two of them ship, made of all (`pipeline.door.tokenizer`)."""
_SMALL = ("config.json", "generation_config.json", *TOKENIZER_FILES, "LICENSE*", "LICENCE*", "NOTICE*")
_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_POINTER = b"version https://git-lfs.github.com/spec/"


def small_files(names: Collection[str], where: str) -> list[str]:
    """The files beside the weights that the pipeline uses, sorted.

    Raises:
        SourceError: there is an adapter, no config.json, or no safetensors weights (saying so if there are only
            pickles), or a name is not plain text.
    """
    if _ADAPTER in names:
        what = f"{_ADAPTER}: an adapter, whose weights are not in the model's; nothing here would add them"
        remedy = "Merge it (peft's merge_and_unload, then save_pretrained) into a folder, a source of `kind: local`"
        raise SourceError(f"{where}: {what}. {remedy}; if the model does not need it, remove it from a copy.")
    if "config.json" not in names:
        raise SourceError(f"{where}: no config.json, so this is not a checkpoint. Found: {_some(names)}.")
    if INDEX not in names and SINGLE not in names:
        pickles = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in _PICKLES))
        if pickles:
            only = (
                f"the weights exist only as Python pickles ({_some(pickles)}), which can run code when they are loaded"
            )
            remedy = "Use a source that offers safetensors, or convert on a machine you can throw away."
            raise SourceError(f"{where}: {only}. {remedy}")
        raise SourceError(f"{where}: neither {SINGLE} nor {INDEX}. Found: {_some(names)}.")
    wanted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    return sorted(_plain(name, where) for name in wanted if "/" not in name) + [INDEX] * (INDEX in names)


def shard_names(names: Collection[str], index: bytes | None, where: str) -> list[str]:
    """The safetensors files that hold the weights: those that the index names, or the single file without one.

    Raises:
        SourceError: the index is not one, names a file outside the folder, or names a shard that is not there.
    """
    if index is None:
        return [SINGLE]
    _refuse_pointer(index, INDEX, where)
    try:
        named = [_plain(shard, where) for shard in sorted(set(parse_json(index)["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{where}: {INDEX} has no usable weight_map ({type(error).__name__}: {error}).") from None
    if not named or any(not shard.endswith(".safetensors") or "/" in shard for shard in named):
        raise SourceError(f"{where}: {INDEX} must name safetensors files beside it; it names {_some(named)}.")
    if missing := [shard for shard in named if shard not in names]:
        what = f"{len(missing)} of {len(named)} shards named in {INDEX} are missing: {_some(missing)}"
        raise SourceError(f"{where}: {what}. Fetch the source whole, or pin a revision that has them.")
    if SINGLE in names and named != [SINGLE]:
        what = f"{SINGLE} lies beside {INDEX}, which names {_some(named)}: which weights are meant cannot be known"
        remedy = (
            "transformers takes the single file, others the shards. Remove one in a copy, a folder of `kind: local`"
        )
        raise SourceError(f"{where}: {what}; {remedy}.")
    return named


def admit_shown(admit: Callable[[Path], object], folder: Path, where: str) -> None:
    """Let `admit` look at a folder that shows a source; what it refuses is said about the source, `where`."""
    try:
        admit(folder)
    except PipelineError as error:
        raise type(error)(str(error).replace(str(folder), where)) from None


def write_hollow(path: Path, size: int, read: Callable[[int, int], bytes]) -> None:
    """Write a safetensors file as far as its header, and as long as the whole: a hole stands for the values.

    Args:
        read: the file's bytes, from an offset, as many as are asked for.
    """
    prefix = read(0, 8)
    length = int.from_bytes(prefix, "little")
    with open(path, "wb") as file:
        file.write(prefix + (read(8, length) if length <= MAX_JSON else b""))  # a longer one is refused when it is read
        file.truncate(size)


def licence(names: Collection[str]) -> str:
    """Where the files of a source state their licence; "unknown" without such a file."""
    return next((f"see {name}" for name in sorted(names) if name.upper().startswith(("LICENSE", "LICENCE"))), "unknown")


def check_file(path: Path, name: str, where: str) -> None:
    """Refuse a file that is not what its name says: a git-LFS pointer, or no whole safetensors file.

    Raises:
        SourceError: with the numbers.
    """
    refuse_pointer(path, name, where)
    if name.endswith(".safetensors"):
        try:
            read_header(path, follow=True)
        except CheckpointError as error:
            raise SourceError(f"{where}: {name} is not whole: {error}") from None


def refuse_pointer(path: Path, name: str, where: str) -> None:
    """Raise `SourceError` if the file is a git-LFS pointer."""
    with open_regular(path, follow=True) as file:
        _refuse_pointer(file.read(len(_POINTER)), name, where)


def _refuse_pointer(content: bytes, name: str, where: str) -> None:
    if content.startswith(_POINTER):
        what = f"{name} is a git-LFS pointer (a short text that stands for the real file), not the file"
        remedy = "run `git lfs pull` there, or use a source that serves the real bytes"
        raise SourceError(f"{where}: {what}. The copy was made without git-lfs: {remedy}.")


def _plain(name: str, where: str) -> str:
    """`name` if it can stand in a lock file: inside the folder, and text (a folder's names are bytes)."""
    if not checked_name(name).isprintable():
        raise SourceError(f"{where}: file name {shown(name)} is not plain text. Rename the file.")
    return name


def _some(names: Collection[str]) -> str:
    """At most eight names for a message."""
    listed = [name if name.isprintable() and len(name) <= 200 else shown(name) for name in sorted(names)[:8]]
    return (", ".join(listed) or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
