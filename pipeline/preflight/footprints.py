"""What variants take on a phone: measured where `validate` has measured them, else computed from shapes.

A model that was not downloaded has the shapes of configs/shapes.yaml. Whether a measurement is current, `dvc status`
knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError

from pipeline.artifact.plans import budget_bound, plan_recipe
from pipeline.checkpoint.architecture import Architecture, expected_architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.config.phones import load_shapes
from pipeline.config.recipes import BudgetRecipe, load_recipe
from pipeline.errors import PipelineError, PlanError
from pipeline.graph.decoder import build_decoder
from pipeline.judge.measured import measured_candidate
from pipeline.judge.verdicts import read_verdict
from pipeline.planning.devices import Candidate, Figure, Footprint
from pipeline.planning.memory import packed_memory
from pipeline.preflight.machine import find_source, references
from pipeline.runtime.roofline import traffic
from pipeline.workspace import MODEL_FILE, Workspace


@dataclass(frozen=True)
class Known:
    """A model's architecture, the full-precision graph that plans are made from, and where its shapes are from."""

    model: str
    architecture: Architecture
    graph: onnx.ModelProto
    origin: str
    context_cap: int


def known(model: str) -> Known:
    """From the config.json that was downloaded, else from configs/shapes.yaml. Reads no weight.

    Raises PlanError when there is neither.
    """
    entry, source, workspace = load_model(model), find_source(model, Store()), Workspace(model)
    shapes = load_shapes().models.get(model)
    if source is not None:
        architecture, weight_bytes, origin = read_architecture(source.config), source.weight_bytes, "its config.json"
    elif shapes is not None:
        architecture = expected_architecture(shapes)
        weight_bytes, origin = 2 * architecture.parameters, "configs/shapes.yaml: not downloaded yet"
    else:
        raise PlanError(
            f"{model}: its config.json is not on this machine and configs/shapes.yaml has no entry for it. Run `python "
            f"-m pipeline download {model}`, or add its shapes."
        )
    exported = workspace.export / MODEL_FILE
    if source is not None and exported.exists():
        graph = onnx.load(exported, load_external_data=False)
    else:
        graph, _ = build_decoder(architecture, references(architecture, weight_bytes), entry.context)
    return Known(model, architecture, graph, origin, entry.context)


def candidates(found: Known, variants: Sequence[str], context: int) -> list[Candidate]:
    """Every variant of a model; `context` in tokens, for budgets that name none.

    Raises PipelineError for a recipe that cannot be planned.
    """
    return [candidate(found, variant, context) for variant in variants]


def candidate(found: Known, variant: str, context: int) -> Candidate:
    """Measured if `validate` has run for the variant, else computed; with its verdict if there is one."""
    workspace = Workspace(found.model)
    if not workspace.metrics(variant).exists():
        return Candidate(computed(found, variant, context))
    metrics = workspace.read(workspace.metrics(variant), "validate", variant)
    verdict = read_verdict(workspace, variant).verdict if workspace.verdict(variant).exists() else None
    return measured_candidate(variant, metrics, verdict, _read_bytes(found, variant, context))


def computed(found: Known, variant: str, context: int) -> Footprint:
    """From shapes: exact for rules and for budgets whose sensitivities were measured, else the budget's bound."""
    recipe, architecture = load_recipe(variant), found.architecture
    if isinstance(recipe, BudgetRecipe) and not Workspace(found.model).nats.exists():
        most = budget_bound(recipe, architecture, context)
        basis, size, memory, packed, read = "bound", most.bytes, most.memory, most.packed, most.read
        cache_bytes = most.memory.cache // (recipe.budget.context or context)
    else:
        planned = plan_recipe(recipe, architecture, found.graph, variant, found.model)
        drafted, memory = planned.draft, planned.memory
        basis, size, read = "computed", drafted.bytes, traffic(drafted.model).weight_bytes
        packed, cache_bytes = sum(map(packed_memory, drafted.plan.tables)), drafted.plan.cache.bytes
    return Footprint(
        variant=variant,
        download=Figure(size, basis),
        weights=Figure(memory.weights, basis),
        activations=Figure(memory.activations, "computed"),
        loading=Figure(memory.weights + memory.loading, basis),
        packed=Figure(packed, basis),
        kv_cache=recipe.kv_cache,
        cache_bytes=cache_bytes,
        read=Figure(read, basis),
    )


def _read_bytes(found: Known, variant: str, context: int) -> Figure | None:
    """What a token reads: of the written graph if it is here, else of the planned one."""
    workspace = Workspace(found.model)
    written = workspace.artifact(variant) / f"{workspace.file_stem(variant)}.onnx"
    if not written.exists():
        return computed(found, variant, context).read
    try:
        return Figure(traffic(onnx.load(written, load_external_data=False)).weight_bytes, "computed")
    except (OSError, DecodeError) as error:
        raise PipelineError(f"{written} cannot be read as a graph ({error}). Run `dvc repro` again.") from None
