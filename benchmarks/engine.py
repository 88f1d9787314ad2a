"""What machines bring, stage by stage: SmolLM2 by one and by two Ray nodes of one core, and by threads on all cores.

    python -m benchmarks.engine --kills 20                   # 2 cores, requirements-ray.txt, the demo's artifacts
    python -m benchmarks.engine --stage mmlu --out FILE      # one stage, again

A node stands for a machine of one core: the system keeps it on a core of its own, and the process that runs the stage,
the head's, on the first node's. Stages are the product's, in a copy of the configuration that asks for less text,
beside links to the demo's artifacts. A clock starts when every process has imported what stages need.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks import machine
from benchmarks.markdown import table
from benchmarks.project import RESULTS, ROOT, SMALL, Project
from pipeline import keys
from pipeline.checkpoint.blobs import Store
from pipeline.config.engine import VARIABLE
from pipeline.config.models import DEVICE
from pipeline.engine import Engine, chosen, cluster
from pipeline.errors import PipelineError
from pipeline.files import link_or_copy, read_json, sha256_of, write_json
from pipeline.journal import Journal
from pipeline.stages import validate
from pipeline.stages.calibrate import run as run_calibrate
from pipeline.stages.quantize import run as run_quantize
from pipeline.stages.sensitivity import run as run_sensitivity
from pipeline.tasks import kept, written
from pipeline.tasks.divergence import measure as measure_divergence
from pipeline.tasks.humaneval import measure as measure_humaneval
from pipeline.tasks.humaneval_answers import completion_prompt, should_stop
from pipeline.tasks.humaneval_problems import problems_of
from pipeline.tasks.mmlu import measure as measure_mmlu
from pipeline.tasks.registry import load_suite
from pipeline.tasks.subject import Subject
from pipeline.tasks.writing import write
from pipeline.workspace import REFERENCE, Workspace

VARIANT, SUITE, WORKSPACE = "q4", "smoke", Workspace(SMALL)
THREADS, ONE, TWO = "threads", "1", "2"
TARGET = 1.7  # times as fast with two nodes
_INPUTS = ("source.json", "export", "reference", "calibration", f"variants/{VARIANT}", f"evaluation/{REFERENCE}")
_LESS: dict[str, dict[str, Any]] = {
    "engine.yaml": {"engine": "threads", "address": None, "cores": 1},
    "sensitivity.yaml": {"texts": {"text-c4": 64}, "window": 64, "rows": 256},
}
_IMPORTED = (
    *(f"pipeline.stages.{stage}" for stage in ("calibrate", "sensitivity", "quantize", "validate")),
    "transformers.tokenization_utils_fast",  # of chat templates; stages import it when they first meet one
)
_EMPTY = 500
_PAUSE = 4.0, 14.0  # seconds between two kills: a new worker imports for some of them
_FOUND = "found.json"


# --- the stages ------------------------------------------------------------------------------------------------------


def emptied(folder: Path) -> Path:
    """`folder`, without what an earlier run left."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def quantize() -> Path:
    """The whole variant."""
    emptied(WORKSPACE.artifact(VARIANT))
    run_quantize(SMALL, VARIANT)
    return WORKSPACE.artifact(VARIANT)


def calibrate() -> Path:
    """Statistics of less text; the demo's, which other stages read, take their place again."""
    place, kept_there, found = WORKSPACE.moments.parent, emptied(Path("kept")), emptied(Path("calibrated"))
    place.replace(kept_there)
    run_calibrate(SMALL)
    place.replace(found)
    kept_there.replace(place)
    return found


def sensitivity() -> Path:
    """Damage and errors of every matrix."""
    emptied(WORKSPACE.sensitivity)
    run_sensitivity(SMALL)
    return WORKSPACE.sensitivity


