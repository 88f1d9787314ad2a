"""preflight: memory, disk and time that each stage takes, against what this machine has, before any of it is spent.

Every heavy stage calls `require` before its first byte; `run` prints the whole table. There, stages share the disk in
their order, and a refused one takes none of it. A stage whose output is there is shown, but counts neither for the
exit status nor for the disk: whether the output is current is DVC's to know.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import machine
from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import ITEM_BYTES, TensorRef
from pipeline.config.calibration import load_calibration, load_sensitivity
from pipeline.config.models import ModelConfig, load_model, load_pipeline
from pipeline.config.parity import load_parity
from pipeline.config.recipes import BudgetRecipe, has_budget, load_recipe
from pipeline.config.sources import LocalSource
from pipeline.errors import PipelineError, ResourceError, SourceError
from pipeline.preflight import needs
from pipeline.preflight.needs import UNMEASURED, Needs, Rates
from pipeline.runtime.session import runs_layered
from pipeline.tasks.registry import Suite, load_suite
from pipeline.workspace import ARTIFACTS, MODEL_FILE, REFERENCE, Workspace

_WIDTH = 118
_CONFIG = "config.json"
_WEIGHTS = ".safetensors"
_MORE_MEMORY = {
    "calibrate": "Shorten `window` in configs/calibration.yaml, or run the stage on a larger machine.",
    "sensitivity": "Lower the tokens of `texts` in configs/sensitivity.yaml, or run the stage on a larger machine.",
    "parity": "Lower memory_bytes in configs/parity.yaml: a smaller part of the model is compared then.",
    "reference": (
        "Let it run layer by layer (`reference: auto` in the suite), or run this stage once on a larger machine (dvc "
        "repro reference@{model} && dvc push), then `dvc pull` its results here: variants need them, not the model."
    ),
}
_ANY_MEMORY = "Close other programs, raise the container's limit, or run the stage on a larger machine."
_HEADER = ("  stage", "variant", "memory", "available", "disk", "free", "estimate", "")


@dataclass(frozen=True)
class Room:
    """Bytes that are free: memory, and disk where `artifacts/` and where the store lie (`shared`: the same disk).

    `planned`: what earlier stages will write is taken off already.
    """

    memory: int
    disk: int
    store: int
    shared: bool
    planned: bool = False

    def after(self, wanted: Needs) -> Room:
        """What a stage leaves on the disks when it has ended."""
        if wanted.scratch:
            return self
        disk, store = wanted.disk, wanted.store_disk
        if self.shared:
            disk = store = disk + store
        return replace(self, disk=self.disk - disk, store=self.store - store, planned=True)


@dataclass(frozen=True)
class Row:
    """One line of the table: what a stage takes, what it finds, and why that is not enough (None: it is)."""

    model: str
    needs: Needs
    room: Room
    there: bool
    problem: str | None

    @property
    def refused(self) -> bool:
        """Whether the stage has yet to run and cannot run here."""
        return self.problem is not None and not self.there

    @property
    def left(self) -> Room:
        """What the next stage finds."""
        return self.room if self.there or self.problem else self.room.after(self.needs)


def room() -> Room:
    """What this machine has now."""
    store = Store().root
    shared = machine.file_system(store) == machine.file_system(ARTIFACTS)
    return Room(machine.available_memory(), machine.free_disk(ARTIFACTS), machine.free_disk(store), shared)


def require(model: str, wanted: Needs) -> None:
    """Refuse a stage that this machine cannot finish. Takes milliseconds.

    Raises:
        ResourceError: with the stage, the model, what is needed and there, and what to do.
    """
    if found := problem(model, wanted, room()):
        raise ResourceError(found)


def problem(model: str, wanted: Needs, has: Room) -> str | None:
    """Why a stage does not fit into `has`, in one paragraph; None when it does."""
    what = " ".join(filter(None, (wanted.stage, model, wanted.variant)))
    if wanted.memory > has.memory:
        advice = _MORE_MEMORY.get(wanted.stage, _ANY_MEMORY).format(model=model)
        return (
            f"{what}: not enough memory: {wanted.memory:,} bytes needed ({wanted.why}), {has.memory:,} available. "
            f"{advice}"
        )
    here = wanted.disk + (wanted.store_disk if has.shared else 0)
    for needed, free, place, advice in (
        (here, has.disk, ARTIFACTS, "move the working tree to a larger disk"),
        (wanted.store_disk, has.store, Store().root, "point PIPELINE_STORE at a larger disk"),
    ):
        if needed > free:
            where = f"{place} after the stages before it" if has.planned else str(place)
            return (
                f"{what}: not enough disk: {needed:,} bytes needed ({wanted.why}), {free:,} free on the file system of "
                f"{where}. Free at least {needed - free:,} bytes, or {advice}."
            )
    return None


# --- what is known of a model before it runs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint whose config.json is on this machine; `missing` of its bytes are not in the store yet."""

    config: Path
    weight_bytes: int
    missing: int


