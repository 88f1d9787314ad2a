"""What the rules of both stores share: rules, problems, a folder read without trust, packs against their index."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from pipeline.bundle.release import CONTENT, SIGNATURE, Record, Release
from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError
from pipeline.files import sha256_of
from pipeline.packs.delivery import BUNDLE, INDEX, TIERS, Delivery, Pack, pack_digest, total

_SMALL = 16 << 20  # bytes; no text of a store folder comes near it
RELEASE = f"{BUNDLE}/{CONTENT}/{Release.file_name}"

Index = TypeVar("Index", bound=Record)
Found = Iterator[tuple[str, str]]  # a path in the folder, and what is wrong there with the figures


@dataclass(frozen=True)
class Problem:
    """A broken rule: its id, where (relative to the folder), what with the figures. A note refuses nothing."""

    rule: str
    where: str
    message: str
    note: bool = False

    def __str__(self) -> str:
        return f"{'note' if self.note else 'error'} [{self.rule}] {self.where}: {self.message}"


class Tree(Generic[Index]):
    """A store folder: its regular files by relative path, and its index. Links are listed, never followed.

    Raises:
        BundleError: the folder cannot be read.
    """

    def __init__(self, folder: Path, kind: type[Index]):
        self.folder, self.kind = folder, kind
        self.sizes: dict[str, int] = {}
        self.strange: dict[str, str] = {}
        try:
            self._walk("")
        except OSError as error:
            raise BundleError(f"{error.filename} cannot be read: {error.strerror}. Nothing was checked.") from None

    def _walk(self, below: str) -> None:
        for name in sorted(os.listdir(self.folder / below)):
            path = f"{below}/{name}" if below else name
            if not (name.isascii() and name.isprintable()):
                self.strange[ascii(path)] = "a name that is not printable ASCII"
                continue
            mode = (self.folder / path).lstat()
            if stat.S_ISDIR(mode.st_mode):
                self._walk(path)
            elif stat.S_ISREG(mode.st_mode):
                self.sizes[path] = mode.st_size
            else:
                self.strange[path] = stat.filemode(mode.st_mode)

    def text(self, path: str) -> str:
        """A small text file; empty when it is missing, too large or not UTF-8, which the rules then report."""
        if self.sizes.get(path, _SMALL) >= _SMALL:
            return ""
        return (self.folder / path).read_bytes().decode(errors="replace")

    def hash(self, path: str) -> str:
        """SHA-256 of a file."""
        return sha256_of(self.folder / path)

    def below(self, folder: str) -> dict[str, int]:
        """Sizes of the files under `folder`, by their path relative to it."""
        prefix = f"{folder}/"
        return {path.removeprefix(prefix): size for path, size in self.sizes.items() if path.startswith(prefix)}

    @cached_property
    def index(self) -> Index | str:
        """packs.json, or what is wrong with it."""
        if INDEX not in self.sizes:
            return "there is no such file"
        try:
            return self.kind.model_validate_json(self.text(INDEX))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            return "; ".join(problems[:5])


@dataclass(frozen=True)
class Rule(Generic[Index]):
    """One rule: `says` names it and whose it is; `check` yields what breaks it. `note`: reported, refuses nothing."""

    id: str
    says: str
    check: Callable[[Tree[Index]], Found] = field(repr=False)
    note: bool = False


def apply(rules: Iterable[Rule[Index]], tree: Tree[Index]) -> list[Problem]:
    """Every problem of `tree`, in the order of the rules."""
    return [Problem(rule.id, where, what, rule.note) for rule in rules for where, what in rule.check(tree)]


def strange_files(tree: Tree[Index]) -> Found:
    """Whatever is no regular file."""
    for path, mode in tree.strange.items():
        yield path, f"a store takes regular files and folders only, found {mode}"


def readable_index(tree: Tree[Index]) -> Found:
    """An index that is missing or malformed."""
    if isinstance(tree.index, str):
        yield INDEX, tree.index


def pack_files(tree: Tree[Index], folder: str, delivery: Delivery, number: int) -> Found:
    """One pack's folder against the index: every file there with its size and hash, and no other."""
    pack, present = delivery.packs[number], tree.below(folder)
    own_index = {INDEX} if number == 0 else set()
    for path in sorted(pack.files.keys() - present.keys()):
        yield f"{folder}/{path}", f"the index lists it in pack {pack.name}, but it is not there"
    for path in sorted(present.keys() - pack.files.keys() - own_index):
        yield f"{folder}/{path}", f"it is not in the index: no phone would take it ({present[path]:,} bytes)"
    for path in sorted(pack.files.keys() & present.keys()):
        entry = pack.files[path]
        if present[path] != entry.size:
            yield f"{folder}/{path}", f"the index says {entry.size:,} bytes, found {present[path]:,}"
        elif (found := tree.hash(f"{folder}/{path}")) != entry.sha256:
            yield f"{folder}/{path}", f"the index says sha256 {entry.sha256}, found {found}"
    if number == 0:
        yield from _own_index(tree, folder, delivery)


