"""Our quantized files beside the peers', measured alike on the same held-out text.

    python -m benchmarks.quality

Every file is written by the tool that users run and measured as it lies, in the runtime that runs it: bytes on disk and
in memory, KL divergence from the full-precision model on four kinds of text with intervals, top-1 agreement,
perplexity, and with `--speed` decoding speed. Measurements are kept in the scratch folder by all that decides them, so
a second run measures only what has changed. Figures go to benchmarks/results/quality.json and the two plots
quality-bytes.png and quality-memory.png; `python -m benchmarks.tables` puts them into the pages.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.project import RESULTS, ROOT, Project
from benchmarks.quality import measure, ours, plot
from benchmarks.quality.bench import Bench
from benchmarks.quality.peers_onnx import BUILDER
from benchmarks.quality.subjects import SUBJECTS, prepare
from pipeline.errors import PipelineError
from pipeline.files import require_free_space, write_bytes, write_json

_DISK = 12_000_000_000  # two checkpoints in float32, our artifacts, one peer's file at a time


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench" / "quality", help="Scratch folder.")
@click.option("--speed", is_flag=True, help="Measure decoding too, on an idle machine.")
@click.option(
    "--subject", "names", multiple=True, help="Only these models, for a trial: results stay in the scratch folder."
)
def main(work: Path, speed: bool, names: tuple[str, ...]) -> None:
    """Write benchmarks/results/quality.json, quality-bytes.png and quality-memory.png."""
    start = time.monotonic()
    try:
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        require_free_space(work, max(0, _DISK - machine.allocated(work)), "run this benchmark")
        project = Project(work)
        project.seed_store()
        subjects = []
        for subject in (subject for subject in SUBJECTS if not names or subject.model in names):
            click.echo(subject.title, err=True)
            bench = Bench(prepare(project, subject), speed, lambda line: click.echo(line, err=True))
            bench.run()
            subjects.append(bench.record())
        result = {
            "machine": machine.describe(),
            "peers": {"llama.cpp": f"cyllama {version('cyllama')}", "builder": BUILDER},
            "text": measure.TEXT.model_dump(mode="json"),
            "subjects": subjects,
        }
        target = work if names else RESULTS
        write_json(target / "quality.json", result)
        for by in ours.SIZES:
            write_bytes(target / f"quality-{by}.png", plot.render(result, by))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"done in {time.monotonic() - start:,.0f} s", err=True)


if __name__ == "__main__":
    main()
