"""A full-precision model larger than memory, measured layer by layer: private memory, disk and time.

    python -m benchmarks.reference --model phi-4

The divergence section's own code on a synthetic checkpoint of exactly the model's shapes, in a fresh process with the
page cache emptied of the weights: windows of random tokens pass layer by layer (`pipeline.runtime.layered`), then
their log-probabilities are kept. With `--layers` the model has only so many, and the record says so: passes grow with
layers, memory does not. Figures go to benchmarks/results/reference.json, by model and number of layers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import machine, synthetic
from benchmarks.project import RESULTS, ROOT
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.preflight.needs import widened_bytes
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.pagecache import evict
from pipeline.tasks import divergence_scores as divergence

RECORDS = RESULTS / "reference.json"
_GRAPH = "model.onnx"


def run_once(folder: Path, tokens: int, window: int) -> dict[str, float]:
    """Seconds of the passes and of the answers, and the loss of the kept log-probabilities, in this process."""
    architecture = read_architecture(folder / "config.json")
    ids = np.random.default_rng(0).integers(0, architecture.vocab, (tokens // window, window + 1))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        start = time.monotonic()
        decoder = LayeredDecoder(folder / _GRAPH, architecture, Path(scratch) / "states", folder.name)
        decoder.prepare(lambda asked: [asked.run(row[:-1]) for row in ids])
        passed = time.monotonic()
        scores = divergence.record_reference(lambda row: decoder.run(row)[0], list(ids), Path(scratch))
        return {
            "pass_seconds": passed - start,
            "answer_seconds": time.monotonic() - passed,
            "codes_kl_mean": float(scores["codes_kl"].mean()),
            "clipped_mean": float(scores["clipped"].mean()),
        }


def measure(folder: Path, tokens: int, window: int) -> dict[str, Any]:
    """`run_once` in a process of its own, watched, from a cold disk."""
    architecture, weights = read_architecture(folder / "config.json"), Checkpoint(folder)
    graph, rope = build_decoder(architecture, weights, min(4096, architecture.max_position))
    save_decoder(folder, graph, rope, _GRAPH)
    cached = evict(folder)
    command = [sys.executable, "-m", "benchmarks.reference", "once", str(folder), str(tokens), str(window)]
    used = machine.watch(command, cwd=ROOT, disk_root=folder.parent)
    if used.status:
        raise PipelineError(f"measuring {folder} ended with status {used.status}.")
    return {
        "layers": architecture.layers,
        "parameters": architecture.parameters,
        "weight_bytes": weights.weight_bytes,
        "whole_model_bytes": widened_bytes(weights.weight_bytes, architecture.parameters),
        "tokens": tokens // window * window,
        "window": window,
        "cached_before_bytes": cached,
        "wall_seconds": used.wall_seconds,
        "cpu_seconds": used.cpu_seconds,
        "private_bytes": used.private_bytes,
        "mapped_bytes": used.mapped_bytes,
        "disk_growth_bytes": used.disk_growth_bytes,
        **json.loads(used.output),
    }


@click.group(invoke_without_command=True)
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench", help="Scratch folder: 30 GB.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(synthetic.MODELS)), default=("phi-4",))
@click.option("--layers", type=int, help="Only the first so many layers.")
@click.option("--tokens", default=512, show_default=True)
@click.option("--window", default=256, show_default=True)
@click.pass_context
def main(
    context: click.Context, work: Path, models: tuple[str, ...], layers: int | None, tokens: int, window: int
) -> None:
    """Measure the reference of full-size synthetic models; add to benchmarks/results/reference.json."""
    if context.invoked_subcommand:
        return
    try:
        for model in models:
            folder = work.resolve() / "reference" / model
            synthetic.write_checkpoint(folder, model, layers=layers)
            busy = machine.busy_percent()
            record = {
                "model": model,
                "cut_to_layers": layers,
                "busy_percent_before": busy,
                **measure(folder, tokens, window),
            }
            shutil.rmtree(folder)
            records = read_json(RECORDS)["records"] if RECORDS.exists() else []
            kept = [old for old in records if (old["model"], old["layers"]) != (model, record["layers"])]
            write_json(RECORDS, {"machine": machine.describe(), "records": [*kept, record]})
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("tokens", type=int)
@click.argument("window", type=int)
def once(folder: Path, tokens: int, window: int) -> None:
    """Measure in this process and print it as JSON."""
    click.echo(json.dumps(run_once(folder, tokens, window)))


if __name__ == "__main__":
    main()
