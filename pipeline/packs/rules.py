"""What the rules of both stores share: rules, problems, a folder read without trust, packs against their index."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.bundle.release import CONTENT, SIGNATURE, SMALL, Model, Record, Release, parse
from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError
from pipeline.files import sha256_of
from pipeline.packs.delivery import BUNDLE, INDEX, TIERS, Delivery, Pack, pack_digest

RELEASE = f"{BUNDLE}/{CONTENT}/{Release.file_name}"

Index = TypeVar("Index", bound=Record)
Check = TypeVar("Check", bound=Callable[[Any], Iterator[Any]])
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


class Tree(ABC, Generic[Index]):
    """A store folder: its regular files by relative path, and its index. Links are listed, never followed.

    Raises:
        BundleError: the folder cannot be read.
    """

    kind: type[Index]

    def __init__(self, folder: Path):
        self.folder = folder
        self.sizes: dict[str, int] = {}
        self.strange: dict[str, str] = {}
        try:
            self._walk("")
        except OSError as error:
            raise BundleError(f"{error.filename} cannot be read: {error.strerror}. Nothing was checked.") from None

    @property
    @abstractmethod
    def deliveries(self) -> dict[str, Delivery]:
        """The deliveries of the index by their name there; none when it is damaged."""

    @abstractmethod
    def pack_folder(self, name: str, pack: Pack) -> str:
        """Where a pack of the delivery `name` lies."""

    @cached_property
    def first_packs(self) -> list[tuple[str, Delivery, Release | None]]:
        """Where each delivery's first pack lies, the delivery, and the release.json in that pack if it is readable."""
        folders = [(self.pack_folder(name, item.packs[0]), item) for name, item in self.deliveries.items()]
        return [(folder, item, self.parsed(Release, f"{folder}/{RELEASE}")[0]) for folder, item in folders]

    def parsed(self, kind: type[Model], path: str) -> tuple[Model | None, str]:
        """A document; or None, and what is wrong with it."""
        try:
            return parse(kind, self.text(path).encode()), ""
        except ValueError as error:
            return None, str(error)

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
        if self.sizes.get(path, SMALL) >= SMALL:
            return ""
        return (self.folder / path).read_bytes().decode(errors="replace")

    @cached_property
    def folders(self) -> set[str]:
        """Top folders that hold files."""
        return {path.split("/")[0] for path in self.sizes if "/" in path}

    def below(self, folder: str) -> dict[str, int]:
        """Sizes of the files under `folder`, by their path relative to it."""
        prefix = f"{folder}/"
        return {path.removeprefix(prefix): size for path, size in self.sizes.items() if path.startswith(prefix)}

    @cached_property
    def read(self) -> tuple[Index | None, str]:
        """packs.json; or None, and what is wrong with it."""
        index, problem = self.parsed(self.kind, INDEX) if INDEX in self.sizes else (None, "there is no such file")
        return index, "; ".join(problem.split("; ")[:5])

    @property
    def index(self) -> Index | None:
        """packs.json; None when it is damaged."""
        return self.read[0]


@dataclass(frozen=True)
class Rule:
    """One rule: `says` names it and whose it is; `check` yields what breaks it: a path and what is wrong there.

    With `at`, a path, `check` yields only the latter. `note`: reported, refuses nothing.
    """

    id: str
    says: str
    check: Callable[[Any], Iterator[Any]] = field(repr=False)
    at: str | None = None
    note: bool = False


class Rules(list[Rule]):
    """Rules in the order in which they are checked."""

    def add(self, id: str, says: str, at: str | None = None, note: bool = False) -> Callable[[Check], Check]:
        """A decorator: the function is the check of one more rule."""

        def register(check: Check) -> Check:
            self.append(Rule(id, says, check, at, note))
            return check

        return register

    def problems(self, tree: Tree[Any]) -> list[Problem]:
        """All that `tree` breaks. An index without deliveries has no packs: nothing ships, and nothing is wrong."""
        if tree.index is not None and not tree.deliveries and tree.sizes.keys() == {INDEX}:
            return []
        found = ((rule, item if rule.at is None else (rule.at, item)) for rule in self for item in rule.check(tree))
        return [Problem(rule.id, where, message, rule.note) for rule, (where, message) in found]


COMMON = Rules()
"""The rules of both stores."""


@COMMON.add("regular-files", "Gradle and ba-package take regular files; a link would point outside the project")
def _strange_files(tree: Tree[Any]) -> Found:
    for path, mode in tree.strange.items():
        yield path, f"a store takes regular files and folders only, found {mode}"


