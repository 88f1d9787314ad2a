"""quantize: a recipe applied to a model: the plan with its exact size, then the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from pipeline import keys, machine
from pipeline.artifact.learned import adopt, digests_of, lost_of, require_learned
from pipeline.artifact.lost import sentence
from pipeline.artifact.plans import Planned, plan_recipe
from pipeline.artifact.quantizers import WEIGHTS_PER_CORE_SECOND, Compensated, Search
from pipeline.artifact.rotated import Rotated
from pipeline.artifact.write import write_artifact
from pipeline.calibrate.results import read_moments, read_products, read_ranges
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.recipes import Recipe, load_recipe
from pipeline.engine import chosen
from pipeline.errors import PlanError
from pipeline.files import read_json, remove_leftovers, sha256_of, write_bytes, write_json
from pipeline.graph.decoder import ROPE_FILE
from pipeline.graph.speculative import MTP_FILE
from pipeline.partial import Partial, discard, open_partial
from pipeline.planning.memory import packed_memory
from pipeline.planning.recipes import Plan
from pipeline.quantize.lost import Lost
from pipeline.workspace import GENAI_CONFIG, MODEL_FILE, PLAN_FILE, Workspace


def run(model: str, variant: str, dry_run: bool = False) -> None:
    """Write artifacts/<model>/variants/<variant>, continuing what a killed run began.

    With `dry_run`, print the plan, the exact sizes and an estimate of the time.
    """
    recipe = load_recipe(variant)
    workspace = Workspace(model)
    weights = workspace.weights(Store())
    architecture = read_architecture(weights / "config.json")
    source = onnx.load(workspace.require(workspace.export / MODEL_FILE, "export"), load_external_data=False)
    planned = plan_recipe(recipe, architecture, source, variant, model)
    drafted = planned.draft
    checkpoint = Rotated(weights, architecture, recipe.rotation)
    print(describe(planned, architecture.parameters))
    if dry_run:
        cores, text = machine.cores(), ", and one pass of the calibration text" * (recipe.search == "gptq")
        seconds = architecture.parameters / (WEIGHTS_PER_CORE_SECOND[recipe.search] * cores)
        print(f"  estimate: about {seconds:,.0f} s of computing on {cores} cores (computed){text}")
        return
    key, folder = artifact_key(workspace, recipe, planned), workspace.artifact(variant)
    grown = workspace.learned(variant)
    learned = require_learned(grown, key) if recipe.learn else {}
    key = learned.get("key", key)
    remove_leftovers(folder)
    if record := _intact(folder, key, recipe.lost_max):
        discard(workspace.partial(variant))
        decided = key, record["sha256"], lost_of(record), learned
        write_json(folder / PLAN_FILE, plan_record(planned, recipe, architecture.parameters, *decided))
        print(f"{model} {variant}: written before from the same plan, weights and code; {planned.bytes:,} bytes kept")
        return
    with open_partial(workspace.partial(variant), key) as growing:
        if learned:
            adopt(learned, grown, growing.folder)
        lost = lost_of(learned) if learned else write_files(growing, recipe, planned, checkpoint, workspace)
        decided = key, digests_of(growing.folder), lost, learned
        write_json(growing.folder / PLAN_FILE, plan_record(planned, recipe, architecture.parameters, *decided))
        names = drafted.files + (planned.speculation.files if planned.speculation else ())
        written = sum((growing.folder / name).stat().st_size for name in names)
        if written != planned.bytes:
            raise PlanError(f"{model} {variant}: {written:,} bytes written, {planned.bytes:,} planned. This is a bug.")
        growing.finish(folder)
    for name, item in lost.items():
        print(sentence(name, item))
    print(f"{model} {variant}: {written:,} bytes written, as planned")


def write_files(
    growing: Partial, recipe: Recipe, planned: Planned, checkpoint: Rotated, workspace: Workspace
) -> dict[str, Lost]:
    """The artifact's files, all but the plan, in `growing.folder`; what float16 lost of it, by tensor."""
    ranges = checkpoint.ranges(read_ranges(workspace)) if recipe.kv_cache == "int8" else None
    with ExitStack() as stack:
        search = _search(recipe, workspace, checkpoint, stack)
        lost = write_artifact(
            growing, planned.draft, checkpoint, workspace.export, search, chosen(), ranges, recipe.lost_max
        )
    if planned.speculation:
        planned.speculation.write(growing, checkpoint.folder, workspace.export, recipe)
    _make_runnable(growing.folder, workspace, planned.draft.model_file)
    return lost


