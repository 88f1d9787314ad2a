"""preflight: memory, disk and time that each stage takes, against what this machine has, before any of it is spent.

Every heavy stage is refused by `require` before its first byte; `run` prints the whole table. There, stages share the
disk in their order, and a refused one takes none of it. A stage whose output is there is shown, but counts neither for
the exit status nor for the disk: whether the output is current is DVC's to know. Estimates are for the workers of the
configured engine, or for those that are asked about, which need not be there.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import files, machine
from pipeline.artifact.learned import RECORD
from pipeline.checkpoint.blobs import Store
from pipeline.config.calibration import load_calibration, load_parity, load_sensitivity
from pipeline.config.engine import load_engine
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.phones import load_tiers
from pipeline.config.recipes import has_budget, load_recipe
from pipeline.engine import chosen
from pipeline.errors import PipelineError, ResourceError
from pipeline.parity.compare import cut, cut_references
from pipeline.preflight import needs
from pipeline.preflight.chance import outlook
from pipeline.preflight.compensation import damping
from pipeline.preflight.configuration import check_all
from pipeline.preflight.footprints import Source, computed, find_source, known
from pipeline.preflight.needs import UNMEASURED, Needs, Rates
from pipeline.preflight.rounds import Workers
from pipeline.runtime.session import runs_layered
from pipeline.tasks.registry import load_suite
from pipeline.workspace import ARTIFACTS, REFERENCE, Workspace

_WIDTH = 118
_MORE_MEMORY = {
    "calibrate": "Shorten `window` in configs/calibration.yaml, or run the stage on a larger machine.",
    "sensitivity": "Lower the tokens of `texts` in configs/sensitivity.yaml, or run the stage on a larger machine.",
    "learn": "Shorten `window` in configs/calibration.yaml, or run the stage on a larger machine.",
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
    def refusal(self) -> str | None:
        """The problem of a stage that has yet to run."""
        return None if self.there else self.problem

    @property
    def left(self) -> Room:
        """What the next stage finds."""
        return self.room if self.there or self.problem else self.room.after(self.needs)


def room() -> Room:
    """What this machine has now."""
    store = Store().root
    shared = files.file_system(store) == files.file_system(ARTIFACTS)
    return Room(machine.available_memory(), files.free_disk(ARTIFACTS), files.free_disk(store), shared)


def require(model: str, wanted: Needs) -> None:
    """Refuse a stage that this machine cannot finish. Takes milliseconds.

    Raises:
        ResourceError: with the stage, the model, what is needed and there, and what to do.
    """
    if found := problem(model, wanted, room()):
        raise ResourceError(found)


def problem(model: str, wanted: Needs, has: Room) -> str | None:
    """Why a stage does not fit into `has`, in one paragraph; None when it does."""
    on = "free on the file system of {}" + " after the stages before it" * has.planned
    here, store = wanted.disk + wanted.store_disk * has.shared, Store().root
    enlarge = "Free at least {missing:,} bytes, or "
    for what, needed, free, where, advice in (
        ("memory", wanted.memory, has.memory, "available", _MORE_MEMORY.get(wanted.stage, _ANY_MEMORY)),
        ("disk", here, has.disk, on.format(ARTIFACTS), enlarge + "move the working tree to a larger disk."),
        ("disk", wanted.store_disk, has.store, on.format(store), enlarge + "point PIPELINE_STORE at a larger disk."),
    ):
        if needed > free:
            stage = " ".join(filter(None, (wanted.stage, model, wanted.variant)))
            return (
                f"{stage}: not enough {what}: {needed:,} bytes needed ({wanted.why}), {free:,} {where}. "
                f"{advice.format(model=model, missing=needed - free)}"
            )
    return None


def download_needs(source: Source | None, has: Room) -> Needs:
    """For a model of unknown shapes, only what the stage itself takes."""
    missing, weights = (source.missing, source.weight_bytes) if source else (0, 0)
    return needs.download(missing, 0 if has.shared else weights)


def stage_needs(
    model: str, variants: tuple[str, ...], memory: int, rates: Rates = UNMEASURED, suite: str = ""
) -> Iterator[Needs]:
    """Every stage after download, in the order of the pipeline, where `memory` bytes are available.

    `suite`: that of configs/pipeline.yaml unless another is named.

    Raises PipelineError for what cannot be planned.
    """
    entry, asked, calibration = load_model(model), load_suite(suite or load_pipeline().suite), load_calibration()
    found = known(model)
    architecture = found.architecture
    yield needs.export(architecture, entry.context)
    yield needs.calibrate(architecture, calibration, rates)
    if has_budget(variants):
        yield needs.sensitivity(architecture, load_sensitivity(), rates)
    compared = cut_references(cut(architecture, load_parity().memory_bytes), found.references).values()
    yield needs.parity(sum(ref.elements for ref in compared), sum(ref.length for ref in compared))
    context = load_tiers().context
    artifacts = [computed(found, variant, context) for variant in variants]
    for one in artifacts:
        recipe = load_recipe(one.variant)
        size = one.download.bytes
        if recipe.learn:
            yield needs.learn(one.variant, size, architecture, recipe.learn, calibration.window, rates)
        yield needs.quantize(one.variant, size, architecture, recipe.search, rates, recipe.rotation)
    if runs_layered(asked.reference, found.weight_bytes, architecture.parameters, memory):
        yield needs.layered_reference(architecture, found.weight_bytes, asked, entry, memory, rates)
    else:
        yield needs.reference(architecture, found.weight_bytes, asked, entry, rates)
    for one in artifacts:
        yield needs.validate(architecture, one.variant, one.download.bytes, one.cache_bytes, asked, entry, rates)
    yield from map(needs.bundle, variants)


# --- the table --------------------------------------------------------------------------------------------------------


def run(models: tuple[str, ...] = (), asked: Workers | None = None) -> int:
    """Print what every stage of `models` (default: those of configs/pipeline.yaml) takes; 1 if one cannot run here.

    `asked`: the workers whose time is estimated, in place of the configured engine's; the head node has their cores, if
    this machine has fewer.
    """
    check_all()
    rows: list[Row] = []
    failed, unknown, run = [], [], load_pipeline()
    try:
        workers = asked or _configured()
    except PipelineError as absent:  # as the stages will say; the estimates are those of this machine alone
        failed, workers = [str(absent)], None
    measured = Rates(machine.product_rate(), machine.cores())
    rates = measured.of(max(measured.cores, asked.cores)) if asked else measured
    texts: list[str] = []
    has = start = room()
    for model in models or run.models:
        own, error = _survey(model, rates, has)
        rows, has = rows + own, own[-1].left
        texts += [sentence for row in own if not row.there for sentence in _writing(row)]
        if error:
            failed.append(f"{model}: {error}")
        elif len(own) == 1:
            unknown.append(
                f"{model}: its shapes are unknown, so nothing else can be said: add them to configs/shapes.yaml or run "
                f"`python -m pipeline download {model}`: it refuses what the disk cannot hold and says what cannot run."
            )
        else:
            texts += filter(None, [damping(model, run.variants)])
            if not (found := known(model)).downloaded:
                unknown.append(f"{model}: its shapes, and so all figures, are from {found.origin}.")
    refusals = [row.refusal for row in rows if row.refusal] + failed
    print(_table(rows, workers), end="\n\n")
    decided = [outlook(model, variant, run.suite) for model in models or run.models for variant in run.variants]
    said = (*texts, *_totals(rows, start, measured, workers), *decided, *(f"NO: {text}" for text in refusals), *unknown)
    for sentence in said:
        print(textwrap.fill(sentence, _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return 1 if refusals else 0


def _configured() -> Workers | None:
    """The engine's workers, None for threads of this process. Raises PipelineError where the engine cannot be had."""
    config = load_engine()
    return Workers(chosen().workers, config.cores) if config.engine == "ray" else None


