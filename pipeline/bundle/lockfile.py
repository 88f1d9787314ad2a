"""dvc.lock: what the stages before a bundle read and wrote, compared with the files that lie there now.

DVC records MD5 only, which proves nothing about origin; what is published is SHA-256, computed from the same files
after their MD5 was found to be the recorded one. Entries of the bundle's own stage and of later ones are never read:
while `dvc repro` bundles, those are the last run's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline import keys
from pipeline.errors import BundleError

LOCK = Path("dvc.lock")
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
    wanted, found, makers = {path.as_posix() for path in targets}, None, set[str]()
    while makers != found:
        found = makers
        wanted |= {path for name in found for path in stages[name]["deps"]}
        makers = {name for name in stages if any(_overlap(out, it) for out in stages[name]["outs"] for it in wanted)}
    return {name: stages[name] for name in sorted(makers)}


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def gaps(stages: Stages, targets: Iterable[Path]) -> list[str]:
    """What `stages` and `targets` need of artifacts/ that none of the stages is recorded to have written."""
    needed = {path.as_posix() for path in targets} | {path for stage in stages.values() for path in stage["deps"]}
    outs = [out for stage in stages.values() for out in stage["outs"]]
    unmade = (path for path in needed if not any(_overlap(out, path) for out in outs))
    return sorted(it for it in unmade if it.startswith("artifacts/") and keys.ARTIFACTS not in Path(it).parents)


def check(stages: Stages) -> None:
    """Compare every file that a stage read or wrote, and that is here, with its recorded MD5: its code key among them.

    One that is not here is passed over: `dvc repro --allow-missing` builds from the recorded hash alone. So are
    folders: the artifact's files are compared with its plan by SHA-256, and the others are DVC's.

    Raises:
        BundleError: a file is another than the stage read or wrote, so its record is not that of this bundle.
    """
    for name, stage in stages.items():
        for kind, verb in (("deps", "read"), ("outs", "wrote")):
            for path, recorded in stage[kind].items():
                if Path(path).is_file() and (found := _md5(Path(path))) != recorded:
                    changed = f"{path} has changed since {name} {verb} it: {LOCK} has MD5 {recorded}, found {found}"
                    remedy = f"Run `dvc repro`, or `dvc commit {name}` if the change alters no result."
                    raise BundleError(f"{changed}. A bundle made now would state a false origin. {remedy}")


def _md5(path: Path) -> str:
    """As DVC 3 records it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