def asked(name: str, against: bool = True, **fields: Any) -> tuple[Subject, Path]:
    """The variant as a task sees it, `fields` of the suite's part changed, and an empty folder for items; `against`:
    beside the reference's."""
    suite, folder = load_suite(SUITE), emptied(Path("items") / name)
    folder.mkdir(parents=True)
    wanted = getattr(suite, name).model_copy(update=fields)
    reference = kept.finished(WORKSPACE.evaluation(REFERENCE) / name) if against else None
    return replace(validate._subject(SMALL, VARIANT, suite), wanted=wanted, reference=reference), folder


def divergence() -> Path:
    """The suite's windows."""
    subject, folder = asked("divergence")
    measure_divergence(subject, folder)
    return folder


def mmlu() -> Path:
    """The suite's questions."""
    subject, folder = asked("mmlu")
    measure_mmlu(subject, folder)
    return folder


def writing() -> Path:
    """Solutions written, and not judged."""
    subject, folder = asked("humaneval", False, problems=24, max_new_tokens=64)
    requests = {problem.task_id: completion_prompt(problem) for problem in problems_of(subject)}
    write(subject, "HumanEval", requests, Journal(folder / written.ITEMS), should_stop)
    return folder


def judging() -> Path:
    """HumanEval's own solutions, as if the model had written them."""
    subject, folder = asked("humaneval", False, problems=164, timeout_seconds=60)  # no verdict for want of time
    solutions = Journal(folder / written.ITEMS)
    for problem in problems_of(subject):
        item = {"prompt": problem.prompt, "ids": [], "text": problem.canonical_solution, "cut": None}
        solutions.record(written.name_of(problem.task_id), item)
    measure_humaneval(subject, folder)
    return folder


STAGES: dict[str, tuple[str, Callable[[], Path]]] = {
    "quantize": ("quantize q4", quantize),
    "calibrate": ("calibrate, 7,168 tokens", calibrate),
    "sensitivity": ("sensitivity, 64 tokens", sensitivity),
    "divergence": ("divergence, 32 windows of 192 tokens", divergence),
    "mmlu": ("MMLU, 57 questions", mmlu),
    "writing": ("HumanEval, 24 answers of 64 tokens", writing),
    "judging": ("HumanEval, 164 verdicts", judging),
}
"""What of it is measured, and the function that does it in the current folder and gives the folder that it wrote."""
KILLED = ("quantize", "divergence")


# --- one engine ------------------------------------------------------------------------------------------------------


class Watched:
    """What passes through an engine from now on.

    Attributes:
        units: how many.
        running: seconds in which there were any.
        reducing: seconds of putting them together.
    """

    def __init__(self, engine: Engine):
        self._run = engine.run
        self.reset()
        engine.run = self.run  # type: ignore[method-assign]

    def reset(self) -> None:
        """Count from 0."""
        self.units, self.running, self.reducing = 0, 0.0, 0.0

    def run(self, job: Callable[[Any], Any], units: Iterable[Any], reduce: Callable[[Any, Any], object]) -> None:
        """As the engine's own."""

        def counted() -> Iterator[Any]:
            for unit in units:
                self.units += unit is not None
                yield unit

        def timed(unit: Any, made: Any) -> None:
            started = time.perf_counter()
            reduce(unit, made)
            self.reducing += time.perf_counter() - started

        started = time.perf_counter()
        self._run(job, counted(), timed)
        self.running += time.perf_counter() - started


def start(own: list[int]) -> None:
    """Start Ray nodes on loopback, one on each of these cores. This process is on the first."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 500 << 20}
    nodes = Cluster(True, head_node_args={**settings, "include_dashboard": False})
    for core in own[1:]:
        os.sched_setaffinity(0, [core])  # a node is where it was started
        nodes.add_node(**settings)
    os.sched_setaffinity(0, own[:1])
    os.environ["RAY_ADDRESS"] = nodes.address


def nothing(unit: int) -> int:
    """The smallest unit."""
    return unit


def ready(unit: int) -> int:
    """The process that has imported what stages need."""
    del unit
    for name in _IMPORTED:
        import_module(name)
    time.sleep(0.1)  # for another worker to take the next one
    return os.getpid()


def wake(engine: Engine) -> None:
    """Return when all workers are ready."""
    found = set[int]()
    while len(found) < engine.workers:
        engine.run(ready, range(4 * engine.workers), lambda _, process: found.add(process))


def digest(folder: Path) -> str:
    """Of all files in a folder, 64 hex digits."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return keys.digest({str(path.relative_to(folder)): sha256_of(path) for path in files})


