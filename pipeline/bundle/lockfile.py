"""dvc.lock: what the stages before a bundle read and wrote, compared with the files that lie there now.

DVC records MD5 only, which proves nothing about origin; what is published is SHA-256, computed from the same files
after their MD5 was found to be the recorded one. Entries of the bundle's own stage and of later ones are never read:
while `dvc repro` bundles, those are the last run's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pathspec
import yaml

from pipeline.errors import BundleError
from pipeline.files import sha256_of

LOCK = Path("dvc.lock")
_IGNORE = Path(".dvcignore")
Stages = Mapping[str, Mapping[str, Any]]


def read_stages(path: Path = LOCK) -> Stages:
    """The recorded stages by name; none without the file. Raises BundleError when it is not a lock of DVC 3."""
    if not path.exists():
        return {}
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        stages = (document or {}).get("stages") or {}
        return {name: {kind: _entries(stage, kind) for kind in ("deps", "outs")} for name, stage in stages.items()}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BundleError(f"{path} cannot be read as a lock of DVC ({reason}). Run `dvc repro`.") from None


def _entries(stage: Any, kind: str) -> dict[str, str]:
    """Path → MD5 of a stage's dependencies or outputs. A path that leaves the project is refused."""
    entries = {}
    for entry in stage.get(kind) or ():
        path = PurePosixPath(entry["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{entry['path']!r} lies outside the project")
        entries[str(path)] = str(entry["md5"])
    return entries


def upstream(stages: Stages, targets: Iterable[Path]) -> dict[str, Mapping[str, Any]]:
    """The stages that made `targets`, directly or through others, by name in sorted order."""
    wanted, found = {path.as_posix() for path in targets}, set()
    while True:
        makers = {
            name for name in stages if any(_overlap(out, path) for out in stages[name]["outs"] for path in wanted)
        }
        if makers == found:
            return {name: stages[name] for name in sorted(found)}
        found = makers
        wanted |= {path for name in found for path in stages[name]["deps"]}


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def gaps(stages: Stages, targets: Iterable[Path]) -> list[str]:
    """What `stages` and `targets` need of artifacts/ that none of the stages is recorded to have written."""
    needed = {path.as_posix() for path in targets} | {path for stage in stages.values() for path in stage["deps"]}
    outs = [out for stage in stages.values() for out in stage["outs"]]
    made = {path for path in needed if any(_overlap(out, path) for out in outs)}
    return sorted(path for path in needed - made if path.startswith("artifacts/"))


def check(stages: Stages) -> None:
    """Compare every dependency and output that is here with its recorded MD5.

    One that is not here is passed over: `dvc repro --allow-missing` builds from the recorded hash alone. So is
    configuration, which DVC compares by value.

    Raises:
        BundleError: a file is another than the stage read or wrote, so its record is not that of this bundle.
    """
    ignored, computed = _ignored(), {}
    for name, stage in stages.items():
        for kind, verb in (("deps", "read"), ("outs", "wrote")):
            for path, recorded in stage[kind].items():
                if path.startswith("configs/") or not Path(path).exists():
                    continue
                found = computed[path] if path in computed else _md5(Path(path), ignored)
                computed[path] = found
                if found != recorded:
                    raise BundleError(
                        f"{path} has changed since {name} {verb} it: {LOCK} has MD5 {recorded}, found {found}. A "
                        f"bundle made now would state a false origin. Run `dvc repro`, or `dvc commit {name}` if the "
                        f"change alters no result."
                    )


def code(stages: Stages) -> dict[str, str]:
    """SHA-256 by path of every source file that a stage depends on: what git keeps, not what stages write."""
    ignored = _ignored()
    paths = {path for stage in stages.values() for path in stage["deps"]}
    sources = [Path(path) for path in paths if Path(path).parts[0] == "pipeline"]
    files = [file for path in sources for file in (_listing(path, ignored) if path.is_dir() else [path])]
    return {file.as_posix(): sha256_of(file) for file in sorted(set(files)) if file.is_file()}


def _ignored() -> pathspec.PathSpec:
    lines = _IGNORE.read_text(encoding="utf-8").splitlines() if _IGNORE.exists() else []
    return pathspec.GitIgnoreSpec.from_lines(lines)


def _listing(folder: Path, ignored: pathspec.PathSpec) -> list[Path]:
    """The files of a folder that DVC sees, in the order of its record."""
    files = [file for file in folder.rglob("*") if file.is_file() and not ignored.match_file(file.as_posix())]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _md5(path: Path, ignored: pathspec.PathSpec) -> str:
    """MD5 as DVC 3 records it: of a file's bytes, or of a folder's listing (JSON, sorted by relative path)."""
    if path.is_file():
        return _file_md5(path)
    listing = [
        {"md5": _file_md5(file), "relpath": file.relative_to(path).as_posix()} for file in _listing(path, ignored)
    ]
    return f"{hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest()}.dir"


def _file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