@COMMON.add("index", "ours: packs.json is there and readable", INDEX)
def _readable_index(tree: Tree[Any]) -> Iterator[str]:
    if tree.index is None:
        yield tree.read[1]


@COMMON.add("index-files", "ours: each pack holds what the index says, to the byte")
def _packs_as_indexed(tree: Tree[Any]) -> Found:
    for name, delivery in tree.deliveries.items():
        for number, pack in enumerate(delivery.packs):
            yield from _pack_files(tree, tree.pack_folder(name, pack), delivery, number)


def _pack_files(tree: Tree[Any], folder: str, delivery: Delivery, number: int) -> Found:
    """One pack's folder against the index: every file there with its size and hash, and no other."""
    pack, present = delivery.packs[number], tree.below(folder)
    for path in sorted(pack.files.keys() - present.keys()):
        yield f"{folder}/{path}", f"the index lists it in pack {pack.name}, but it is not there"
    for path in sorted(present.keys() - pack.files.keys() - ({INDEX} if number == 0 else set())):
        yield f"{folder}/{path}", f"it is not in the index: no phone would take it ({present[path]:,} bytes)"
    for path in sorted(pack.files.keys() & present.keys()):
        entry = pack.files[path]
        if present[path] != entry.size:
            yield f"{folder}/{path}", f"the index says {entry.size:,} bytes, found {present[path]:,}"
        elif (found := sha256_of(tree.folder / folder / path)) != entry.sha256:
            yield f"{folder}/{path}", f"the index says sha256 {entry.sha256}, found {found}"
    if number == 0:  # the delivery's copy here is the one that the app reads
        own, problem = tree.parsed(Delivery, path := f"{folder}/{INDEX}")
        if own is None:
            yield path, f"the first pack carries the delivery for the app, but it cannot be read: {problem}"
        elif own != delivery:
            yield path, "it differs from this delivery in the index beside the packs"


@COMMON.add("joins", "ours: each delivery's packs join to one whole bundle")
def _joined(tree: Tree[Any]) -> Found:
    """The files that release.json, in the first pack, lists, each once, and the signatures."""
    for folder, delivery, release in tree.first_packs:
        places = [place for pack in delivery.packs for place in pack.files]
        if twice := sorted({place for place in places if places.count(place) > 1}):
            yield folder, f"{', '.join(twice)} in more than one pack: on the phone one would replace the other"
        if release is None:
            yield f"{folder}/{RELEASE}", "the first pack must hold a readable release.json: without it nothing joins"
            continue
        wanted = {f"{BUNDLE}/{CONTENT}/{name}" for name in (*release.files, Release.file_name)}
        wanted |= {f"{BUNDLE}/{SIGNATURE}", f"{TIERS}/{CONTENT}/{TiersDocument.file_name}", f"{TIERS}/{SIGNATURE}"}
        if missing := sorted(wanted - set(places)):
            yield folder, f"{len(missing)} of {len(wanted)} files are in no pack: {', '.join(missing[:5])}"
        if strangers := sorted(set(places) - wanted):
            yield folder, f"release.json does not list {', '.join(strangers[:5])}: verification on the phone would fail"


@COMMON.add("app-versions", "ours: the index repeats the signed release")
def _app_versions(tree: Tree[Any]) -> Found:
    for folder, delivery, release in tree.first_packs:
        for name in ("model", "variant", "release", "min_app_version", "max_app_version") if release else ():
            if (says := getattr(delivery, name)) != (signed := getattr(release, name)):
                yield folder, f"the index says {name} {says}, the signed release.json says {signed}"


@COMMON.add("index-digests", "ours: sizes and digests of the index follow from its files", INDEX)
def _digests(tree: Tree[Any]) -> Iterator[str]:
    for delivery in tree.deliveries.values():
        for pack in delivery.packs:
            if pack.bytes != (found := sum(file.size for file in pack.files.values())):
                yield f"pack {pack.name}: it says {pack.bytes:,} bytes, its files have {found:,}"
            if pack.digest != (digest := pack_digest(pack.files)):
                yield f"pack {pack.name}: it says digest {pack.digest}, its files give {digest}"
        if delivery.bytes != (found := sum(pack.bytes for pack in delivery.packs)):
            yield f"{delivery.variant}: it says {delivery.bytes:,} bytes, its packs have {found:,}"
