"""What is known of a model before it runs, and what its variants take on a phone: measured where `validate` has
measured them, else computed from shapes.

A model that was not downloaded has the shapes of configs/shapes.yaml. Whether a measurement is current, `dvc status`
knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from pipeline.artifact.plans import budget_bound, plan_recipe
from pipeline.checkpoint.architecture import Architecture, expected_architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import ITEM_BYTES, TensorRef
from pipeline.config.models import load_model
from pipeline.config.phones import load_shapes
from pipeline.config.recipes import BudgetRecipe, load_recipe
from pipeline.config.sources import LocalSource
from pipeline.errors import PipelineError, PlanError, SourceError
from pipeline.files import read_json
from pipeline.graph.decoder import build_decoder
from pipeline.judge.measured import measured_candidate
from pipeline.judge.verdicts import read_verdict
from pipeline.planning.devices import Basis, Candidate, Figure, Footprint
from pipeline.planning.memory import packed_memory
from pipeline.runtime.roofline import traffic
from pipeline.workspace import MODEL_FILE, PLAN_FILE, Workspace

_CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint whose shapes are known: from the config.json on this machine, or where there is none from
    configs/shapes.yaml. `missing` of its bytes are not in the store yet."""

    config: Path | None
    weight_bytes: int
    missing: int


def find_source(model: str, store: Store) -> Source | None:
    """From the source lock, a local folder, or configs/shapes.yaml; None for what only a download can tell."""
    workspace, source = Workspace(model), load_model(model).source
    with suppress(SourceError):  # no lock, a damaged one, or a store that lost its blobs: downloading mends them all
        lock = workspace.read_lock()
        missing = sum(file.size for file in lock.files if not store.has(file.sha256, file.size))
        sizes = {file.name: file.size for file in lock.files}
        return Source(store.path(lock.file(_CONFIG).sha256), _weight_bytes(sizes), missing)
    folder = Path(source.path).expanduser() if isinstance(source, LocalSource) else None
    if folder is not None and (folder / _CONFIG).is_file():
        weights = _weight_bytes({file.name: file.stat().st_size for file in folder.iterdir()})
        return Source(folder / _CONFIG, weights, weights)
    if (shapes := load_shapes().models.get(model)) is None:
        return None
    weights = ITEM_BYTES["BF16"] * expected_architecture(shapes).parameters
    return Source(None, weights, weights)


def _weight_bytes(sizes: Mapping[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name.endswith(".safetensors"))


@dataclass(frozen=True)
class Known:
    """A model's architecture and size, and where its shapes are from."""

    model: str
    architecture: Architecture
    weight_bytes: int
    downloaded: bool
    context_cap: int

    @property
    def origin(self) -> str:
        """Where the shapes are from, for people."""
        return "its config.json" if self.downloaded else "configs/shapes.yaml: not downloaded yet"

    @cached_property
    def references(self) -> dict[str, TensorRef]:
        """The checkpoint's tensors without its files, in the type that its size tells: what plans are made of."""
        dtype = "F32" if self.weight_bytes >= 4 * self.architecture.parameters else "BF16"
        refs: dict[str, TensorRef] = {}
        offset = 0
        for name, shape in self.architecture.expected_tensors().items():
            ref = TensorRef(name, dtype, shape, "model.safetensors", offset, 0)
            refs[name] = replace(ref, length=ITEM_BYTES[dtype] * ref.elements)
            offset += refs[name].length
        return refs

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """The full-precision graph: the exported one, or before the export one that is built in memory."""
        exported = Workspace(self.model).export / MODEL_FILE
        if self.downloaded and exported.exists():
            return onnx.load(exported, load_external_data=False)
        return build_decoder(self.architecture, self.references, self.context_cap)[0]


def known(model: str) -> Known:
    """From the config.json that is on this machine, else from configs/shapes.yaml. Reads no weight.

    Raises PlanError when there is neither.
    """
    if (source := find_source(model, Store())) is None:
        raise PlanError(
            f"{model}: its config.json is not on this machine and configs/shapes.yaml has no entry for it. Run `python "
            f"-m pipeline download {model}`, or add its shapes."
        )
    config, shapes = source.config, load_shapes().models
    architecture = read_architecture(config) if config else expected_architecture(shapes[model])
    return Known(model, architecture, source.weight_bytes, config is not None, load_model(model).context)


def candidate(found: Known, variant: str, context: int) -> Candidate:
    """A variant, measured if `validate` has run for it, else computed; with its verdict if there is one. `context` in
    tokens, for a budget that names none. Raises PipelineError for a recipe that cannot be planned."""
    workspace = Workspace(found.model)
    if not workspace.measurements(variant).exists():
        return Candidate(computed(found, variant, context))
    metrics = workspace.read(workspace.measurements(variant), "validate", variant)
    verdict = read_verdict(workspace, variant).verdict if workspace.verdict(variant).exists() else None
    measured = measured_candidate(variant, metrics, verdict, _read_bytes(found, variant, context))
    written = workspace.artifact(variant) / PLAN_FILE
    added = read_json(written).get("speculative") if written.exists() else None
    return replace(measured, footprint=replace(measured.footprint, speculative=added and added["memory"]))


def computed(found: Known, variant: str, context: int) -> Footprint:
    """From shapes: exact for rules and for budgets whose sensitivities were measured, else the budget's bound."""
    recipe, architecture = load_recipe(variant), found.architecture
    basis: Basis = "computed"
    added: int | None = None
    if isinstance(recipe, BudgetRecipe) and not Workspace(found.model).nats.exists():
        most = budget_bound(recipe, architecture, context)
        basis, size, memory, packed, read = "bound", most.bytes, most.memory, most.packed, most.read
        cache_bytes = most.memory.cache // (recipe.budget.context or context)
    else:
        planned = plan_recipe(recipe, architecture, found.graph, variant, found.model)
        drafted, memory = planned.draft, planned.memory
        added = planned.speculation.memory if planned.speculation else None
        size, read = planned.bytes, traffic(drafted.model).weight_bytes
        packed, cache_bytes = sum(map(packed_memory, drafted.plan.tables)), drafted.plan.cache.bytes
    return Footprint(
        variant=variant,
        download=Figure(size, basis),
        weights=Figure(memory.weights, basis),
        activations=Figure(memory.activations, "computed"),
        prompt_token=memory.prompt_token,
        loading=Figure(memory.weights + memory.loading, basis),
        packed=Figure(packed, basis),
        kv_cache=recipe.kv_cache,
        cache_bytes=cache_bytes,
        read=Figure(read, basis),
        speculative=added,
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