def misfits(model: str) -> list[str]:
    """What of a downloaded model will not run on this machine, stage by stage: known before the first of them does."""
    rows, error = _survey(model, UNMEASURED, room())
    return [row.refusal for row in rows if row.refusal] + ([error] if error else [])


def _survey(model: str, rates: Rates, has: Room) -> tuple[list[Row], str | None]:
    """The rows of one model, the download alone while its shapes are not known, and why there are no more, if not
    for that."""
    rows: list[Row] = []
    source = find_source(model, Store())
    later = stage_needs(model, load_pipeline().variants, has.memory, rates) if source else ()
    try:
        for wanted in chain([download_needs(source, has)], later):
            rows.append(Row(model, wanted, has, _output(model, wanted).exists(), problem(model, wanted, has)))
            has = rows[-1].left
    except PipelineError as error:
        return rows, str(error)
    return rows, None


def _output(model: str, wanted: Needs) -> Path:
    """What is there once the stage has run."""
    workspace, variant = Workspace(model), wanted.variant or REFERENCE
    return {
        "download": workspace.lock,
        "export": workspace.export,
        "calibrate": workspace.moments,
        "sensitivity": workspace.nats,
        "parity": workspace.parity,
        "learn": workspace.learned(variant) / RECORD,
        "quantize": workspace.artifact(variant),
        "reference": workspace.evaluation(variant),
        "validate": workspace.evaluation(variant),
        "bundle": workspace.bundle(variant),
    }[wanted.stage]


