"""A release rehearsed: a talking model through every stage to bundles that are fetched, verified and made to speak.

    python -m benchmarks.rehearsal --model mimo-8b              # the whole model, q4 with a search that takes minutes
    python -m benchmarks.rehearsal --model mimo-8b --layers 2   # two layers at full width, the recipes as they ship

The commands are the product's own: `dvc repro` one stage after the other in a project of its own, then `push`, `fetch`
over HTTP from this machine, `verify`, and onnxruntime-genai. Each is watched for time, private memory and disk, beside
what preflight predicts before the first of them. Twice, at random moments of stages that take long, the whole process
group is killed; the stage then runs again. A rehearsal that was itself stopped goes on where it was. Figures go to
benchmarks/results/rehearsal-MODEL.json as they are measured; `python -m benchmarks.tables` makes tables of them.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import click

from benchmarks import machine, speaking, synthetic
from benchmarks.conversion import figures
from benchmarks.project import RESULTS, ROOT, SMALL, DvcProject
from pipeline.errors import PipelineError
from pipeline.files import read_json, require_free_space, write_json
from pipeline.prepack.emulator import HERE

SUITE = "rehearsal"
QUICK = "q4_weighted"  # q4 without error compensation: minutes at full size, where that takes an hour
SHIPPED = ("q4", "q4_k_m", "q3")
CALIBRATION = {"texts": {"text-c4": 1024, "text-code": 512}, "chats": {"chat-coding": 512}, "window": 512}
"""2,048 tokens, where nothing compensates errors: what ships has 4 for each channel, 44,032 for MiMo."""
CONTEXT = 2048
PER_MODEL = ("download", "export", "calibrate", "sensitivity", "parity")
PER_VARIANT = ("validate", "verdict", "bundle", "sign")
LONG = 20.0  # seconds that a stage is expected to take at least if it is to be killed
SPARE_BYTES = 5_000_000_000  # of disk, beside the model: datasets, measurements


@dataclass(frozen=True)
class Wanted:
    """What is rehearsed: recipes on a model, cut to its first `layers` layers if given, killed so many times."""

    model: str
    variants: tuple[str, ...]
    layers: int | None = None
    kills: int = 2
    seed: int = 0

    @property
    def suffix(self) -> str:
        """Of a cut model's names."""
        return f"-{self.layers}layers" if self.layers else ""

    @property
    def name(self) -> str:
        """The model's name in the project."""
        return f"talking-{self.model}{self.suffix}"

    def targets(self) -> list[str]:
        """Every stage as DVC names it, in the pipeline's order."""
        name, variants = self.name, self.variants
        return [
            *(f"{stage}@{name}" for stage in PER_MODEL),
            *(f"quantize@{name}-{variant}" for variant in variants),
            f"reference@{name}",
            *(f"{stage}@{name}-{variant}" for stage in PER_VARIANT for variant in variants),
            *(f"{stage}@{name}" for stage in ("tiers", "packs")),
            "report",
        ]


def configure(project: DvcProject, wanted: Wanted, source: Path) -> None:
    """Make the talking model the project's only one: a short calibration, and a suite that only such models may name.

    An entry of the model's own name stands for the whole of a cut one: preflight knows its shapes.
    """
    entry = {
        "title": f"{wanted.model}'s shapes with {SMALL}'s function",
        "note": "A talking model tests machinery. Its figures measure no model's quality.",
        "source": {"kind": "local", "path": str(source)},
        "context": CONTEXT,
        "mmlu_mode": "cloze",
        "gate_class": "talking",
    }
    quick = {
        "extends": "q4",
        "title": "Q4 without error compensation",
        "version": 1,
        "gate": "q4",
        "search": "weighted",
    }
    run = {"models": [wanted.name], "variants": list(wanted.variants), "suite": SUITE}
    # What cannot pass becomes a refusal, which is rehearsed too: a cut model says nothing, q3 asks for an opt_in.
    refusals = {"undecided": True} if wanted.layers or "q3" in wanted.variants else {}
    project.write(f"models/{wanted.name}.yaml", entry)
    project.write(f"models/{wanted.model}.yaml", entry | {"source": {"kind": "local", "path": f"{source}-whole"}})
    project.write(f"recipes/{QUICK}.yaml", quick)
    project.write("kernels.yaml", {"classes": [HERE]})  # emulating another takes minutes
    if wanted.variants == (QUICK,):
        project.write("calibration.yaml", CALIBRATION)
    project.write("pipeline.yaml", run | refusals)


def predict(model: str) -> list[dict[str, Any]]:
    """What preflight says of every stage of a model of the project in the current folder."""
    from pipeline.checkpoint.blobs import Store
    from pipeline.config.models import load_pipeline
    from pipeline.machine import cores, product_rate
    from pipeline.preflight.footprints import find_source
    from pipeline.preflight.machine import download_needs, room, stage_needs
    from pipeline.preflight.needs import Rates

    has, rates = room(), Rates(product_rate(), cores())
    found = [download_needs(find_source(model, Store()), has)]
    found += stage_needs(model, load_pipeline().variants, has.memory, rates)
    return [asdict(replace(one, work=())) | {"products_per_second": rates.flops} for one in found]