def find_source(model: str, store: Store) -> Source | None:
    """From the source lock, or from a local folder; None for what only a download can tell."""
    workspace, source = Workspace(model), load_model(model).source
    with suppress(SourceError):  # no lock, a damaged one, or a store that lost its blobs: downloading mends them all
        lock = workspace.read_lock()
        missing = sum(file.size for file in lock.files if not store.has(file.sha256, file.size))
        sizes = {file.name: file.size for file in lock.files}
        return Source(store.path(lock.file(_CONFIG).sha256), _weight_bytes(sizes), missing)
    folder = Path(source.path).expanduser() if isinstance(source, LocalSource) else None
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    weights = _weight_bytes({file.name: file.stat().st_size for file in folder.iterdir()})
    return Source(folder / _CONFIG, weights, weights)


def download_needs(source: Source | None, has: Room) -> Needs:
    """For a source that is not known yet, only what the stage itself takes."""
    if source is None:
        return needs.download(0, 0)
    return needs.download(source.missing, 0 if has.shared else source.weight_bytes)


def require_download(model: str, store: Store) -> None:
    """As `require`. The store's share is checked by the fetching code, which knows what the store already holds."""
    require(model, replace(download_needs(find_source(model, store), room()), store_disk=0))


def reference_needs(
    architecture: Architecture,
    weight_bytes: int,
    suite: Suite,
    entry: ModelConfig,
    memory: int,
    rates: Rates = UNMEASURED,
) -> Needs:
    """What the reference stage takes where `memory` bytes are available."""
    if runs_layered(suite.reference, weight_bytes, architecture.parameters, memory):
        return needs.layered_reference(architecture, suite, entry, rates)
    return needs.reference(architecture, weight_bytes, suite, entry, rates)


def stage_needs(model: str, source: Source, variants: tuple[str, ...], memory: int, rates: Rates) -> Iterator[Needs]:
    """Every stage after download, in the order of the pipeline, where `memory` bytes are available.

    Raises PipelineError for what cannot be planned.
    """
    entry, suite = load_model(model), load_suite(load_pipeline().suite)
    calibration = load_calibration()
    architecture = read_architecture(source.config)
    refs = references(architecture, source.weight_bytes)
    yield needs.export(architecture, entry.context)
    yield needs.calibrate(architecture, calibration, rates)
    if has_budget(variants):
        yield needs.sensitivity(architecture, load_sensitivity(), rates)
    yield _parity(architecture, refs)
    sizes = _sizes(model, variants, architecture, refs, entry.context)
    for variant, (size, _) in sizes.items():
        search = load_recipe(variant).search
        yield needs.quantize(variant, size, architecture, search, calibration, rates)
    yield reference_needs(architecture, source.weight_bytes, suite, entry, memory, rates)
    for variant, (size, cache) in sizes.items():
        yield needs.validate(architecture, variant, size, cache, suite, entry, rates)
    for variant in variants:
        yield needs.bundle(variant)


def _weight_bytes(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name.endswith(_WEIGHTS))


def references(architecture: Architecture, weight_bytes: int) -> dict[str, TensorRef]:
    """A checkpoint's tensors without its files, in the type that its size tells: what plans are made of."""
    dtype = "F32" if weight_bytes >= 4 * architecture.parameters else "BF16"
    refs: dict[str, TensorRef] = {}
    offset = 0
    for name, shape in architecture.expected_tensors().items():
        ref = TensorRef(name, dtype, shape, "model.safetensors", offset, 0)
        refs[name] = replace(ref, length=ITEM_BYTES[dtype] * ref.elements)
        offset += refs[name].length
    return refs


def _parity(architecture: Architecture, refs: dict[str, TensorRef]) -> Needs:
    from pipeline.parity.compare import cut, cut_model

    part = cut(architecture, refs, load_parity().memory_bytes)
    return parity_needs(cut_model(architecture, refs, part)[1].values())


def parity_needs(compared: Iterable[TensorRef]) -> Needs:
    """Of the tensors that are compared."""
    tensors = list(compared)
    return needs.parity(sum(ref.elements for ref in tensors), sum(ref.length for ref in tensors))


def _sizes(
    model: str, variants: tuple[str, ...], architecture: Architecture, refs: dict[str, TensorRef], context: int
) -> dict[str, tuple[int, int]]:
    """Exact bytes of each variant's graph and parts, and of a token in its KV cache.

    Before the export is there, its graph is built in memory.
    """
    import onnx

    from pipeline.artifact.plans import budget_bound, plan_recipe
    from pipeline.graph.decoder import build_decoder
    from pipeline.planning.recipes import cache_of

    workspace = Workspace(model)
    exported = workspace.export / MODEL_FILE
    if exported.exists():
        graph = onnx.load(exported, load_external_data=False)
    else:
        graph, _ = build_decoder(architecture, refs, context)
    sizes = {}
    for variant in variants:
        recipe = load_recipe(variant)
        cache = cache_of(architecture, recipe.kv_cache).bytes
        if isinstance(recipe, BudgetRecipe) and not workspace.nats.exists():
            sizes[variant] = budget_bound(recipe, architecture).bytes, cache
        else:
            sizes[variant] = plan_recipe(recipe, architecture, graph, variant, model).draft.bytes, cache
    return sizes


