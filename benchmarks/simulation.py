"""Hours of a release by the number of workers: the stages of dvc.yaml, simulated from measured times of units.

python -m benchmarks.simulation

Stages and their order are DVC's own graph. A stage is the rounds of units that `pipeline.preflight.needs` makes of it,
with the rate of this machine's matrix products, measured now: nodes differ in their number of cores alone. Workers take
units in the order in which rounds begin; what is not spread is done by the head node, one thing at a time. Stages that
preflight does not foretell take what they took in the rehearsal of MiMo. One worker is one machine with its threads.
"""

from __future__ import annotations

import heapq
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.conversion import SENSITIVITY
from benchmarks.full_size import MODELS
from benchmarks.markdown import table
from benchmarks.project import RESULTS, ROOT
from benchmarks.quality.plot import INK, LINE, framed
from pipeline import machine
from pipeline.config.calibration import CalibrationConfig, load_sensitivity
from pipeline.config.models import load_model, load_pipeline
from pipeline.files import read_json, write_bytes, write_json
from pipeline.preflight import needs
from pipeline.preflight.footprints import known
from pipeline.preflight.machine import stage_needs
from pipeline.preflight.needs import ENGINE_SECONDS, Needs, Rates
from pipeline.preflight.rounds import NETWORK, Phase, Workers, phases
from pipeline.tasks.registry import suite_type

SUITE, COUNTS = "release", (1, 4, 16, 64)
NODES = {2: 24, 16: 128}
"""Cores of a node, and GB of its memory."""
REHEARSAL = "rehearsal-mimo-8b"
RESULT, PLOT = RESULTS / "simulation.json", RESULTS / "simulation.png"

Graph = Mapping[str, Sequence[str]]
"""Stages in an order that DVC may run them in, each with those that it waits for."""
Jobs = Mapping[str, Sequence[Phase]]


# --- the graph, and what its stages do -------------------------------------------------------------------------------


def graph(models: Sequence[str], variants: Sequence[str]) -> Graph:
    """The stages of dvc.yaml for these models and variants, from DVC."""
    from dvc.repo import Repo
    from networkx import lexicographical_topological_sort

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "dvc.yaml", folder)
        shutil.copytree(ROOT / "configs", Path(folder) / "configs")
        run = {"models": [*models], "variants": [*variants], "suite": SUITE}
        (Path(folder) / "configs/pipeline.yaml").write_text(yaml.safe_dump(run))
        with Repo(folder, uninitialized=True) as repo:
            edges = repo.index.graph  # from each stage to what it waits for
            names = {stage: stage.name for stage in edges}
            places = {stage: place for place, stage in enumerate(edges)}
            ordered = lexicographical_topological_sort(edges.reverse(), key=places.__getitem__)
            return {names[stage]: [names[other] for other in edges[stage]] for stage in ordered}


def jobs(stages: Iterable[str], model: str, found: Iterable[Needs], took: Mapping[str, float], who: Workers) -> Jobs:
    """What each stage does: by preflight, or where that foretells nothing for as many seconds as it took."""
    foretold = {"-".join(filter(None, (f"{one.stage}@{model}", one.variant))): one for one in found if one.work}
    return {
        name: [*_job(foretold[name], who)] if name in foretold else [Phase(took[name.partition("@")[0]], [], 0)]
        for name in stages
    }


def _job(one: Needs, who: Workers) -> Iterator[Phase]:
    if who.count == 1:
        yield Phase(one.expected(), [], 0)
        return
    yield Phase(one.fixed + ENGINE_SECONDS * one.spread, [], 0)
    for phase in phases(one.work, who):
        yield from [phase] * phase.times


def measured_seconds() -> dict[str, float]:
    """What stages took that preflight does not foretell, by their name; without a recipe that learns, `learn` has as
    little to do as `sensitivity` had there."""
    took = {
        step["name"].partition("@")[0]: step["wall_seconds"]
        for step in read_json(RESULTS / f"{REHEARSAL}.json")["steps"]
    }
    return took | {"learn": took["sensitivity"]}


