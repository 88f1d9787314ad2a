"""Our quantized files beside the peers', measured alike on the same held-out text.

    python -m benchmarks.quality

Every file is written by the tool that users run and measured as it lies, in the runtime that runs it: bytes, KL
divergence from the full-precision model with intervals, top-1 agreement, perplexity, decoding speed. Measurements are
kept in the scratch folder by all that decides them, so a second run measures only what has changed. Figures go to
benchmarks/results/quality.json and quality.png; `python -m benchmarks.tables` puts them into README.md.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.project import RESULTS, ROOT, SMALL, Project
from benchmarks.quality import measure, plot
from benchmarks.quality.bench import Bench
from benchmarks.quality.peers_onnx import BUILDER
from benchmarks.quality.subjects import SUBJECTS, prepare
from pipeline.errors import PipelineError
from pipeline.files import require_free_space, write_bytes, write_json

_DISK = 12_000_000_000  # two checkpoints in float32, our artifacts, one peer's file at a time


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench" / "quality", help="Scratch folder.")
@click.option("--speed/--no-speed", default=True, help="Without it, the rest may be measured on a busy machine.")
def main(work: Path, speed: bool) -> None:
    """Write benchmarks/results/quality.json and quality.png."""
    start = time.monotonic()
    try:
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        require_free_space(work, max(0, _DISK - machine.allocated(work)), "run this benchmark")
        project = Project(work)
        project.seed_store()
        subjects = []
        for subject in SUBJECTS:
            click.echo(subject.title, err=True)
            bench = Bench(
                prepare(project, subject), speed and subject.model == SMALL, lambda line: click.echo(line, err=True)
            )
            bench.run()
            subjects.append(bench.record())
        result = {
            "machine": machine.describe(),
            "peers": {"llama.cpp": f"cyllama {version('cyllama')}", "builder": BUILDER},
            "text": measure.TEXT.model_dump(mode="json"),
            "subjects": subjects,
        }
        write_json(RESULTS / "quality.json", result)
        write_bytes(RESULTS / "quality.png", plot.render(result))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"done in {time.monotonic() - start:,.0f} s", err=True)


if __name__ == "__main__":
    main()