def _search(recipe: Recipe, workspace: Workspace, checkpoint: Rotated, stack: ExitStack) -> Search:
    """What `search` of a recipe names."""
    if recipe.search == "nearest":
        return Search()
    measured = read_moments(workspace)
    moments = checkpoint.moments(measured)
    if recipe.search == "weighted":
        return Search(moments)
    # Units of rows keep all cores busy; a product that took them all too would only get in their way.
    stack.enter_context(threadpool_limits(1, "blas"))

    return Compensated(moments, partial(_products, workspace, checkpoint, measured))


def _products(
    workspace: Workspace, checkpoint: Rotated, measured: Mapping[str, np.ndarray], name: str
) -> tuple[np.ndarray, float]:
    found, damping = read_products(workspace, name, measured[name])
    return checkpoint.products(name, found), damping


def _intact(folder: Path, key: str, lost_max: float) -> dict[str, Any] | None:
    """The record of the artifact in `folder` if `key` decides its bytes, they are all there, and no
    tensor lost more than `lost_max`, else None.

    A tier or a title that was edited changes no byte, and a run killed after its last byte need not begin again.
    """
    try:
        record = read_json(folder / PLAN_FILE)
    except (OSError, ValueError):
        return None
    accepted = all(lost["share"] <= lost_max for lost in record.get("lost", {}).values())
    return record if accepted and record.get("key") == key and record["sha256"] == digests_of(folder) else None


def artifact_key(workspace: Workspace, recipe: Recipe, planned: Planned) -> str:
    """What decides an artifact's bytes before learning: unfinished work goes on only under the same. 64 hex digits.

    The moments' file names what made the correlations beside it.
    """
    statistics = [workspace.moments] * (recipe.search != "nearest") + [workspace.ranges] * (recipe.kv_cache == "int8")
    inputs = {
        "source": [file.sha256 for file in workspace.read_lock().files],  # by hand, nobody may have exported it again
        "export": {file.name: sha256_of(file) for file in workspace.export.iterdir()},
        "statistics": [sha256_of(workspace.require(file, "calibrate")) for file in statistics],
        "search": recipe.search,
        "rotation": recipe.rotation.model_dump(),
        "parts": planned.draft.layout.parts,
        "plan": [(item.matrix.name, item.formats) for item in planned.draft.plan.tables],
    }
    if planned.speculation:
        inputs["speculative"] = planned.speculation.record() | {"settings": planned.speculation.settings}
    return keys.digest([keys.code(__name__), machine.kernel_class(), inputs])


def _make_runnable(folder: Path, workspace: Workspace, model_file: str) -> None:
    """Complete the artifact with the export's tokenizer and configuration: onnxruntime-genai loads it as it lies."""
    for file in workspace.export.iterdir():
        if file.name not in {MODEL_FILE, MTP_FILE, ROPE_FILE, GENAI_CONFIG}:
            write_bytes(folder / file.name, file.read_bytes())
    settings = read_json(workspace.export / GENAI_CONFIG)
    settings["model"]["decoder"]["filename"] = model_file
    write_json(folder / GENAI_CONFIG, settings)