# --- the table --------------------------------------------------------------------------------------------------------


def run(models: tuple[str, ...] = ()) -> int:
    """Print what every stage of `models` (default: those of configs/pipeline.yaml) takes; 1 if one cannot run here."""
    selected = load_pipeline()
    rates = Rates(machine.product_rate(), machine.cores())
    rows: list[Row] = []
    refusals, unknown = [], []
    has = start = room()
    for model in models or selected.models:
        try:
            for row in _rows(model, selected.variants, rates, has):
                rows.append(row)
                has = row.left
            if find_source(model, Store()) is None:
                unknown.append(_unknown(model))
        except PipelineError as error:
            refusals.append(f"{model}: {error}")
    refusals = [row.problem for row in rows if row.problem and row.refused] + refusals
    print("\n".join([_table(rows), "", *_totals(rows, start, rates)]))
    for sentence in [f"NO: {text}" for text in refusals] + unknown:
        print("\n".join(_wrapped(sentence)))
    return 1 if refusals else 0


def misfits(model: str) -> list[str]:
    """What of a downloaded model will not run on this machine, stage by stage: known before the first of them does."""
    found = []
    try:
        for row in _rows(model, load_pipeline().variants, UNMEASURED, room()):
            if row.problem and row.refused:
                found.append(row.problem)
    except PipelineError as error:
        found.append(str(error))
    return found


def _unknown(model: str) -> str:
    return (
        f"{model}: its config.json is not on this machine, so nothing else can be said of it: run `python -m pipeline "
        f"download {model}` first. That refuses before the first large byte if the store's disk is too small, and says "
        f"at its end which stages do not fit here."
    )


def _rows(model: str, variants: tuple[str, ...], rates: Rates, has: Room) -> Iterator[Row]:
    """The rows of one model: the download alone while its source is not known. Raises PipelineError as plans do."""
    source = find_source(model, Store())
    row = _row(model, download_needs(source, has), has)
    yield row
    if source:
        for wanted in stage_needs(model, source, variants, has.memory, rates):
            row = _row(model, wanted, row.left)
            yield row


def _row(model: str, wanted: Needs, has: Room) -> Row:
    return Row(model, wanted, has, _output(model, wanted).exists(), problem(model, wanted, has))


def _output(model: str, wanted: Needs) -> Path:
    """What is there once the stage has run."""
    workspace, variant = Workspace(model), wanted.variant or REFERENCE
    return {
        "download": workspace.lock,
        "export": workspace.export,
        "calibrate": workspace.moments,
        "sensitivity": workspace.nats,
        "parity": workspace.parity,
        "quantize": workspace.artifact(variant),
        "reference": workspace.evaluation(variant),
        "validate": workspace.evaluation(variant),
        "bundle": workspace.bundle(variant),
    }[wanted.stage]


def _table(rows: list[Row]) -> str:
    """At most 118 columns: a title per model, then its stages."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for number, heading in enumerate(_HEADER):
        table.add_column(heading, justify="right" if 2 <= number <= 6 else "left", no_wrap=True)
    for model, own in groupby(rows, key=lambda row: row.model):
        table.add_row(model)
        for row in own:
            table.add_row(*_cells(row))
    with (console := Console(width=_WIDTH, color_system=None)).capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _cells(row: Row) -> tuple[str, ...]:
    wanted, has = row.needs, row.room
    in_store = bool(wanted.store_disk) and not has.shared
    disk, free = (wanted.store_disk, has.store) if in_store else (wanted.disk + wanted.store_disk, has.disk)
    sizes = (f"{count / 1e9:.2f} GB" for count in (wanted.memory, has.memory, disk, free))
    state = "there already" if row.there else "NO" if row.problem else "ok"
    return f"  {wanted.stage}", wanted.variant or "", *sizes, _duration(wanted.seconds), state


def _totals(rows: list[Row], has: Room, rates: Rates) -> list[str]:
    """What all stages that have yet to run take together, and what the estimates rest on."""
    left = [row.needs for row in rows if not row.there]
    kept = [wanted for wanted in left if not wanted.scratch]
    disk, store = sum(wanted.disk for wanted in kept), sum(wanted.store_disk for wanted in kept)
    if has.shared:
        line = f"disk: {disk + store:,} bytes to be written and kept, {has.disk:,} free"
    else:
        line = (
            f"disk of {ARTIFACTS}: {disk:,} bytes to be written and kept, {has.disk:,} free; "
            f"disk of the store: {store:,}, {has.store:,} free"
        )
    known = sum(wanted.seconds for wanted in left if not math.isnan(wanted.seconds))
    speed = f"{rates.flops / 1e9:.0f} GFLOP/s in matrix products on {rates.cores} cores, measured now"
    sentences = (
        line,
        f"time: {_duration(known or math.nan)} where it can be estimated ({speed}); reading and writing files, "
        f"the network and Optimum's export come on top",
        "there already: the stage has an output; whether it is current, `dvc status` knows. Not counted above",
    )
    return [part for sentence in sentences for part in _wrapped(sentence)]


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"~{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"~{seconds / size:.1f} {unit}"
    return f"~{max(1, round(seconds))} s"
