"""What `compare` compares, found by what a user types: q4, reference, q4@HEAD~1, or a folder with an artifact.

Git has a dozen figures of a revision only. An artifact's folder, here or of another working tree, is measured if it
lies where the pipeline has it, artifacts/MODEL/variants/VARIANT: its measurements, verdict and results by item then lie
beside it.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.models import load_model, load_pipeline
from pipeline.config.recipes import load_recipe
from pipeline.errors import ConfigError, EvaluationError
from pipeline.files import read_json
from pipeline.judge.verdicts import Verdict
from pipeline.tasks.task import Metrics
from pipeline.workspace import ARTIFACTS, GENAI_CONFIG, PLAN_FILE, REFERENCE, Workspace

_OF_A_REVISION = "Git has only its metrics"


@dataclass(frozen=True)
class Side:
    """One of the two. `folder` and `evaluation` are None where they are not on this machine; `make` and
    `measure` say how they come there."""

    name: str
    metrics: Metrics
    verdict: str | None = None
    folder: Path | None = None
    evaluation: Path | None = None
    make: str = ""
    measure: str = "nothing is measured outside artifacts/MODEL/variants"

    def section(self, name: str) -> Metrics:
        """A section of the metrics; empty where nothing was measured."""
        return self.metrics.get(name) or {}


def find_side(text: str, model: str | None) -> Side:
    """What a user named: of `model`, None for the one of configs/pipeline.yaml, unless it is a folder.

    Raises:
        ConfigError: there is no such variant or model, or several models and none was named.
        PipelineError: it was not measured, or what was measured does not read.
    """
    if "/" in text and (Path(text).exists() or "@" not in text):
        return _folder(Path(text))
    variant, at, revision = text.partition("@")
    workspace = Workspace(_model(model))
    if variant != REFERENCE:
        load_recipe(variant)
    if at:
        metrics = _metrics_at(revision, workspace.metrics(variant))
        return Side(text, metrics, metrics.get("verdict"), measure=_OF_A_REVISION, make=_OF_A_REVISION)
    workspace.read(workspace.measurements(variant), "validate", variant)
    folder = workspace.root / REFERENCE if variant == REFERENCE else workspace.artifact(variant)
    return _measured(ARTIFACTS, workspace.model, variant, folder, text)


def _model(named: str | None) -> str:
    models = load_pipeline().models
    if named is None and len(models) > 1:
        raise ConfigError(f"configs/pipeline.yaml has several models ({', '.join(models)}): choose one with --model.")
    load_model(named or models[0])
    return named or models[0]


def _metrics_at(revision: str, path: Path) -> Metrics:
    """What Git has of a metrics file, at a path from the current folder."""
    command = ["git", "show", "--end-of-options", f"{revision}:./{path.as_posix()}"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0 and isinstance(found := json.loads(done.stdout), dict):
            return found
        problem = done.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
    except (OSError, ValueError) as error:
        problem = str(error)
    raise EvaluationError(
        f"Git has no metrics {path} at revision {revision!r} ({problem}). `git log --oneline -- {path}` lists the "
        f"revisions that changed it."
    )


def _folder(folder: Path) -> Side:
    """An artifact's folder, which is measured where it lies as the pipeline has it: MODEL/variants/VARIANT."""
    if not (folder / GENAI_CONFIG).is_file():
        raise EvaluationError(f"{folder} holds no artifact: it has no {GENAI_CONFIG}. Name a variant, or its folder.")
    place = folder.absolute()
    if place.parent.name != "variants":
        return Side(str(folder), _planned(folder), folder=folder)
    return _measured(place.parents[2], place.parents[1].name, place.name, folder, str(folder))


def _measured(root: Path, model: str, variant: str, folder: Path, name: str) -> Side:
    """A variant of the artifacts under `root`, with as much of its measurements as lies there."""
    name_of = Path(model) / f"{variant}.json"
    metrics, verdict = root / "measurements" / name_of, root / "verdicts" / name_of
    evaluation = root / model / "evaluation" / variant
    make = f"validate {model} {REFERENCE}" if variant == REFERENCE else f"quantize {model} {variant}"
    return Side(
        name,
        _read(metrics) if metrics.exists() else _planned(folder),
        Verdict.from_json(_read(verdict)).verdict if verdict.exists() else None,
        folder if (folder / GENAI_CONFIG).exists() else None,
        evaluation if evaluation.exists() else None,
        f"`python -m pipeline {make}`",
        f"`python -m pipeline validate {model} {variant}`",
    )


def _planned(folder: Path) -> Metrics:
    """The size that an artifact's plan says, where nothing was measured."""
    try:
        plan = read_json(folder / PLAN_FILE)
        return {"size": {"bytes_on_disk": plan["bytes"], "bits_per_weight": plan["bits_per_weight"]}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        if isinstance(found := read_json(path), dict):
            return found
        problem = "it is no JSON object"
    except ValueError as error:
        problem = str(error)
    raise EvaluationError(f"{path} is damaged ({problem}). Remove it and run `dvc repro` where it lies.")