# --- the simulation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A simulated release: seconds at which each stage began and ended."""

    begun: dict[str, float]
    ended: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return max(self.ended.values())

    def took(self, stage: str) -> float:
        """Seconds of a stage, those that it waited for workers included."""
        return self.ended[stage] - self.begun[stage]

    def critical(self, after: Graph) -> list[str]:
        """The stages that the end waited for, in their order: each one's last dependency before it."""
        path = [max(self.ended, key=self.ended.__getitem__)]
        while waited := after[path[0]]:
            path.insert(0, max(waited, key=self.ended.__getitem__))
        return path


def one_by_one(after: Graph) -> Graph:
    """The same stages, each of which waits for the one before it: one `dvc repro`."""
    return {name: [*after[name], *before] for name, before in zip(after, [[], *([name] for name in after)])}  # noqa: B905


def simulate(work: Jobs, after: Graph, workers: int) -> Run:
    """Stages as soon as what they wait for has ended; `after` in an order that fits."""
    free, head = [0.0] * workers, 0.0  # when each worker, and the head node, has nothing to do
    begun, ended = dict[str, float](), dict[str, float]()
    steps = {name: iter(phase) for name, phase in work.items()}
    events: list[tuple[float, int, str, Phase | None]]
    events = [(0.0, place, name, None) for place, name in enumerate(after) if not after[name]]
    heapq.heapify(events)
    order = {name: place for place, name in enumerate(after)}
    while events:
        now, _, name, phase = heapq.heappop(events)
        begun.setdefault(name, now)
        if phase is None:  # the next round, first what the head node does of it
            phase = next(steps[name], None)
            if phase is None:
                ended[name] = now
                ready = [other for other in after if name in after[other] and all(one in ended for one in after[other])]
                for other in ready:
                    heapq.heappush(events, (now, order[other], other, None))
            else:
                if phase.alone:
                    now = head = max(now, head) + phase.alone
                heapq.heappush(events, (now, order[name], name, phase))
        else:
            last = now + phase.link
            for size in phase.sizes:
                done = max(now, free[0]) + size
                heapq.heapreplace(free, done)
                last = max(last, done)
            heapq.heappush(events, (last, order[name], name, None))
    return Run(begun, ended)


def release(
    model: str, after: Graph, found: Sequence[Needs], cores: int, took: Mapping[str, float], network: float
) -> Iterator[dict[str, Any]]:
    """A row for each number of workers of so many cores."""
    for count in COUNTS:
        work = jobs(after, model, found, took, Workers(count, cores, network=network))
        chain, together = simulate(work, one_by_one(after), count), simulate(work, after, count)
        yield {
            "model": model,
            "workers": count,
            "cores": cores,
            "one_by_one_seconds": chain.seconds,
            "side_by_side_seconds": together.seconds,
            "critical": [[name, together.took(name)] for name in together.critical(after)],
            "stages": {
                name: {"seconds": chain.took(name), "head_seconds": sum(phase.alone for phase in work[name])}
                for name in after
            },
        }


# --- how far it can be trusted ---------------------------------------------------------------------------------------


def compared(per_core: float) -> list[dict[str, Any]]:
    """Stages that were measured at full width on 2 cores, beside what the model says of them. Left out: `calibrate` in
    the conversion, which wrote no correlations then."""
    rows = list[dict[str, Any]]()
    for name, layers in ((REHEARSAL, None), (f"{REHEARSAL}-2layers", 2)):
        record = read_json(RESULTS / f"{name}.json")
        took = {
            step["name"]
            .replace(f"@talking-mimo-8b{f'-{layers}layers' * bool(layers)}", " ")
            .replace(" -", " ")
            .strip(): step
            for step in record["steps"]
        }
        rows += _beside(f"MiMo, {layers or 'all'} layers", took, _rehearsed(record, layers))
    for model in MODELS:
        record = read_json(RESULTS / f"conversion-{model}.json")
        took = {"sensitivity": record["sensitivity"]}
        took |= {f"quantize {run['variant']}": run for run in record["variants"]}
        rows += _beside(f"{model}, short text", took, _converted(model, Rates(2 * per_core, 2)))
    return rows


