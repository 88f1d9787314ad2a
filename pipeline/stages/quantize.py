"""quantize: a recipe applied to a model: the plan with its exact size, then the artifact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx

from pipeline import config
from pipeline.artifact.write import Draft, draft, write_artifact
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.store import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import PlanError
from pipeline.files import atomic_directory, read_json, write_json
from pipeline.graph.decoder import ROPE_FILE
from pipeline.planning.recipes import make_plan
from pipeline.stages.calibrate import read_moments
from pipeline.stages.workspace import GENAI_CONFIG, MODEL_FILE, Workspace

PLAN_FILE = "plan.json"


def run(model: str, variant: str, dry_run: bool = False) -> None:
    """Write artifacts/<model>/variants/<variant>; with `dry_run`, print the plan only."""
    recipe = config.load_recipe(variant)
    workspace = Workspace(model)
    weights = workspace.weights(Store())
    architecture = read_architecture(weights / "config.json")
    source = onnx.load(workspace.require(workspace.export / MODEL_FILE, "export"), load_external_data=False)
    drafted = draft(source, make_plan(architecture, recipe), workspace.file_stem(variant), recipe.part_bytes)
    print(describe(drafted, architecture.parameters))
    if dry_run:
        return
    moments = read_moments(workspace) if recipe.search == "weighted" else None
    with atomic_directory(workspace.artifact(variant)) as folder:
        write_artifact(folder, drafted, Checkpoint(weights), workspace.export, moments)
        written = sum(file.stat().st_size for file in folder.iterdir())
        if written != drafted.bytes:
            raise PlanError(f"{model} {variant}: {written:,} bytes written, {drafted.bytes:,} planned. This is a bug.")
        _make_runnable(folder, workspace, drafted.model_file)
        write_json(folder / PLAN_FILE, plan_record(drafted, recipe, architecture.parameters))
    print(f"{model} {variant}: {written:,} bytes written, as planned")


def _make_runnable(folder: Path, workspace: Workspace, model_file: str) -> None:
    """Complete the artifact with the export's tokenizer and configuration: onnxruntime-genai loads it as it lies."""
    for file in workspace.export.iterdir():
        if file.name not in {MODEL_FILE, ROPE_FILE, GENAI_CONFIG}:
            shutil.copyfile(file, folder / file.name)
    settings = read_json(workspace.export / GENAI_CONFIG)
    settings["model"]["decoder"]["filename"] = model_file
    write_json(folder / GENAI_CONFIG, settings)


def describe(drafted: Draft, parameters: int) -> str:
    """The plan for people: formats by role with their bytes, the parts and the exact total."""
    rows: dict[tuple[str, str], list[int]] = {}
    for item in drafted.plan.tables:
        role = "embedding and head" if drafted.plan.tied and item is drafted.plan.head else item.matrix.role
        rows.setdefault((role, item.formats), []).append(item.bytes)
    lines = [f"{drafted.model_file}: the plan"]
    for (role, formats), sizes in rows.items():
        lines.append(f"  {role:<19} {formats:<24} × {len(sizes):<3} {sum(sizes):>15,} bytes")
    lines.append(
        f"  {drafted.bytes:,} bytes in {len(drafted.layout.parts)} part(s) and the graph: "
        f"{8 * drafted.bytes / parameters:.2f} bits per weight, body {drafted.plan.body_bits:.2f}"
    )
    return "\n".join(lines)


def plan_record(drafted: Draft, recipe: config.RecipeConfig, parameters: int) -> dict[str, Any]:
    """The plan for machines."""
    return {
        "recipe": {"title": recipe.title, "version": recipe.version, "search": recipe.search},
        "bytes": drafted.bytes,
        "parts": list(drafted.layout.parts),
        "parameters": parameters,
        "bits_per_weight": 8 * drafted.bytes / parameters,
        "body_bits_per_weight": drafted.plan.body_bits,
        "tensors": {
            item.matrix.name: {"role": item.matrix.role, "format": item.formats, "bytes": item.bytes}
            for item in drafted.plan.tables
        },
    }
