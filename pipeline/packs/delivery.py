"""A signed bundle as store packs: which file travels in which pack, and the index that puts them together again.

Stores limit a pack, not a model, so a bundle is split over packs and the app joins it. The split is a pure function of
names and sizes: it needs no file, and two releases of one shape have the same split. Inside its packs a file keeps the
place that it has after joining:

    bundle/content/…, bundle/model.sig               the bundle, as `verify` takes it
    tiers/content/tiers.json, tiers/model.sig        the signed map of tiers
    packs.json                                       in the first pack: this delivery, as `Delivery`

packs.json is not signed and decides nothing: it says which pack has what, and the signatures judge the result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from pipeline.bundle.release import CONTENT, SAFE_NAME, SIGNATURE, FileEntry, Record, Release, describe_files
from pipeline.bundle.tiers import TiersDocument
from pipeline.config.typed_yaml import Name, Sha256
from pipeline.errors import BundleError
from pipeline.files import link_or_copy, write_json

# Play's limit on a pack is 1.5e9 bytes as downloaded. Deflate adds at most 0.03 % to what it cannot compress; the rest
# of the difference is room for archive entries and a manifest.
PACK_BYTES = 1_490_000_000
INDEX = "packs.json"
BUNDLE = "bundle"
TIERS = "tiers"

_PART = re.compile(r"(.*\.data\.)([0-9]+)")
_PLACE = rf"^({BUNDLE}|{TIERS})/({CONTENT}/{SAFE_NAME.pattern}|{re.escape(SIGNATURE)})$"

Place = Annotated[str, StringConstraints(pattern=_PLACE)]
PackName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=150)]


class Pack(Record):
    """One pack of a delivery: its files by their place after joining, and a digest of places and bytes.

    `bytes` are uncompressed; `digest` is `pack_digest` of `files`.
    """

    name: PackName
    bytes: int = Field(ge=0)
    digest: Sha256
    files: dict[Place, FileEntry] = Field(min_length=1)


class Delivery(Record):
    """What one phone downloads: a variant's bundle and the map of tiers, in the order of the packs."""

    model: Name
    variant: Name
    release: int = Field(ge=1)
    min_app_version: int = Field(ge=0)
    max_app_version: int | None
    bytes: int = Field(ge=0)
    packs: list[Pack] = Field(min_length=1)


@dataclass(frozen=True)
class Packable:
    """A verified bundle with the tiers.json that names it: entries by place, and where their bytes lie now."""

    release: Release
    files: dict[str, FileEntry]
    sources: dict[str, Path]


def pack_digest(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over a pack's places and the hashes of its bytes: equal digests are equal packs."""
    listing = {place: entry.sha256 for place, entry in files.items()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _order(place: str) -> tuple[bool, str, int, str]:
    """Small files first, by name, then data parts by number: a part that is added moves no other file."""
    part = _PART.fullmatch(place)
    return (True, part[1], int(part[2]), place) if part else (False, "", 0, place)


def split(sizes: Mapping[str, int], pack_bytes: int = PACK_BYTES) -> tuple[tuple[str, ...], ...]:
    """Assign files (name → bytes) to packs of at most `pack_bytes`; a file that does not fit opens the next pack.

    Raises:
        BundleError: a file is larger than a pack.
    """
    packs: list[list[str]] = [[]]
    used = 0
    for name in sorted(sizes, key=_order):
        if sizes[name] > pack_bytes:
            large = f"{name} has {sizes[name]:,} bytes, a pack holds {pack_bytes:,}: it cannot be delivered"
            raise BundleError(f"{large}. Lower part_bytes in the recipe and quantize again.")
        if used + sizes[name] > pack_bytes and packs[-1]:
            packs.append([])
            used = 0
        packs[-1].append(name)
        used += sizes[name]
    return tuple(tuple(pack) for pack in packs)


def packable(bundle: Path, release: Release, tiers: Path) -> Packable:
    """The files of a bundle folder and of a tiers folder by place. Both must have been verified just before.

    Sizes and hashes are those that release.json promises; only what it does not list is read.
    """
    sources = {f"{BUNDLE}/{CONTENT}/{name}": bundle / CONTENT / name for name in release.files}
    listed = {f"{BUNDLE}/{CONTENT}/{name}": entry for name, entry in release.files.items()}
    others: dict[str, Path] = {}
    for top, folder, kind in ((BUNDLE, bundle, Release), (TIERS, tiers, TiersDocument)):
        others |= {f"{top}/{name}": folder / name for name in (f"{CONTENT}/{kind.file_name}", SIGNATURE)}
    return Packable(release, listed | describe_files(others), sources | others)


def deliver(packed: Packable, name: Callable[[int], str], pack_bytes: int = PACK_BYTES) -> Delivery:
    """The packs of one bundle; `name` gives a pack's name from its number, which counts from 1.

    Raises:
        BundleError: a file is larger than a pack.
    """
    packs = []
    for number, places in enumerate(split({place: file.size for place, file in packed.files.items()}, pack_bytes), 1):
        files = {place: packed.files[place] for place in sorted(places)}
        size = sum(file.size for file in files.values())
        packs.append(Pack(name=name(number), bytes=size, digest=pack_digest(files), files=files))
    repeated = packed.release.model_dump(include=set(Delivery.model_fields))
    return Delivery(**repeated, bytes=sum(pack.bytes for pack in packs), packs=packs)


def write_pack(folder: Path, delivery: Delivery, pack: Pack, sources: Mapping[str, Path]) -> None:
    """Fill `folder` with a pack's files, as hard links where the file system can, and the index if it is the first."""
    for place in pack.files:
        link_or_copy(sources[place], folder / place)
    if pack == delivery.packs[0]:
        write_json(folder / INDEX, delivery.model_dump(mode="json"))