def target_of(prediction: dict[str, Any], name: str) -> str:
    """The stage of DVC that a prediction is about."""
    return f"{prediction['stage']}@{name}{'-' * bool(prediction['variant'])}{prediction['variant'] or ''}"


def moments(predicted: dict[str, float], kills: int, seed: int) -> dict[str, float]:
    """Stages to be killed, each after so many seconds: drawn from those that take `LONG` by prediction, at 10 to 60 %
    of their predicted seconds."""
    chance = random.Random(seed)
    long = [name for name, seconds in predicted.items() if seconds >= LONG]
    return {name: predicted[name] * chance.uniform(0.1, 0.6) for name in chance.sample(long, min(kills, len(long)))}


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Rehearsal:
    """A rehearsal as far as it has come. `record` lies in the work folder and, for the tables, in results."""

    wanted: Wanted
    work: Path
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.project, self.source = DvcProject(self.work), self.work / "source"
        self.place = self.work / "place"
        if (self.work / "record.json").exists() and not self.project.new:
            self.record = read_json(self.work / "record.json")
            if (begun := tuple(self.record["variants"])) != self.wanted.variants:
                raise PipelineError(
                    f"{self.work} holds a rehearsal of {', '.join(begun)}. Name these variants to go on with it, or "
                    f"remove the folder."
                )

    def save(self) -> None:
        """Keep what is known."""
        write_json(self.work / "record.json", self.record)
        write_json(RESULTS / f"rehearsal-{self.wanted.model}{self.wanted.suffix}.json", self.record)

    def step(self, name: str, command: Sequence[str], cwd: Path | None = None) -> machine.Usage:
        """Run a command to its end, watched, and record what it used. Raises PipelineError if it fails."""
        click.echo(f"== {name}", err=True)
        before = machine.allocated(self.work)
        used = machine.watch(command, self.project.environment, cwd or self.project.folder, self.work)
        if used.status:
            raise PipelineError(f"{name} ended with status {used.status}: {used.output.strip()[-2000:]}")
        click.echo(used.output.rstrip(), err=True)
        self.note(name, figures(used) | {"disk_before_bytes": before})
        return used

    def noted(self, name: str) -> dict[str, Any] | None:
        """What a step is recorded to have used."""
        return next((step for step in self.record["steps"] if step["name"] == name), None)

    def note(self, name: str, used: dict[str, Any]) -> None:
        """Record what a step used, in the order of first runs."""
        if (old := self.noted(name)) is None:
            self.record["steps"].append(old := {})
        old.clear()
        old |= {"name": name} | used
        self.save()

    def once(self, name: str, command: Sequence[str], cwd: Path | None = None) -> str | None:
        """As `step`, unless an earlier start has recorded it; its output."""
        return None if self.noted(name) else self.step(name, command, cwd).output

    def pipeline(self, name: str, *arguments: str) -> None:
        """`once`, for a command of the pipeline."""
        self.once(name, self.project.command(*arguments))

    # --- before the pipeline ---

    def prepare(self) -> None:
        """The project, the talking checkpoint and what preflight predicts of it."""
        project, wanted = self.project, self.wanted
        project.seed_store()
        if project.new:
            configure(project, wanted, self.source)
            project.commit()
        if not self.record:
            self.record = asdict(wanted) | {"machine": machine.describe(), "steps": [], "kills": [], "answers": {}}
            self.record["all_layers"] = synthetic.MODELS[wanted.model].config["num_hidden_layers"]
            self.record |= {
                "calibration": project.read("calibration.yaml"),
                "suite": project.read(f"evaluation/{SUITE}.yaml"),
            }
            self.record["busy_percent_before"] = machine.busy_percent()
        if not self.artifact("source.json").exists():
            self.pipeline("small model", "download", SMALL)
            layers = ["--layers", str(wanted.layers)] if wanted.layers else []
            talking = ["--talking", str(project.weights(SMALL)), *layers]
            command = [sys.executable, "-m", "benchmarks.synthetic", wanted.model, str(self.source), *talking]
            self.once("talking checkpoint", command, ROOT)
        if "predicted" not in self.record:
            self.record["predicted"] = self.predicted(wanted.name)
            self.record["predicted_whole"] = self.predicted(wanted.model) if wanted.layers else None
            self.save()

    def predicted(self, model: str) -> list[dict[str, Any]]:
        """`predict` in the project."""
        command = [sys.executable, "-m", "benchmarks.rehearsal", "predict", model]
        used = machine.watch(command, self.project.environment, self.project.folder)
        if used.status:
            raise PipelineError(f"preflight's prediction for {model} ended with status {used.status}.")
        found: list[dict[str, Any]] = json.loads(used.output)
        return found

    def artifact(self, name: str) -> Path:
        """A file of the model's artifacts."""
        return self.project.folder / "artifacts" / self.wanted.name / name

    # --- the pipeline ---

    def stages(self) -> None:
        """Every stage, killed where it is drawn; the source goes as soon as the store has it.

        DVC brings all that a stage depends on up to date, so what an earlier start has recorded need not run again.
        """
        wanted, record = self.wanted, self.record
        seconds = {target_of(one, wanted.name): one["seconds"] for one in record["predicted"]}
        due = moments(seconds, wanted.kills, wanted.seed)
        for target in wanted.targets():
            done = {kill["stage"] for kill in record["kills"]}
            if target in due and target not in done and not self.noted(target):
                self.kill(target, due[target])
            self.once(target, self.project.repro(target))
            if target.startswith("download@"):
                shutil.rmtree(self.source, ignore_errors=True)

    def kill(self, target: str, after: float) -> None:
        """Kill a stage, and record after how many seconds, and whether it still ran then."""
        click.echo(f"== {target}, to be killed after {after:.0f} s", err=True)
        start = time.monotonic()
        status = self.project.kill_group(self.project.repro(target), after)
        kill = {"stage": target, "after_seconds": time.monotonic() - start, "killed": status is None}
        self.record["kills"].append(kill)
        if status == 0:
            self.note(target, {"wall_seconds": kill["after_seconds"]})
        self.save()

    # --- what it made ---

    def publish(self) -> None:
        """Every bundle that passed: published, fetched over HTTP, verified, made to speak."""
        name, project = self.wanted.name, self.project
        (key,) = (project.folder / "artifacts/keys").glob("*.pem")
        trust = ("--public-key", str(key), "--allow-development")
        verdicts = {one: read_json(self.verdict(one)) for one in self.wanted.variants}
        self.record["verdicts"] = verdicts
        passed = [one for one, found in verdicts.items() if found["verdict"] == "PASS"]
        self.save()
        for one in passed:
            self.pipeline(f"push {one}", "push", f"artifacts/bundles/{name}/{one}", str(self.place), *trust)
        if not passed:
            return
        self.pipeline("push tiers", "push", f"artifacts/tiers/{name}", str(self.place), *trust)
        with served(self.place) as url:
            for one in passed:
                phone = str(self.work / "phone" / one)
                self.pipeline(f"fetch {one}", "fetch", url, name, "--variant", one, *trust, "--to", phone)
                self.pipeline(f"verify {one}", "verify", phone, *trust, "--model", name, "--variant", one)
                self.speak(one, Path(phone) / "content")

    def verdict(self, variant: str) -> Path:
        """Where the gates' decision lies."""
        return self.project.folder / "artifacts/verdicts" / self.wanted.name / f"{variant}.json"

    def speak(self, variant: str, content: Path) -> None:
        """Answers of a fetched bundle, and how far they are the full-precision ones."""
        if variant in self.record["answers"]:
            return
        said = self.step(f"decode {variant}", [sys.executable, "-m", "benchmarks.speaking", str(content)], ROOT)
        found = json.loads(said.output)
        rows = speaking.beside(
            self.project.weights(SMALL), content, found.pop("answers"), self.work, self.wanted.layers
        )
        self.record["answers"][variant] = found | {"rows": rows}
        self.save()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder behind a web server of this machine; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def disk_needed(wanted: Wanted) -> int:
    """Bytes: the checkpoint twice, while the store copies it, and what is small beside it."""
    return 4 * sum(map(math.prod, synthetic.tensors(wanted.model, wanted.layers).values())) + SPARE_BYTES


