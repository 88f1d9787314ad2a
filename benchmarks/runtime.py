"""How an artifact loads and decodes on this machine, beside the most that its memory allows.

    python -m benchmarks.runtime artifacts/smollm2-135m/variants/q4 --out runtime.json --prepacked scratch/

Every measurement runs in a process of its own: onnxruntime and onnxruntime-genai, one thread and all cores, from a cold
and a warm page cache; with `--prepacked` again from a file in the layout that the kernels use, written to the given
folder and removed at the end. A rate above the roofline (memory bandwidth ÷ bytes that one token must read) cannot be
true: it is reported as an error, with exit status 1.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import onnx
import psutil
from google.protobuf.message import DecodeError
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.engines import Task, settings
from pipeline.errors import EvaluationError, PipelineError, ResourceError
from pipeline.files import link_or_copy, require_free_space, scratch_directory, write_json
from pipeline.machine import cores
from pipeline.runtime.bandwidth import LARGEST_WORKING_SET, memory_bandwidth
from pipeline.runtime.pagecache import evict
from pipeline.runtime.roofline import Traffic, traffic

_QUIET = 10  # percent of the cores; above it rates are not the machine's
_WIDTH = 160  # characters of the table where there is no terminal
# The saved file holds the stored and the prepacked weights; 2.2 to 2.7 times the artifact were seen.
_PREPACKED_RATIO = 3.0
# Private memory of a default load, over the artifact's bytes; 1.2 to 1.6 were seen, more for the smallest models.
_PRIVATE_RATIO = 1.8
_PHONE_BANDWIDTH = {"Snapdragon 8 Gen 3": 76.8e9}  # bytes per second, the vendor's figure for its memory
_PHONE_NOTES = (
    "A prepacked file holds the layout of one processor's instruction set. This one serves this machine only: a phone "
    "downloads the plain artifact and makes its own prepacked file once, after verifying the download, with the same "
    "session option, from the runtime version that will read it, and makes it again when the runtime changes.",
    "Without it the phone repeats the prepacking at every start and keeps its result as private memory, which counts "
    "against the app's limit. With it most weights are clean mapped pages, which do not, and the phone needs the disk "
    "for both files while it writes the second; the saved one then serves alone.",
    "Phone figures here are computed, not measured on a phone.",
)


@dataclass(frozen=True)
class Artifact:
    """A folder that both engines load: its graph without the weights, and the bytes of the graph and its data files."""

    folder: Path
    file: str
    graph: onnx.ModelProto
    bytes: int


def open_artifact(folder: Path) -> Artifact:
    """Read what the folder says about itself. Raises EvaluationError when that is not a written artifact."""
    try:
        file = settings(folder)["decoder"]["filename"]
        graph = onnx.load(folder / file, load_external_data=False)
        entries = (item for tensor in graph.graph.initializer for item in tensor.external_data)
        names = {item.value for item in entries if item.key == "location"} | {file}
        return Artifact(folder, file, graph, sum((folder / name).stat().st_size for name in names))
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
        raise EvaluationError(
            f"{folder}: not a written artifact, which holds genai_config.json, the graph it names and its data files: "
            f"{error!r}. Run the quantize stage for it again."
        ) from None


def require_memory(artifact: Artifact) -> None:
    """Refuse what would drive the machine out of memory. Raises ResourceError with both figures."""
    needed, available = math.ceil(_PRIVATE_RATIO * artifact.bytes), psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"{artifact.file}: a load with default prepacking takes about {needed:,} bytes of private memory, "
            f"{available:,} are available. Close other programs, or measure on a larger machine."
        )


# --- phones ---


def phone_private_bytes(model: onnx.ModelProto) -> int:
    """Bytes of prepacked weights that a default load keeps private on arm64: bits per weight as measured with the
    arm64 wheel under emulation (4-bit: the upper end; 2- and 8-bit: with the block's sums and scales)."""
    total = 0.0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            values = {item.name: item.i for item in node.attribute}
            bits, block = values["bits"], values["block_size"]
            total += values["K"] * values["N"] * {2: 2 + 64 / block, 4: 4.6, 8: 8 + 96 / block}[bits] / 8
    return round(total)


# --- measurements ---


@dataclass(frozen=True)
class Run:
    """One process's measurement. Seconds, bytes and tokens per second; private and mapped memory apart."""

    engine: str
    form: str  # "default": weights prepacked at load; "prepacked": read from the saved file
    threads: int | None  # None: the engine's own default
    cold: bool  # nothing of the folder was in the page cache
    cached_bytes: int  # that stayed in the page cache although it was evicted
    load_seconds: float
    first_token_seconds: float  # one token right after the load
    interpreter_private_bytes: int  # before the load
    loaded_private_bytes: int
    loaded_mapped_bytes: int
    peak_private_bytes: int
    peak_mapped_bytes: int
    prefill_seconds: float | None = None
    prefill_rate: float | None = None
    rate: float | None = None  # median over segments
    rate_low: float | None = None
    rate_high: float | None = None
    ceiling: float | None = None  # the roofline, at these threads
    tokens: tuple[int, ...] = ()


def run_once(task: Task, form: str, cold: bool) -> Run:
    """Measure `task` in a fresh process. Raises EvaluationError when that fails."""
    folder = Path(task.folder)
    cached = evict(folder) if cold else 0
    used = _engine("decode", json.dumps(asdict(replace(task, folder=str(folder.resolve())))))
    found = _result(used, f"{folder.name}: {task.engine} with {task.threads or 'its default'} threads")
    rates, prefill = found.pop("segment_rates", []), found.get("prefill_seconds")
    return Run(
        engine=task.engine,
        form=form,
        threads=task.threads,
        cold=cold,
        cached_bytes=cached,
        peak_private_bytes=used.private_bytes,
        peak_mapped_bytes=used.mapped_bytes,
        prefill_rate=task.prompt_tokens / prefill if prefill else None,
        rate=statistics.median(rates) if rates else None,
        rate_low=min(rates, default=None),
        rate_high=max(rates, default=None),
        **(found | {"tokens": tuple(found.get("tokens", ()))}),
    )


def _engine(*arguments: str) -> machine.Usage:
    """Run benchmarks.engines, from the project's root wherever this process is."""
    root = Path(__file__).resolve().parents[1]
    return machine.watch([sys.executable, "-m", "benchmarks.engines", *arguments], cwd=root)


def _result(used: machine.Usage, what: str) -> dict[str, Any]:
    if used.status:
        reason = (
            f"signal {-used.status} (9 is what the kernel sends when memory is out)" if used.status < 0 else "error"
        )
        raise EvaluationError(f"{what}: ended with {reason}, status {used.status}; its own message stands above.")
    return json.loads(used.output.strip().splitlines()[-1])


def _tasks(folder: Path, short: Task, all_cores: int, form: str) -> Iterator[tuple[Task, bool]]:
    """(task, cold) in order: the cold load first, so that those after it find the file in the page cache."""
    ort, genai = "onnxruntime", "onnxruntime-genai"
    counts = sorted({1, all_cores}) if form == "default" else [all_cores]
    plan: list[tuple[str, int | None, bool]] = [(ort, all_cores, True)]
    plan += [(ort, count, False) for count in counts]
    plan += [(genai, None, False)] if form == "default" else []
    plan += [(genai, count, False) for count in counts]
    for engine, threads, cold in plan:
        segments = 0 if cold else short.segments
        yield Task(engine, str(folder), threads, short.prompt_tokens, short.segment_tokens, segments), cold


def bandwidths(counts: list[int], working_set: int) -> dict[int, float]:
    """Bytes per second by number of threads."""
    return {count: memory_bandwidth(count, working_set) for count in counts}


def judge(runs: list[Run], reads: Traffic, bandwidth: dict[int, float], context: float) -> tuple[list[Run], list[str]]:
    """The runs with their rooflines, and an error for every rate above its roofline.

    An engine's own default may use any number of threads: its ceiling is that of all cores.
    """
    ceilings = {count: rate / reads.per_token(context) for count, rate in bandwidth.items()}
    judged = [replace(run, ceiling=ceilings[run.threads or max(ceilings)] if run.rate else None) for run in runs]
    errors = [
        f"{run.engine}, {run.form}, {run.threads or 'default'} threads: {run.rate:.2f} tokens/s is above the roofline "
        f"of {run.ceiling:.2f}. Either the bandwidth was measured while the machine was busy, so measure again on an "
        f"idle one, or tokens were not computed."
        for run in judged
        if run.rate and run.ceiling and run.rate > run.ceiling
    ]
    return judged, errors


def differing(runs: list[Run]) -> list[str]:
    """An error for every engine that decodes other tokens from the prepacked file than from the artifact."""
    plain = {(run.engine, run.threads): run.tokens for run in runs if run.form == "default" and run.tokens}
    return [
        f"{run.engine} decodes other tokens from the prepacked file than from the artifact with {run.threads} threads."
        for run in runs
        if run.form == "prepacked" and run.tokens and run.tokens != plain[run.engine, run.threads]
    ]


# --- the prepacked file ---


@contextmanager
def prepacked_folder(artifact: Artifact, scratch: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder below `scratch` that both engines load, with the weights as the kernels use them; gone afterwards.

    Yields it with the file's bytes, the seconds to make it and the private memory that took.
    Raises ResourceError when the disk lacks the space.
    """
    folder, model = artifact.folder, artifact.folder / artifact.file
    require_free_space(scratch, math.ceil(_PREPACKED_RATIO * artifact.bytes), f"save {model.name} prepacked")
    with scratch_directory(scratch / f"{model.stem}-prepacked") as target:
        saved = target / "prepacked.onnx"
        used = _engine("prepack", str(model.resolve()), str(saved.resolve()))
        seconds = _result(used, f"{model.name}: saving it prepacked")["seconds"]
        for file in folder.iterdir():
            if file.suffix in {".json", ".jinja"}:
                link_or_copy(file, target / file.name)
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        config["model"]["decoder"]["filename"] = saved.name
        write_json(target / "genai_config.json", config)
        data = saved.stat().st_size + saved.with_name(f"{saved.name}.data").stat().st_size
        yield (
            target,
            {
                "bytes": data,
                "ratio": data / artifact.bytes,
                "save_seconds": seconds,
                "save_peak_private_bytes": used.private_bytes,
            },
        )


# --- all of it ---


def measure(folder: Path, scratch: Path | None, short: Task) -> dict[str, Any]:
    """Everything about the artifact in `folder`, as one JSON-ready record.

    Args:
        scratch: where the prepacked file is written; None leaves it out.
        short: the lengths to measure; its engine, folder and threads are not used.
    """
    artifact = open_artifact(folder)
    require_memory(artifact)
    reads, all_cores, busy = traffic(artifact.graph), cores(), machine.busy_percent()
    context = short.prompt_tokens + short.segments * short.segment_tokens / 2
    counts = sorted({1, all_cores})
    working_set = min(round(reads.per_token(context)), LARGEST_WORKING_SET)
    before = bandwidths(counts, working_set)
    runs = [run_once(task, "default", cold) for task, cold in _tasks(folder, short, all_cores, "default")]
    saved = None
    if scratch is not None:
        with prepacked_folder(artifact, scratch) as (target, saved):
            tasks = _tasks(target, short, all_cores, "prepacked")
            runs += [run_once(task, "prepacked", cold) for task, cold in tasks]
    # A second look: what else runs on the machine can only make the bandwidth seem lower than it is.
    after = bandwidths(counts, working_set)
    best = {count: max(before[count], after[count]) for count in counts}
    judged, errors = judge(runs, reads, best, context)
    return {
        "model": artifact.file,
        "machine": machine.describe(),
        "busy_percent": busy,  # of all cores, by other programs, before the first measurement
        "artifact_bytes": artifact.bytes,
        "reads": asdict(reads) | {"bytes_per_token": reads.per_token(context), "context_tokens": context},
        "bandwidth": {"working_set_bytes": working_set, "bytes_per_second": best, "before": before, "after": after},
        "runs": [asdict(run) for run in judged],
        "prepacked": saved,
        "phone": phone(artifact.graph, reads, context),
        "errors": errors + differing(runs),
    }


def phone(graph: onnx.ModelProto, reads: Traffic, context: float) -> dict[str, Any]:
    """What a phone would see: computed figures, and what the prepacked file means there."""
    ceilings = {name: rate / reads.per_token(context) for name, rate in _PHONE_BANDWIDTH.items()}
    return {
        "private_bytes_default_load": phone_private_bytes(graph),
        "ceiling_tokens_per_second": ceilings,
        "notes": list(_PHONE_NOTES),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report as a table, then what it means on a phone."""
    title = f"{report['model']}: {report['artifact_bytes'] / 1e9:.3f} GB. Memory in MB, private + mapped."
    table = Table(title=title, title_justify="left")
    for name in ("engine", "weights", "threads", "load s", "1st token s", "loaded", "peak"):
        table.add_column(name, justify="left" if name in {"engine", "weights"} else "right")
    for name in ("prefill tok/s", "decode tok/s (low–high)", "roofline", "%"):
        table.add_column(name, justify="right")
    for run in (Run(**item) for item in report["runs"]):
        table.add_row(*_cells(run))
    console.print(table)
    reads, bandwidth = report["reads"], report["bandwidth"]["bytes_per_second"]
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s with {count}" for count, rate in bandwidth.items())
    console.print(f"{reads['bytes_per_token'] / 1e9:.3f} GB read per token; memory {rates} thread(s).")
    if report["busy_percent"] > _QUIET:
        console.print(f"Other programs kept {report['busy_percent']:.0f} % of the cores busy: measure again when idle.")
    if saved := report["prepacked"]:
        console.print(
            f"Prepacked file: {saved['bytes'] / 1e9:.3f} GB, {saved['ratio']:.2f} times the artifact, saved in "
            f"{saved['save_seconds']:.1f} s with {saved['save_peak_private_bytes'] / 1e9:.2f} GB private."
        )
    private = report["phone"]["private_bytes_default_load"] / 1e9
    ceilings = ", ".join(f"{rate:.1f} on {name}" for name, rate in report["phone"]["ceiling_tokens_per_second"].items())
    console.print(f"On a phone: {private:.2f} GB private after a default load; at most {ceilings} tokens/s.")
    for line in report["phone"]["notes"]:
        console.print(f"  {line}")


def _cells(run: Run) -> list[str]:
    stayed = f" ({run.cached_bytes / 1e6:,.0f} MB stayed cached)" if run.cached_bytes else ""
    cells = [run.engine, run.form + (f", cold{stayed}" if run.cold else ""), str(run.threads or "default")]
    cells += [f"{run.load_seconds:.2f}", f"{run.first_token_seconds:.2f}"]
    pairs = (
        (run.loaded_private_bytes, run.loaded_mapped_bytes),
        (run.peak_private_bytes, run.peak_mapped_bytes),
    )
    cells += [f"{private / 1e6:,.0f} + {mapped / 1e6:,.0f}" for private, mapped in pairs]
    if run.rate is None or run.ceiling is None:
        return cells
    rate = f"{run.rate:.1f} ({run.rate_low:.1f}–{run.rate_high:.1f})"
    return [*cells, f"{run.prefill_rate:.1f}", rate, f"{run.ceiling:.1f}", f"{100 * run.rate / run.ceiling:.0f}"]


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the record to this JSON file.")
@click.option(
    "--prepacked", type=click.Path(path_type=Path, file_okay=False), help="Scratch folder; also measure this."
)
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--segment-tokens", default=16, show_default=True, type=click.IntRange(1))
@click.option("--segments", default=5, show_default=True, type=click.IntRange(1))
def main(
    artifact: Path, out: Path | None, prepacked: Path | None, prompt_tokens: int, segment_tokens: int, segments: int
) -> None:
    """Measure the artifact in a folder: loading, memory, speed, beside the roofline."""
    try:
        report = measure(artifact, prepacked, Task("", "", None, prompt_tokens, segment_tokens, segments))
        if out:
            write_json(out, report)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    show(report, console if console.is_terminal else Console(width=_WIDTH))
    for message in report["errors"]:
        click.echo(f"Error: {message}", err=True)
    sys.exit(1 if report["errors"] else 0)


if __name__ == "__main__":
    main()