def _rehearsed(record: Mapping[str, Any], layers: int | None) -> Iterator[Needs]:
    found, suite = known("mimo-8b"), suite_type().model_validate(record["suite"])
    architecture = replace(found.architecture, layers=layers or found.architecture.layers)
    asked = load_model("mimo-8b").model_copy(update={"mmlu_mode": "cloze", "humaneval_prompt": "completion"})
    rates = Rates(record["predicted"][0]["products_per_second"], record["machine"]["cores"])
    calibration = CalibrationConfig(**record["calibration"])
    yield needs.calibrate(architecture, calibration, rates)
    if layers:
        yield needs.sensitivity(architecture, load_sensitivity(), rates)
        yield needs.quantize("q4", 0, architecture, "gptq", rates)
        yield needs.reference(architecture, 0, suite, asked, rates)
        yield needs.validate(architecture, "q4", 0, 0, suite, asked, rates)
    else:
        yield needs.quantize("q4_weighted", 0, architecture, "weighted", rates)
        memory = record["machine"]["memory_bytes"]
        yield needs.layered_reference(architecture, found.weight_bytes, suite, asked, memory, rates)
        yield needs.validate(architecture, "q4_weighted", 0, 0, suite, asked, rates)


def _converted(model: str, rates: Rates) -> Iterator[Needs]:
    architecture = known(model).architecture
    yield needs.sensitivity(architecture, load_sensitivity().model_copy(update=SENSITIVITY), rates)
    yield needs.quantize("q4", 0, architecture, "weighted", rates)


def _beside(what: str, took: Mapping[str, Any], found: Iterable[Needs]) -> Iterator[dict[str, Any]]:
    for one in found:
        stage = " ".join(filter(None, (one.stage, one.variant)))
        own = {name: took[stage][name] for name in ("wall_seconds", "cpu_seconds")}
        yield {"what": what, "stage": stage, "model_seconds": one.expected(), **own}


# --- tables and the plot ---------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """What docs/scale.md shows of it."""
    return {"hours": hours(result), "heads": heads(result), "trust": trust(result)}


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.{0 if seconds >= 36000 else 1 if seconds >= 3600 else 2}f}"


def _short(stage: str, model: str) -> str:
    """`quantize q4` for quantize@mimo-8b-q4."""
    return stage.replace(f"@{model}", " ").replace(" -", " ").strip()


def _who(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['workers']} × {row['cores']} cores"


def hours(result: Mapping[str, Any]) -> str:
    """A row for each model, node and number of workers."""
    head = (
        "model, workers",
        "one by one, h",
        "side by side, h",
        "critical path side by side (stages of over 5 % of it)",
    )
    rows = []
    for row in result["rows"]:
        total = row["side_by_side_seconds"]
        path = (
            f"{_short(name, row['model'])} {seconds / total:.0%}"
            for name, seconds in row["critical"]
            if seconds > 0.05 * total
        )
        rows.append([
            _who(row), _hours(row["one_by_one_seconds"]), _hours(total),
            " → ".join(path) if row["workers"] > 1 else "all stages: one machine",
        ])  # fmt: skip
    measured = "as an earlier run measured it" if result["given"] else "measured just before"
    rate = f"{result['rate'] / 1e9:.0f} GFLOP/s a core in matrix products, {measured}."
    return f"{table(head, rows)}\n\n{rate}"