def timed(name: str, watched: Watched | None) -> dict[str, Any]:
    """A stage's seconds and digest; of a watched engine also the units, and the seconds that only the head worked."""
    if watched:
        watched.reset()
    started = time.perf_counter()
    folder = STAGES[name][1]()
    found = {"seconds": (seconds := time.perf_counter() - started), "digest": digest(folder)}
    if watched:
        found |= {"units": watched.units, "head_seconds": seconds - watched.running + watched.reducing}
    return found


def working() -> list[psutil.Process]:
    """Ray's workers below this process that are at a unit: Ray makes that their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith(f"ray::{cluster._do.__name__}"):  # agents have titles too: without them a node dies
                found.append(process)
    return found


@contextmanager
def killing(most: int, chance: random.Random, pause: tuple[float, float] = _PAUSE) -> Iterator[list[int]]:
    """SIGKILL up to `most` working workers at random moments; their process ids so far."""
    over, killed = threading.Event(), list[int]()

    def work() -> None:
        while len(killed) < most and not over.wait(chance.uniform(*pause)):
            if found := working():
                victim = chance.choice(found)
                with suppress(psutil.Error):
                    victim.kill()
                    killed.append(victim.pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def disturbed(name: str, kills: int, expected: str, watched: Watched) -> dict[str, Any]:
    """A stage, as often as it takes until so many of its workers were killed."""
    chance, seconds, count, found = random.Random(kills), list[float](), 0, set[str]()
    while count < kills:
        with killing(kills - count, chance) as killed:
            run = timed(name, watched)
        count += len(killed)
        seconds.append(run["seconds"])
        found.add(run["digest"])
    return {"kills": count, "seconds": seconds, "units": watched.units, "equal": found == {expected}}


@click.group(invoke_without_command=True)
@click.option("--stage", "names", multiple=True, type=click.Choice(list(STAGES)), help="Only these.")
@click.option("--kills", default=0, help=f"Workers to kill, in {' and '.join(KILLED)} together.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "engine.json")
@click.pass_context
def main(context: click.Context, names: tuple[str, ...], kills: int, out: Path) -> None:
    """Measure the stages by threads, one node and two; write or complete the record in `out`."""
    if context.invoked_subcommand:
        return
    wanted = names or tuple(STAGES)
    found = read_json(out) if names and out.exists() else {"stages": {}, "empty_unit_ms": {}, "kills": {}}
    try:
        found |= {"machine": machine.describe(), "ray": version("ray"), "busy_percent": machine.busy_percent()}
    except PackageNotFoundError:
        raise click.ClickException(f"nodes are Ray's: {cluster.INSTALL}") from None
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    if len(cores) < 2:
        raise click.ClickException("two nodes take two cores; this process may use one.")
    for engine, own in ((THREADS, cores), (ONE, cores[:1]), (TWO, cores[:2])):
        try:
            project = prepared(ROOT / ".bench" / "engine")
        except PipelineError as error:
            raise click.ClickException(str(error)) from None
        home = own if engine == THREADS else own[:1]
        command = ["taskset", "-c", ",".join(home), sys.executable, "-m", "benchmarks.engine", "once", engine]
        command += [",".join(own), str(kills), *wanted]
        environment = project.environment | {"PIPELINE_STORE": str(ROOT / Store().root), DEVICE: "cpu"}
        environment |= {VARIABLE: "threads" if engine == THREADS else "ray"}
        done = subprocess.run(command, cwd=project.folder, env=environment, check=False)
        if not (project.folder / _FOUND).exists():  # written last; Ray's nodes may end with a status of their own
            raise click.ClickException(f"{engine}: ended with status {done.returncode} before all was measured.")
        result = read_json(project.folder / _FOUND)
        for name, run in result["stages"].items():
            found["stages"].setdefault(name, {})[engine] = run
        found["empty_unit_ms"] |= result["empty_unit_ms"]
        found["kills"] |= result["kills"]
    found["stages"] = {name: found["stages"][name] for name in STAGES if name in found["stages"]}
    write_json(out, found)
    click.echo(report(found))


def prepared(work: Path) -> Project:
    """A project whose configuration asks for less, with links to what the demo made. Raises PipelineError where it did
    not run."""
    project = Project(emptied(work))
    for name, values in _LESS.items():
        project.write(name, project.read(name) | values)
    for name in _INPUTS:
        place = WORKSPACE.require(ROOT / WORKSPACE.root / name, "validate", VARIANT)
        for file in (place, *place.rglob("*")):
            if file.is_file():
                link_or_copy(file, project.folder / file.relative_to(ROOT))
    return project


@main.command(hidden=True)
@click.argument("engine")
@click.argument("cores")
@click.argument("kills", type=int)
@click.argument("names", nargs=-1)
def once(engine: str, cores: str, kills: int, names: tuple[str, ...]) -> None:
    """The stages by one engine, in the current folder; what is found lies there too."""
    ready(0)
    watched, found = None, {"stages": dict[str, Any](), "empty_unit_ms": {}, "kills": {}}
    if engine != THREADS:
        start([int(core) for core in cores.split(",")])
        wake(workers := chosen())
        started = time.perf_counter()
        workers.run(nothing, range(_EMPTY), lambda *_: None)
        found["empty_unit_ms"][engine] = 1000 * (time.perf_counter() - started) / _EMPTY
        watched = Watched(workers)
    for name in names:
        found["stages"][name] = run = timed(name, watched)
        click.echo(f"{engine}: {name} {run}")
    for name in [name for name in KILLED if kills and engine == TWO and name in names]:
        share = kills // len(KILLED) if set(KILLED) <= {*names} else kills
        found["kills"][name] = run = disturbed(name, share, found["stages"][name]["digest"], watched)
        click.echo(f"{engine}: {name} {run}")
    write_json(Path(_FOUND), found)


# --- what it says ----------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    """The table of stages, and sentences on what it does not hold."""
    head = ("stage", "threads, s", "one node, s", "two, s", "times as fast", "units", "the head's own, s", "bytes")
    rows, slow = [], []
    for name, runs in found["stages"].items():
        seconds, two = [runs[engine]["seconds"] for engine in (THREADS, ONE, TWO)], runs[TWO]
        others = [engine for engine in (THREADS, ONE) if runs[engine]["digest"] != two["digest"]]
        faster, own = seconds[1] / two["seconds"], two["head_seconds"]
        rows.append([
            STAGES[name][0], *(f"{value:.1f}" for value in seconds), f"{faster:.2f}", f"{two['units']:,}", f"{own:.1f}",
            f"OTHERS with {' and '.join(others)}" if others else "the same",
        ])  # fmt: skip
        if faster < TARGET:
            slow.append(f"{name} (of {two['seconds']:.1f} s the head node works {own:.1f} alone)")
    told = [f"Two nodes are less than {TARGET} times as fast in {', '.join(slow)}."] if slow else []
    one, both = (found["empty_unit_ms"][engine] for engine in (ONE, TWO))
    told.append(f"An empty unit takes {one:.2f} ms with one node, {both:.2f} with two.")
    for name, run in found["kills"].items():
        times, same = (
            [f"{value:.0f} s" for value in run["seconds"]],
            "the same bytes" if run["equal"] else "OTHER BYTES",
        )
        told.append(f"{run['kills']} workers were killed at random in {name} ({' and '.join(times)}): {same}.")
    used = found["machine"]
    told.append(f"{used['cpu']}, {used['cores']} cores, {found['busy_percent']:.0f} % busy before; Ray {found['ray']}.")
    return f"{table(head, rows)}\n\n{' '.join(told)}"


if __name__ == "__main__":
    main()
