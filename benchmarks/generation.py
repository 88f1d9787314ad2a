"""A full-precision model larger than memory that writes many texts side by side: seconds of a pass, beside preflight's.

    python -m benchmarks.generation --model mimo-8b

A synthetic checkpoint of exactly the model's shapes, in a fresh process with the page cache emptied of the weights: as
many texts as memory holds take some tokens further with `pipeline.runtime.side_by_side`, as HumanEval's do where the
reference runs layer by layer. They are half written: their keys and values are filled with noise, because to read so
many tokens would take hours. The prediction is made before, from the rate of products that preflight measures. Figures
go to benchmarks/results/generation.json, by model.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import machine, synthetic
from benchmarks.project import RESULTS, ROOT
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import load_model
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.machine import available_memory, cores, product_rate
from pipeline.preflight import needs
from pipeline.runtime.pagecache import evict
from pipeline.runtime.side_by_side import SideBySide, fitting_texts, token_bytes, working_bytes
from pipeline.tasks.humaneval import TASK
from pipeline.tasks.registry import load_suite

RECORDS = RESULTS / "generation.json"
_GRAPH = "model.onnx"


def asked(model: str, suite: str) -> tuple[int, int]:
    """How many texts a suite's HumanEval asks a model for, and how long each becomes in tokens."""
    cost = TASK.cost(getattr(load_suite(suite), TASK.name), load_model(model))
    return cost.texts, cost.cached


def run_once(folder: Path, texts: int, tokens: int, passes: int) -> dict[str, Any]:
    """Seconds of every pass, and the bytes that all of them read from the disk, in this process."""
    architecture, rng = read_architecture(folder / "config.json"), np.random.default_rng(0)
    model = SideBySide(folder / _GRAPH, architecture, texts, tokens)
    model.lengths = [tokens // 2] * texts
    for values in (values for layer in model.cache for values in layer):
        values[:, :, : tokens // 2] = rng.standard_normal((tokens // 2, architecture.head_dim))
    ids, seconds, before = [[1]] * texts, [], _read_bytes()
    for _ in range(passes):
        start = time.monotonic()
        ids = model.run(ids).argmax(axis=1)[:, None].tolist()
        seconds.append(time.monotonic() - start)
    return {"pass_seconds": seconds, "disk_read_bytes": _read_bytes() - before}


def _read_bytes() -> int:
    """What this process has made the disk read (Linux)."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) if found else 0


def measure(folder: Path, wanted: int, tokens: int, passes: int) -> dict[str, Any]:
    """`run_once` in a process of its own, watched, from a cold disk, and what preflight says of it."""
    architecture, weights = read_architecture(folder / "config.json"), Checkpoint(folder)
    graph, rope = build_decoder(architecture, weights, min(4096, architecture.max_position))
    save_decoder(folder, graph, rope, _GRAPH)
    evict(folder)
    memory, rates = available_memory(), needs.Rates(product_rate(), cores())
    texts = fitting_texts(architecture, wanted, tokens, memory)
    held = working_bytes(architecture, texts) + texts * tokens * token_bytes(architecture)
    predicted = needs.side_by_side_seconds(architecture, weights.weight_bytes, texts, memory - held, rates)
    command = [sys.executable, "-m", "benchmarks.generation", "once", str(folder), *map(str, (texts, tokens, passes))]
    used = machine.watch(command, cwd=ROOT)
    if used.status:
        raise PipelineError(f"measuring {folder} ended with status {used.status}.")
    found = json.loads(used.output)
    median = statistics.median(found["pass_seconds"])
    return {
        "layers": architecture.layers,
        "weight_bytes": weights.weight_bytes,
        "available_bytes": memory,
        "products_per_second": rates.flops,
        "texts": texts,
        "tokens": tokens,
        "private_bytes": used.private_bytes,
        "cpu_seconds": used.cpu_seconds,
        "predicted_seconds": predicted,
        "median_seconds": median,
        "measured_over_predicted": median / predicted,
        **found,
    }


@click.group(invoke_without_command=True)
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench", help="Scratch folder: 16 or 30 GB.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(synthetic.MODELS)), default=("mimo-8b",))
@click.option(
    "--suite", default="release", show_default=True, help="Whose HumanEval says how many texts, and how long."
)
@click.option("--passes", default=8, show_default=True)
@click.pass_context
def main(context: click.Context, work: Path, models: tuple[str, ...], suite: str, passes: int) -> None:
    """Measure passes over full-size synthetic models; add to benchmarks/results/generation.json."""
    if context.invoked_subcommand:
        return
    try:
        for model in models:
            folder = work.resolve() / "generation" / model
            synthetic.write_checkpoint(folder, model)
            busy = machine.busy_percent()
            record = {"model": model, "busy_percent_before": busy, **measure(folder, *asked(model, suite), passes)}
            shutil.rmtree(folder)
            records = read_json(RECORDS)["records"] if RECORDS.exists() else []
            kept = [old for old in records if old["model"] != model]
            write_json(RECORDS, {"machine": machine.describe(), "records": [*kept, record]})
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("texts", type=int)
@click.argument("tokens", type=int)
@click.argument("passes", type=int)
def once(folder: Path, texts: int, tokens: int, passes: int) -> None:
    """Measure in this process and print it as JSON."""
    click.echo(json.dumps(run_once(folder, texts, tokens, passes)))


if __name__ == "__main__":
    main()
