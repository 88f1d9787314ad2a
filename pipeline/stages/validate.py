"""validate: measure the written files of a variant, or of the full-precision reference, in the runtimes that ship.

Per-item results are kept, so that gates and reports never run a model again, a killed run goes on at its item, and
what did not change is not measured twice: each task's results are valid under that task's own key
(`pipeline.tasks.sections`). Gates are the verdict stage's.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import machine
from pipeline.checkpoint.architecture import TALKING, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import load_model, load_pipeline
from pipeline.files import read_json, sha256_of, write_json
from pipeline.judge import escalation
from pipeline.partial import open_partial
from pipeline.runtime.device import CPU, chosen_device, computed_by
from pipeline.runtime.generate import Writer
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.layered_writer import LayeredWriter
from pipeline.runtime.session import OnnxDecoder, runs_layered, runtimes
from pipeline.tasks import kept
from pipeline.tasks.kept import STATES
from pipeline.tasks.registry import Suite, load_suite
from pipeline.tasks.sections import key_of, measured_files
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import Task
from pipeline.workspace import MODEL_FILE, PLAN_FILE, REFERENCE, Workspace

_SIZES = ("bits_per_weight", "packed_bytes", "parameters", "kv_cache", "prompt_token_bytes")  # as planned
_LAYOUT = "one folder per task"  # of unfinished work; another one is not continued


def run(model: str, variant: str) -> None:
    """Measure one variant (or `REFERENCE`) and write its per-item results and measurements."""
    suite, workspace = load_suite(load_pipeline().suite), Workspace(model)
    for task, part in suite.by_task():
        task.machine(part)  # what cannot be measured here is refused before an hour of measuring, not after it
    subject = _subject(model, variant, suite)
    files = measured_files(subject)
    metrics = _facts(subject)
    with open_partial(workspace.partial(f"evaluation.{variant}"), _LAYOUT) as partial:
        partial.record("begun", "-")  # items in journals of their own are worth keeping
        for task, part in suite.by_task():
            for wanted in _wanted(task, part, model, variant):
                found = _measured(task, replace(subject, wanted=wanted), files, partial.folder, metrics)
                if found is not None:
                    metrics[task.name] = found
                if variant == REFERENCE or not escalation.waits(task, model, variant, metrics):
                    break
        partial.finish(workspace.evaluation(variant))
    if subject.layered:
        metrics["identity"]["device"] = computed_by()
    write_json(workspace.measurements(variant), metrics)
    print(f"{subject.name}: measured; all figures in {workspace.measurements(variant)}")


def _wanted(task: Task, part: Any, model: str, variant: str) -> list[Any]:
    """A part as it is asked first, and as it is asked while looks do not decide. The reference is asked at once what
    variants may be asked at most."""
    stops = task.stops(part) if task.stops and escalation.judged(task, model) else ()
    parts = [part.model_copy(update={task.counted[0]: stop}) for stop in stops] or [part]
    return parts[-1:] if variant == REFERENCE else parts


def _measured(
    task: Task, subject: Subject, files: dict[str, str], partial: Path, before: dict[str, Any]
) -> dict[str, Any] | None:
    """A task's metrics, kept or measured; None for what has nothing to be made from, or needs the model in memory.

    `before`: the metrics of the tasks before it.
    """
    workspace, folder = Workspace(subject.model), partial / task.name
    reference = None if subject.variant == REFERENCE else kept.finished(workspace.evaluation(REFERENCE) / task.name)
    source = partial / task.reads if task.reads in before and subject.variant == REFERENCE else None
    if task.reads and not (source or reference):
        print(f"  {task.name}: not measured: the reference has no {task.reads} to make it from.")
        return None
    asked = replace(subject, reference=reference, states=folder / STATES, source=source)
    key = key_of(task, asked, files)
    said = kept.adopt(folder, workspace.evaluation(subject.variant) / task.name, key)
    if subject.large and task.whole and kept.metrics_of(folder, key) is None:
        print(f"  {task.name}: left out: this machine's memory does not hold the model, and no gate asks for it.")
        return None
    print(f"  {task.name}: {said}")
    return kept.measured(folder, key, lambda items: task.measure(asked, items))


def _subject(model: str, variant: str, suite: Suite) -> Subject:
    """What is validated."""
    store, workspace, entry = Store(), Workspace(model), load_model(model)
    if variant == REFERENCE:
        folder = workspace.reference(store)
        graph = folder / MODEL_FILE
    else:
        folder = workspace.require(workspace.artifact(variant), "quantize", variant)
        graph = folder / f"{workspace.file_stem(variant)}.onnx"
        for task, _ in suite.by_task():
            if task.runs_graph and not task.reads:
                workspace.require(workspace.evaluation(REFERENCE) / task.name, "validate", REFERENCE)
    architecture = read_architecture(folder / "config.json")
    large = variant == REFERENCE and runs_layered(
        suite.reference, Checkpoint(folder).weight_bytes, architecture.parameters, machine.available_memory()
    )
    layered = large or (variant == REFERENCE and suite.reference == "auto" and chosen_device() is not CPU)
    device = chosen_device().name if layered else CPU.name
    return Subject(
        model, variant, folder, graph, architecture, entry, store, large, layered, device, _open, _open_writer
    )


def _open(subject: Subject) -> OnnxDecoder | LayeredDecoder:
    if subject.layered:
        return LayeredDecoder(subject.graph, subject.architecture, subject.states, subject.name)
    return OnnxDecoder(subject.graph)


def _open_writer(subject: Subject) -> Writer | LayeredWriter:
    if subject.layered:
        return LayeredWriter(subject.graph, subject.architecture, subject.states, subject.name)
    return Writer(subject.folder)


def _facts(subject: Subject) -> dict[str, Any]:
    """What exactly was measured and what ran it, and its size."""
    workspace, parameters = Workspace(subject.model), subject.architecture.parameters
    system = f"{platform.system()} {platform.machine()}"
    identity = {"revision": workspace.read_lock().revision, **runtimes(), "system": system}
    if mark := read_json(subject.folder / "config.json").get(TALKING):
        identity[TALKING] = mark
    if subject.variant == REFERENCE:
        total = subject.graph.stat().st_size + Checkpoint(subject.folder).weight_bytes
        size = {"bytes_on_disk": total, "bits_per_weight": 8 * total / parameters, "parameters": parameters}
    else:
        plan = workspace.read(subject.folder / PLAN_FILE, "quantize", subject.variant)
        size = {"bytes_on_disk": plan["bytes"]} | {key: plan[key] for key in _SIZES}
        identity["plan_sha256"] = sha256_of(subject.folder / PLAN_FILE)
    return {"identity": identity, "size": size}
