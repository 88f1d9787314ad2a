"""What a bundle was made from, for its provenance: the code key of all stages that lead to it, the lock and git.

What must not be in it, so that the same materials give the same bytes on every machine: what the pipeline itself wrote
on the way (results with timings, which a machine may also lack), configs/released.yaml (recording a release changes
nothing about it) and configs/pipeline.yaml (which models a run covers; the suite is a parameter), the commit at hand
when it changed none of the materials, and anything of the machine: paths, names, users, times.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline import keys
from pipeline.bundle.bom import PIPELINE
from pipeline.bundle.dossier import origin, pypi
from pipeline.bundle.provenance import Material
from pipeline.checkpoint.lock import SourceLock
from pipeline.config.models import load_pipeline
from pipeline.config.recipes import load_recipe
from pipeline.config.typed_yaml import read
from pipeline.errors import BundleError, ConfigError
from pipeline.keys.commit import git
from pipeline.workspace import Workspace

LOCK = Path("dvc.lock")
Stages = Mapping[str, Mapping[str, Any]]
CHAIN = (
    "pipeline.stages.download",
    "pipeline.stages.export",
    "pipeline.stages.calibrate",
    "pipeline.stages.sensitivity",
    "pipeline.stages.parity",
    "pipeline.stages.learn",
    "pipeline.stages.quantize",
    "pipeline.stages.validate",
    "pipeline.stages.verdict",
)
"""The stages whose code and configuration decide a bundle. Their names here make them part of its own key."""
_ELSEWHERE = ("load_datasets", "load_pipeline", "load_released")
_REACHABLE = {"http", "https", "ssh", "git"}  # schemes of a remote that is no folder


def gather(
    workspace: Workspace, variant: str, lock: SourceLock
) -> tuple[dict[str, str], dict[str, list[str]], list[Material], str | None]:
    """For the provenance of a variant's bundle: external and internal parameters, materials, the pipeline's commit.

    Raises:
        BundleError: dvc.lock is damaged, or a file is not the one that a stage before this one read or wrote.
    """
    targets = [workspace.artifact(variant), workspace.verdict(variant), workspace.measurements(variant), workspace.lock]
    keys.refresh()
    stages = upstream(read_stages(), targets)
    check_recorded(stages)
    decided = keys.record("pipeline.stages.bundle", workspace.model, variant)
    configured = {name: value for name, value in decided["configuration"].items() if name not in _ELSEWHERE}
    settings = {f"configuration/{name.removeprefix('load_')}": keys.digest(it) for name, it in configured.items()}
    head = _commit([*decided["modules"], "configs", ":!configs/pipeline.yaml", ":!configs/released.yaml"])
    items = [
        *checkpoint(lock),
        *datasets(decided["configuration"]["load_datasets"]["datasets"]),
        *[Material(name=path, digest={"sha256": digest}) for path, digest in (decided["modules"] | settings).items()],
        # Without local labels: torch 2.13.0+cpu and 2.13.0 are one release.
        *[Material(uri=str(pypi(name, it.split("+")[0]))) for name, it in decided["libraries"].items()],
        *([head] if head else []),
    ]
    chosen = {"recipe": load_recipe(variant).title, "suite": load_pipeline().suite}
    internal = {"recordedStages": list(stages), "unrecorded": gaps(stages, targets)}
    commit = head["digest"]["gitCommit"] if head else None
    return {"model": workspace.model, "variant": variant} | chosen, internal, items, commit


def checkpoint(lock: SourceLock) -> Iterator[Material]:
    """The checkpoint's files, and the package that they were unpacked from, if they were."""
    purl = origin(lock)
    if lock.source.get("kind") == "pypi":
        digest = {"sha256": lock.source["sha256"]}
        yield Material(name="checkpoint", uri=str(purl), digest=digest, annotations={"member": lock.source["member"]})
    hub = f"https://huggingface.co/{lock.source['repo']}/resolve/{lock.revision}" if "repo" in lock.source else None
    for file in lock.files:
        uri = f"{hub}/{file.name}" if hub else None
        yield Material(name=f"checkpoint/{file.name}", uri=uri, digest={"sha256": file.sha256})


def datasets(pinned: Mapping[str, Mapping[str, Any]]) -> Iterator[Material]:
    """The pinned data of calibration and evaluation: a wheel's hash, or a dataset repository's commit."""
    for name, source in sorted(pinned.items()):
        if source["kind"] == "hub":
            uri = f"https://huggingface.co/datasets/{source['repo']}/resolve/{source['revision']}/{source['member']}"
            yield Material(name=f"dataset/{name}", uri=uri, digest={"gitCommit": source["revision"]})
        else:
            uri, member = str(pypi(source["package"], source["version"])), {"member": source["member"]}
            yield Material(name=f"dataset/{name}", uri=uri, digest={"sha256": source["sha256"]}, annotations=member)


# --- git -------------------------------------------------------------------------------------------------------------


def _commit(paths: list[str]) -> Material | None:
    """The last commit that changed one of `paths`, and whether they differ from it. None outside git."""
    commit = git("log", "-1", "--format=%H", "--", *paths)
    if not commit:
        return None
    place = public_uri(git("remote", "get-url", "origin"))
    uri = f"git+{place}@{commit}" if place else None
    changed = {"uncommittedChanges": True} if git("status", "--porcelain", "--", *paths) else {}
    return Material(name=PIPELINE, uri=uri, digest={"gitCommit": commit}, annotations=changed)


def public_uri(remote: str) -> str | None:
    """A git remote without user, password, query and fragment; None for a folder, and for none.

    `git@host:owner/name` is ssh://host/owner/name.
    """
    if scp := re.fullmatch(r"(?:[^/@:]+@)?([^/@:]{2,}):(?!//)(\S+)", remote):
        remote = f"ssh://{scp[1]}/{scp[2].lstrip('/')}"
    try:
        parts = urlsplit(remote)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return None
    if parts.scheme not in _REACHABLE or not parts.hostname or "@" in parts.path:
        return None
    return urlunsplit((parts.scheme, f"{parts.hostname}{port}", parts.path, "", ""))


# --- dvc.lock --------------------------------------------------------------------------------------------------------
# What the stages before a bundle read and wrote, compared with the files that lie there now. DVC records MD5 only,
# which proves nothing about origin; what is published is SHA-256, computed from the same files after their MD5 was
# found to be the recorded one. Entries of the bundle's own stage and of later ones are never read: while `dvc repro`
# bundles, those are the last run's.


def read_stages(path: Path = LOCK) -> Stages:
    """The recorded stages by name; none without the file. Raises BundleError when it is not a lock of DVC 3."""
    if not path.exists():
        return {}
    try:
        stages = (read(path) or {}).get("stages") or {}
        return {name: {kind: _entries(stage, kind) for kind in ("deps", "outs")} for name, stage in stages.items()}
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BundleError(f"{path} cannot be read as a lock of DVC ({reason}). Run `dvc repro`.") from None


def _entries(stage: Any, kind: str) -> dict[str, str]:
    """Path → MD5 of a stage's dependencies or outputs. A path that leaves the project is refused."""
    entries = {str(PurePosixPath(entry["path"])): str(entry["md5"]) for entry in stage.get(kind) or ()}
    if outside := [path for path in entries if path.startswith("/") or ".." in path.split("/")]:
        raise ValueError(f"{outside[0]!r} lies outside the project")
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


def check_recorded(stages: Stages) -> None:
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