def _table(rows: list[Row], workers: Workers | None) -> str:
    """At most 118 columns: a title per model, then its stages."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for number, heading in enumerate(_HEADER):
        table.add_column(heading, justify="right" if 2 <= number <= 6 else "left", no_wrap=True)
    for model, own in groupby(rows, key=lambda row: row.model):
        table.add_row(model)
        for row in own:
            table.add_row(*_cells(row, workers))
    with (console := Console(width=_WIDTH, color_system=None)).capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _cells(row: Row, workers: Workers | None) -> tuple[str, ...]:
    wanted, has = row.needs, row.room
    in_store = bool(wanted.store_disk) and not has.shared
    disk, free = (wanted.store_disk, has.store) if in_store else (wanted.disk + wanted.store_disk, has.disk)
    sizes = (f"{count / 1e9:.2f} GB" for count in (wanted.memory, has.memory, disk, free))
    state = "there already" if row.there else "NO" if row.problem else "ok"
    return f"  {wanted.stage}", wanted.variant or "", *sizes, _duration(wanted.expected(workers)), state


def _writing(row: Row) -> Iterator[str]:
    """How a model that memory cannot hold writes, task by task."""
    for one in row.needs.writing:
        yield (
            f"{one.title} of {row.model}, layer by layer: {one.texts:,} texts side by side, at most {one.passes:,} "
            f"passes over the weights, which read {one.read / 1e9:,.0f} GB, {_duration(one.seconds)}"
        )


def _totals(rows: list[Row], has: Room, rates: Rates, workers: Workers | None) -> list[str]:
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
    speed = f"{rates.flops / 1e9:.0f} GFLOP/s in matrix products on {rates.cores} cores, measured now"
    return [
        line,
        f"time: {_duration(_together(left, workers))} where it can be estimated ({speed}); reading and writing files, "
        f"the network and Optimum's export come on top",
        *(_of_workers(rows, workers) if workers else ()),
        "there already: the stage has an output; whether it is current, `dvc status` knows. Not counted above",
    ]


def _together(wanted: Iterable[Needs], workers: Workers | None) -> float:
    """Seconds of stages one after another; not a number where none is known."""
    return sum(one.expected(workers) for one in wanted if one.work) or math.nan


def _of_workers(rows: list[Row], workers: Workers) -> Iterator[str]:
    """What workers bring each model, whatever of it is there, and what one of them holds."""
    suite = load_pipeline().suite
    for model, own in groupby(rows, key=lambda row: row.model):
        if spread := [row.needs for row in own if row.needs.work]:
            most = max((one for one in spread if one.spread), key=lambda one: one.memory)
            seconds = (_duration(_together(spread, who)) for who in (workers, None))
            yield (
                "{}: {}, suite {}: {}, and {} with the head node's threads alone: stages one after another, those that "
                "are there too. A worker takes at most {:.1f} GB of memory ({})"
            ).format(workers, model, suite, *seconds, most.memory / 1e9, most.stage)


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"~{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"~{seconds / size:.1f} {unit}"
    return f"~{max(1, round(seconds))} s"