def rehearse(wanted: Wanted, work: Path) -> dict[str, Any]:
    """All of it; goes on where an earlier start was stopped."""
    work.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal(wanted, work)
    if not rehearsal.artifact("source.json").exists():
        require_free_space(work, max(0, disk_needed(wanted) - machine.allocated(work)), "rehearse a release")
    rehearsal.prepare()
    rehearsal.stages()
    rehearsal.publish()
    return rehearsal.record


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / ".bench/rehearsal", help="Scratch: 40 GB (MiMo)."
)
@click.option("--model", default="mimo-8b", show_default=True, type=click.Choice(list(synthetic.MODELS)))
@click.option(
    "--variant", "variants", multiple=True, help=f"Repeatable; default: {QUICK}, of a cut {' '.join(SHIPPED)}."
)
@click.option("--layers", type=int, help="Only the first so many decoder layers, at full width.")
@click.option("--kills", default=2, show_default=True, help="How many stages are killed.")
@click.option("--seed", default=0, show_default=True, help="Which they are, and when.")
@click.pass_context
def main(
    context: click.Context, work: Path, model: str, variants: tuple[str, ...], layers: int | None, kills: int, seed: int
) -> None:
    """Rehearse a release with a talking model; write benchmarks/results/rehearsal-MODEL.json."""
    if context.invoked_subcommand:
        return
    wanted = Wanted(model, variants or (SHIPPED if layers else (QUICK,)), layers, kills, seed)
    try:
        rehearse(wanted, work.resolve() / f"{model}{wanted.suffix}")
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


@main.command("predict", hidden=True)
@click.argument("model")
def predict_command(model: str) -> None:
    """Print what preflight predicts in the current folder as JSON."""
    try:
        click.echo(json.dumps(predict(model)))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