def _own_index(tree: Tree[Index], folder: str, delivery: Delivery) -> Found:
    """The delivery's copy in its first pack, which is the one that the app reads."""
    path = f"{folder}/{INDEX}"
    try:
        if Delivery.model_validate_json(tree.text(path)) != delivery:
            yield path, "it differs from this delivery in the index beside the packs"
    except ValidationError as error:
        yield (
            path,
            f"the first pack carries the delivery for the app, but it cannot be read: {error.errors()[0]['msg']}",
        )


def joined(tree: Tree[Index], folders: Mapping[str, Delivery]) -> Found:
    """Whether each delivery joins to a whole bundle: the files that release.json lists, each once, and the signatures.

    `folders` gives the folder of each delivery's first pack, which holds release.json.
    """
    for folder, delivery in folders.items():
        places = [place for pack in delivery.packs for place in pack.files]
        if twice := sorted({place for place in places if places.count(place) > 1}):
            yield folder, f"{', '.join(twice)} in more than one pack: on the phone one would replace the other"
        release = _release(tree, f"{folder}/{RELEASE}")
        if release is None:
            yield f"{folder}/{RELEASE}", "the first pack must hold a readable release.json: without it nothing joins"
            continue
        wanted = {f"{BUNDLE}/{CONTENT}/{name}" for name in (*release.files, Release.file_name)}
        wanted |= {f"{BUNDLE}/{SIGNATURE}", f"{TIERS}/{CONTENT}/{TiersDocument.file_name}", f"{TIERS}/{SIGNATURE}"}
        if missing := sorted(wanted - set(places)):
            yield folder, f"{len(missing)} of {len(wanted)} files are in no pack: {', '.join(missing[:5])}"
        if strangers := sorted(set(places) - wanted):
            yield folder, f"release.json does not list {', '.join(strangers[:5])}: verification on the phone would fail"


def app_versions(tree: Tree[Index], folders: Mapping[str, Delivery]) -> Found:
    """The index repeats model, variant, release and app versions of release.json."""
    for folder, delivery in folders.items():
        release = _release(tree, f"{folder}/{RELEASE}")
        for name in ("model", "variant", "release", "min_app_version", "max_app_version"):
            if release is not None and getattr(delivery, name) != getattr(release, name):
                says, signed = getattr(delivery, name), getattr(release, name)
                yield folder, f"the index says {name} {says}, the signed release.json says {signed}"


def _release(tree: Tree[Index], path: str) -> Release | None:
    try:
        return Release.model_validate_json(tree.text(path))
    except ValidationError:
        return None


def digests(deliveries: Iterable[Delivery]) -> Found:
    """A pack's `bytes` and `digest`, and a delivery's `bytes`, follow from the files they list."""
    for delivery in deliveries:
        for pack in delivery.packs:
            yield from _digest(pack)
        if delivery.bytes != (found := sum(pack.bytes for pack in delivery.packs)):
            yield INDEX, f"{delivery.variant}: it says {delivery.bytes:,} bytes, its packs have {found:,}"


def _digest(pack: Pack) -> Found:
    if pack.bytes != (found := total(pack.files.values())):
        yield INDEX, f"pack {pack.name}: it says {pack.bytes:,} bytes, its files have {found:,}"
    if pack.digest != (digest := pack_digest(pack.files)):
        yield INDEX, f"pack {pack.name}: it says digest {pack.digest}, its files give {digest}"