def describe(planned: Planned, parameters: int) -> str:
    """The plan for people: formats by role with their bytes, the largest first; parts, exact total, memory, budget."""
    drafted, memory = planned.draft, planned.memory
    rows: dict[tuple[str, str], list[int]] = {}
    for item in drafted.plan.tables:
        role = "embedding and head" if drafted.plan.tied and item is drafted.plan.head else item.matrix.role
        rows.setdefault((role, item.formats), []).append(item.bytes)
    lines = [f"{drafted.model_file}: the plan"]
    roles = list(dict.fromkeys(role for role, _ in rows))
    for role, formats in sorted(rows, key=lambda row: (roles.index(row[0]), -sum(rows[row]))):
        sizes = rows[role, formats]
        lines.append(f"  {role:<19} {formats:<24} × {len(sizes):<3} {sum(sizes):>15,} bytes")
    lines.append(
        f"  {drafted.bytes:,} bytes in {len(drafted.layout.parts)} part(s) and the graph: "
        f"{8 * drafted.bytes / parameters:.2f} bits per weight, body {drafted.plan.body_bits:.2f}"
    )
    if turned := _rotations(drafted.plan):
        lines.append(f"  rotated: {', '.join(turned)}")
    if drafted.plan.cache.type != "float32":
        lines.append(f"  KV cache in {drafted.plan.cache.type}: {drafted.plan.cache.bytes:,} bytes per token")
    lines.append(
        f"  in use at {planned.context:,} tokens about {memory.peak:,} bytes of memory: weights {memory.weights:,}, "
        f"cache {memory.cache:,}, activations {memory.activations:,}"
    )
    if added := planned.speculation:
        lines.append(
            f"  for speculative decoding by {next(iter(added.settings))} {added.bytes:,} bytes more, and about "
            f"{added.memory:,} of memory"
        )
    if planned.solution:
        lines.append(
            f"  predicted divergence {planned.solution.cost:.4f} nats; no plan within the budget is predicted to lose "
            f"more than {planned.solution.gap:.2%} less"
        )
    return "\n".join(lines)


def _rotations(plan: Plan) -> list[str]:
    """What is rotated, for people."""
    run, found = plan.rotation.run(plan.head.matrix.columns), list[str]()
    if run:
        found.append(f"residual stream in runs of {run}")
    if plan.rotation.values:
        found.append("values by heads")
    runs = sorted({(item.matrix.kind, item.rotated) for item in plan.body if item.rotated})
    return found + [f"{kind} in runs of {size} when it runs" for kind, size in runs]


def plan_record(
    planned: Planned, recipe: Recipe, parameters: int, key: str, digests: dict[str, str], lost: Mapping[str, Lost],
    learned: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """The plan for machines. `key`: what decided the artifact's bytes; `digests`: their SHA-256 by file; `lost`: what
    float16 lost, by tensor; `learned`: the record of what was learned, if anything was."""
    drafted, solution = planned.draft, planned.solution
    record: dict[str, Any] = {
        "recipe": {"title": recipe.title, "version": recipe.version, "search": recipe.search},
        "rotation": recipe.rotation.model_dump(),
        "key": key,
        "sha256": digests,
        "bytes": planned.bytes,
        "parts": list(drafted.layout.parts),
        "parameters": parameters,
        "bits_per_weight": 8 * drafted.bytes / parameters,
        "body_bits_per_weight": drafted.plan.body_bits,
        "packed_bytes": sum(map(packed_memory, drafted.plan.tables)),
        "kv_cache": {"type": drafted.plan.cache.type, "bytes_per_token": drafted.plan.cache.bytes},
        "prompt_token_bytes": planned.memory.prompt_token,
        "tensors": {
            item.matrix.name: {"role": item.matrix.role, "format": item.formats, "bytes": item.bytes}
            for item in drafted.plan.tables
        },
    }
    if solution:  # rules do not depend on the context, so an edited one must not change their plan
        record |= {"predicted_nats": solution.cost, "least_possible_nats": solution.bound}
        record["memory"] = planned.memory.record() | {"context": planned.context}
    if planned.speculation:
        record["speculative"] = planned.speculation.record()
    if learned:
        record["learned"] = learned["learned"]
    if lost:
        record["lost"] = {name: item._asdict() for name, item in lost.items()}
    return record
