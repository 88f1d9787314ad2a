"""The conversion of full-size models on this machine: time, memory, disk, and what the result does in the runtime.

    python -m benchmarks.conversion

For MiMo-7B and Phi-4 with synthetic weights of exactly their shapes (and the embedded SmolLM2-135M with its own): the
pipeline's own commands, each in a fresh process with the page cache emptied of the source first, beside the least that
the disk needs to read the source and write the artifact, measured just before. One variant is on the disk at a time.
Variants are written with the search for tuning; `--variant q4_gptq` is q4 as it is released, and takes hours at these
sizes. Figures are written to benchmarks/results/ as they are measured; `python -m benchmarks.tables` puts them into
README.md.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import machine, phone, runtime, synthetic
from benchmarks.engines import Task
from benchmarks.project import RESULTS, ROOT, SMALL, Project
from pipeline.checkpoint.architecture import read_architecture
from pipeline.errors import PipelineError
from pipeline.files import read_json, require_free_space, write_json
from pipeline.runtime.pagecache import evict

LARGEST = "phi-4"
MODELS = (SMALL, "mimo-8b", LARGEST)
# Plain rounding, the control: what the disk and the packing alone cost.
NEAREST = "q4_nearest"
TUNED = ("q4", "q4_k_m", "q3")
RELEASED = "q4_gptq"
VARIANTS = (NEAREST, *TUNED)
# The statistics only steer the search, which takes the same time whatever they are: one short window is enough here.
CALIBRATION = {"texts": {"text-c4": 64}, "chats": {}, "window": 64, "per_channel": 0}
SENSITIVITY = {"texts": {"text-c4": 16}, "window": 16}
# Phi-4's source twice, while it is copied into the store: later peaks are lower. What is there already counts.
PEAK_BYTES = {"small": 2_000_000_000, "large": 60_000_000_000}
RUN = Task("", "", None, prompt_tokens=32, segment_tokens=8, segments=3)


def configured(work: Path) -> Project:
    """A project with the recipes of the table, and statistics that only steer the search."""
    project = Project(work)
    project.write("pipeline.yaml", project.read("pipeline.yaml") | {"undecided": True})  # nothing is judged here
    project.write("calibration.yaml", project.read("calibration.yaml") | CALIBRATION)
    project.write("sensitivity.yaml", project.read("sensitivity.yaml") | SENSITIVITY)
    project.write(f"recipes/{NEAREST}.yaml", project.read("recipes/q4.yaml") | {"search": "nearest"})
    project.write(f"recipes/{RELEASED}.yaml", project.read("recipes/q4.yaml"))
    for variant in TUNED:
        project.write(f"recipes/{variant}.yaml", project.read(f"recipes/{variant}.yaml") | {"search": "weighted"})
    return project


def figures(used: machine.Usage) -> dict[str, Any]:
    """What a command used, without its output."""
    return {name: value for name, value in asdict(used).items() if name not in {"status", "output"}}


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of an artifact's graph and parts."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.data.*")) + sorted(folder.glob("*.onnx")):
        with open(file, "rb") as stream:
            total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def measure_quantize(project: Project, model: str, variant: str, threads: int | None = None) -> dict[str, Any]:
    """One variant from a cold source, beside the disk's floor measured just before."""
    dry = subprocess.run(
        project.command("quantize", model, variant, "--dry-run", threads=threads),
        cwd=project.folder, env=project.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    planned = planned_bytes(dry.stdout)
    floor = machine.io_floor(project.weights(model), planned, project.work)
    used = project.run("quantize", model, variant, threads=threads)
    plan = read_json(project.artifact(model, variant) / "plan.json")
    if plan["bytes"] != planned:
        raise PipelineError(f"{model} {variant}: {plan['bytes']:,} bytes in plan.json, {planned:,} in the dry run.")
    return {
        "variant": variant,
        "threads": threads or machine.cores(),
        "bytes": planned,
        "weights": weights_of(project, model),
        "estimate": dry.stdout.strip().splitlines()[-1].strip(),
        "floor": asdict(floor) | {"seconds": floor.seconds},
        "ratio_to_floor": used.wall_seconds / floor.seconds,
        "disk_growth_over_artifact": used.disk_growth_bytes / planned,
        "sha256": digest(project.artifact(model, variant)),
        **figures(used),
    }


def planned_bytes(dry_run: str) -> int:
    """The exact size in the output of `quantize --dry-run`."""
    line = next(line for line in dry_run.splitlines() if " bytes in " in line)
    return int(line.split(" bytes")[0].strip().replace(",", ""))


def weights_of(project: Project, model: str) -> int:
    """Parameters of the model, what multi-token prediction has on top left out."""
    return read_architecture(project.weights(model) / "config.json").parameters


def decode(folder: Path) -> dict[str, Any]:
    """Load and decode on all cores in onnxruntime-genai, as an app does."""
    task = replace(RUN, engine="onnxruntime-genai", folder=str(folder), threads=machine.cores())
    return asdict(runtime.run_once(task, "default", cold=False))


def measure_resume(project: Project, model: str, variant: str, whole: dict[str, Any]) -> dict[str, Any]:
    """Kill the command at a third of its time, run it again: the same bytes, and the rest of the time."""
    shutil.rmtree(project.artifact(model, variant))
    evict(project.weights(model))
    after = whole["wall_seconds"] / 3
    project.kill("quantize", model, variant, after=after)
    used = project.run("quantize", model, variant)
    same = digest(project.artifact(model, variant)) == whole["sha256"]
    return {"killed_after_seconds": after, "second_run_seconds": used.wall_seconds, "same_bytes": same}


@contextmanager
def prepared(project: Project, model: str, variants: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Make the source, run the stages before quantize; remove everything of the model afterwards."""
    record: dict[str, Any] = {}
    source = project.work / "sources" / model
    if model != SMALL:
        start = time.monotonic()
        made = synthetic.write_checkpoint(source, model)
        record["source_seconds"] = time.monotonic() - start if made else None
        project.use_source(model, source)
    record["download"] = figures(project.run("download", model))
    shutil.rmtree(source, ignore_errors=True)  # a local source is copied into the store, a download is there only
    budget = any("budget" in project.read(f"recipes/{variant}.yaml") for variant in variants)
    for stage in ("export", "calibrate", *(["sensitivity"] if budget else [])):
        record[stage] = figures(project.run(stage, model))
    record["source_bytes"] = sum(file.stat().st_size for file in project.weights(model).glob("*.safetensors"))
    try:
        yield record
    finally:
        if model != SMALL:
            drop_source(project, model)
        shutil.rmtree(project.folder / "artifacts" / model, ignore_errors=True)


def drop_source(project: Project, model: str) -> None:
    """Free the disk of a synthetic source: the store's files and the pipeline's links to them."""
    inodes = {file.stat().st_ino for file in project.weights(model).glob("*.safetensors")}
    shutil.rmtree(project.weights(model), ignore_errors=True)
    for file in (project.store / "sha256").rglob("*"):
        if file.is_file() and file.stat().st_ino in inodes:
            file.unlink()


def measure_model(project: Project, model: str, variants: tuple[str, ...], load: bool) -> dict[str, Any]:
    """Every variant of one model, written and removed in turn; q4 last, to be killed, resumed, loaded and run."""
    with prepared(project, model, variants) as record:
        record["variants"] = []
        for variant in sorted(variants, key=lambda name: name == "q4"):
            click.echo(f"{model} {variant}", err=True)
            record["variants"].append(measure_quantize(project, model, variant))
            if load and variant != NEAREST:
                record["variants"][-1]["decode"] = decode(project.artifact(model, variant))
                phone.bench(project.artifact(model, variant), model, variant, project.work / "prepacked")
            if variant == "q4":
                break
            shutil.rmtree(project.artifact(model, variant))
        if "q4" in variants:
            record["resume"] = measure_resume(project, model, "q4", record["variants"][-1])
            if model != LARGEST:
                shutil.rmtree(project.artifact(model, "q4"))
                record["one_thread"] = measure_quantize(project, model, "q4", threads=1)
        if load and "q4" in variants:
            if model != SMALL:
                drop_source(project, model)
            record["runtime"] = runtime.measure(project.artifact(model, "q4"), project.work / "prepacked", RUN)
    return record


def save(record: dict[str, Any]) -> None:
    """Write a model's record; what a partial run did not measure stays from the run before, on the same machine."""
    path = RESULTS / f"conversion-{record['model']}.json"
    if path.exists() and (old := read_json(path))["machine"] == record["machine"]:
        measured = {run["variant"]: run for run in (*old["variants"], *record["variants"])}
        record = old | record | {"variants": [measured[name] for name in (*VARIANTS, RELEASED) if name in measured]}
    write_json(path, record)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench", help="Scratch folder: 60 GB.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), default=MODELS, help="Repeatable.")
@click.option("--variant", "variants", multiple=True, type=click.Choice((*VARIANTS, RELEASED)), default=VARIANTS)
@click.option("--load/--no-load", default=True, help="Also load each artifact in the runtimes and decode.")
def main(work: Path, models: tuple[str, ...], variants: tuple[str, ...], load: bool) -> None:
    """Convert full-size synthetic models; write benchmarks/results/conversion-MODEL.json."""
    try:
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        needed = PEAK_BYTES["small" if models == (SMALL,) else "large"]
        require_free_space(work, max(0, needed - machine.allocated(work)), "run this benchmark")
        project = configured(work)
        project.seed_store()
        for model in models:
            record = {"model": model, "machine": machine.describe(), **measure_model(project, model, variants, load)}
            save(record)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