def heads(result: Mapping[str, Any]) -> str:
    """Stages of 16 workers and more of which the head node does over half, and that take a tenth of the whole."""
    rows = []
    for row in (row for row in result["rows"] if row["workers"] >= 16):
        for name, own in row["stages"].items():
            share = own["seconds"] / row["one_by_one_seconds"]
            if own["head_seconds"] > 0.5 * own["seconds"] and share > 0.1:
                on_head = own["head_seconds"] / own["seconds"]
                rows.append(
                    [_who(row), _short(name, row["model"]), _hours(own["seconds"]), f"{on_head:.0%}", f"{share:.0%}"]
                )
    return table(("model, workers", "stage", "hours", "on the head node", "of all stages one by one"), rows)


def trust(result: Mapping[str, Any]) -> str:
    """Measured stages beside the model."""
    rows = [
        [
            f"{row['what']}: {row['stage']}", f"{row['model_seconds']:,.0f}", f"{row['wall_seconds']:,.0f}",
            f"{row['cpu_seconds']:,.0f}", f"{row['wall_seconds'] / row['model_seconds']:.2f}",
            f"{row['cpu_seconds'] / 2 / row['model_seconds']:.2f}",
        ]
        for row in result["compared"]
    ]  # fmt: skip
    return table(("2 cores", "model, s", "measured, s", "CPU, s", "measured ÷ model", "CPU ÷ 2 cores ÷ model"), rows)


def render(result: Mapping[str, Any]) -> bytes:
    """Hours over workers, as PNG bytes: a panel for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(11.0, 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for cores, colour, marker in ((2, "#9a6700", "s"), (16, "#0969da", "o")):
            rows = [row for row in result["rows"] if (row["model"], row["cores"]) == (model, cores)]
            counts = [row["workers"] for row in rows]
            for key, line, said in (("one_by_one", "--", "one by one"), ("side_by_side", "-", "side by side")):
                spent = [row[f"{key}_seconds"] / 3600 for row in rows]
                axes.plot(
                    counts, spent, line, color=colour, marker=marker, ms=6, mew=1.5, lw=1.5,
                    label=f"nodes of {cores} cores, {said}", markerfacecolor=colour if line == "-" else "white",
                )  # fmt: skip
                for place, (count, value) in enumerate(zip(counts, spent, strict=True)):
                    if key == "side_by_side" or place in (1, len(counts) - 1):
                        above = key == "one_by_one"
                        axes.annotate(
                            f"{_hours(3600 * value)} h", (count, value), (0, 7 if above else -13), ha="center",
                            textcoords="offset points", fontsize=7.5, color=colour,
                        )  # fmt: skip
        axes.set_title(
            f"{model}: a release ({', '.join(result['variants'])})",
            loc="left",
            color=INK,
            fontweight="bold",
            fontsize=10,
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(COUNTS)
        axes.set_xlim(0.75, 90)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("workers", color=INK)
        framed(axes)
    panels[0].set_ylabel("hours (simulated, log scale)", color=INK)
    panels[0].legend(loc="lower left", frameon=True, framealpha=1, edgecolor=LINE, fontsize=8.5, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@click.command()
@click.option("--network", default=NETWORK, show_default=True, help="Bytes per second to each node; assumed.")
@click.option("--rate", type=float, help="Operations per second of a core in products; default: measured now.")
def main(network: float, rate: float | None) -> None:
    """Simulate; write benchmarks/results/simulation.json and its plot."""
    # What else runs here only lowers it.
    per_core = rate or max(machine.product_rate() for _ in range(20)) / machine.cores()
    took = measured_seconds()
    variants, rows = load_pipeline().variants, list[dict[str, Any]]()
    for model in MODELS:
        after = graph([model], variants)
        for cores, memory in NODES.items():
            found = list(stage_needs(model, variants, memory * 10**9, Rates(per_core * cores, cores), SUITE))
            rows += release(model, after, found, cores, took, network)
    result = {
        "rate": per_core,
        "given": rate is not None,
        "network": network,
        "variants": variants,
        "rows": rows,
        "compared": compared(per_core),
    }
    write_json(RESULT, result)
    write_bytes(PLOT, render(result))
    for text in tables(result).values():
        click.echo(f"{text}\n")


if __name__ == "__main__":
    main()
