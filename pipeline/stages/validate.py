"""validate: measure the written files of a variant, or of the full-precision reference, in the runtimes that ship.

Per-item results are kept, so that gates and reports never run a model again, and a killed run goes on at its item.
Gates are the verdict stage's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai

import pipeline
from pipeline import config
from pipeline.artifact.partial import open_partial
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.store import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.evaluate.sandbox import require_isolation
from pipeline.files import sha256_of, write_json
from pipeline.stages import needs
from pipeline.stages.preflight import require
from pipeline.stages.quantize import PLAN_FILE
from pipeline.stages.validation import divergence, humaneval, mmlu, speed
from pipeline.stages.validation.subject import Subject
from pipeline.stages.workspace import MODEL_FILE, REFERENCE, Workspace


def run(model: str, variant: str) -> None:
    """Measure one variant (or `REFERENCE`) and write its per-item results and metrics."""
    isolation = require_isolation()  # before an hour of measuring, not after it
    subject = _subject(model, variant, isolation)
    _require_resources(subject)
    workspace = subject.workspace
    with open_partial(workspace.partial(f"evaluation.{variant}"), _key(subject)) as partial:
        partial.record("begun", "-")  # items in journals of their own are worth keeping
        metrics = {
            "size": _size(subject),
            "mmlu": mmlu.measure(subject, partial.folder),
            "divergence": divergence.measure(subject, partial.folder),
        }
        subject.unload()
        metrics["humaneval"] = humaneval.measure(subject, partial.folder)
        metrics["speed"] = speed.measure(subject, partial.folder)
        partial.finish(workspace.evaluation(variant))
    write_json(workspace.metrics(variant), metrics)
    print(f"{subject.name}: measured; metrics in {workspace.metrics(variant)}")


def _subject(model: str, variant: str, isolation: str) -> Subject:
    suite, store, workspace = config.load_suite(config.load_pipeline().suite), Store(), Workspace(model)
    if variant == REFERENCE:
        folder = workspace.reference(store)
        graph = folder / MODEL_FILE
    else:
        folder = workspace.require(workspace.artifact(variant), "quantize", variant)
        graph = folder / f"{workspace.file_stem(variant)}.onnx"
        workspace.require(workspace.evaluation(REFERENCE), "validate", REFERENCE)
    architecture = read_architecture(folder / "config.json")
    return Subject(workspace, variant, folder, graph, architecture, config.load_model(model), suite, store, isolation)


def _require_resources(subject: Subject) -> None:
    architecture, suite, mode = subject.architecture, subject.suite, subject.entry.mmlu_mode
    if subject.variant == REFERENCE:
        need = needs.reference(architecture, Checkpoint(subject.folder).weight_bytes, suite, mode)
    else:
        plan = _plan(subject)
        cache = plan["kv_cache"]["bytes_per_token"]
        need = needs.validate(architecture, subject.variant, plan["bytes"], cache, suite, mode)
    require(subject.workspace.model, need)


def _plan(subject: Subject) -> dict[str, Any]:
    return subject.workspace.read(subject.folder / PLAN_FILE, "quantize", subject.variant)


def _size(subject: Subject) -> dict[str, Any]:
    if subject.variant != REFERENCE:
        plan = _plan(subject)
        copied = {key: plan[key] for key in ("bits_per_weight", "parameters", "kv_cache")}
        return {"bytes_on_disk": plan["bytes"], **copied}
    parameters = subject.architecture.parameters
    total = subject.graph.stat().st_size + Checkpoint(subject.folder).weight_bytes
    return {"bytes_on_disk": total, "bits_per_weight": 8 * total / parameters, "parameters": parameters}


def _key(subject: Subject) -> str:
    """What decides the items: unfinished work goes on only under the same. SHA-256, 64 hex digits."""
    reference = subject.reference
    files = subject.workspace.export if reference is None else subject.folder
    package = Path(pipeline.__file__).parent
    code = [file for name in ("evaluate", "stages/validation") for file in (package / name).glob("*.py")]
    inputs = {
        "source": {file.name: file.sha256 for file in subject.workspace.read_lock().files},
        "files": {file.name: sha256_of(file) for file in sorted(files.iterdir())},
        "reference": reference and {file.name: sha256_of(file) for file in sorted(reference.iterdir())},
        "suite": subject.suite.model_dump(mode="json"),
        "datasets": config.load_datasets().model_dump(mode="json"),
        "model": subject.entry.model_dump(mode="json"),
        "code": [sha256_of(file) for file in sorted(code)],
        "libraries": [(module.__name__, module.__version__) for module in (np, onnxruntime, onnxruntime_genai)],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
