"""Two Ray nodes of one core each, on loopback: the bytes of the threads engine, also when workers are killed.

`make test-ray` installs Ray and runs this; without Ray it is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact.quantizers import Channels, Compensated, Moments, Quantizer, Search
from pipeline.artifact.write import write_artifact
from pipeline.calibrate.damage import sensitivities
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import SourceLock, write_lock
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.engine import EngineConfig
from pipeline.config.models import load_model
from pipeline.engine import Bundles, Engine, Here, Threads, cluster, supply
from pipeline.errors import PlanError, ResourceError, SourceError
from pipeline.files import write_json
from pipeline.graph.genai import Generation, genai_config
from pipeline.graph.slices import DecoderSlices
from pipeline.journal import Journal
from pipeline.partial import open_partial
from pipeline.planning.recipes import PlannedMatrix
from pipeline.runtime import device, stream
from pipeline.runtime.generate import Writer
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.layered_writer import LayeredWriter
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import calibrate, download, quantize
from pipeline.stages import export as export_stage
from pipeline.stages.calibrate import _correlating
from pipeline.tasks import divergence, divergence_scores, held_out, humaneval, mmlu, written
from pipeline.tasks import subject as subjects
from pipeline.tasks.humaneval import HumanEvalConfig
from pipeline.tasks.humaneval_problems import problems_of
from pipeline.tasks.mmlu import MmluConfig
from pipeline.tasks.subject import Subject
from pipeline.workspace import REFERENCE, Workspace
from tests import tiny
from tests.artifact.exported import Exported, contents, export
from tests.conftest import ROOT
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

os.environ.setdefault(cluster._LOOPBACK, "0")  # Ray reads it when it is imported
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.long
WINDOWS = [np.random.default_rng(seed).integers(0, 50, 12) for seed in range(9)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second node's project: this one's code under another path, nothing that was downloaded or made."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pipeline", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def config(clone: Path) -> Iterator[EngineConfig]:
    """Of a cluster that lives as long as this module."""
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
    elsewhere = {"PIPELINE_ROOT": str(clone), "PIPELINE_STORE": str(clone / "store")}
    nodes = cluster.start(node, node | {"env_vars": elsewhere})
    yield EngineConfig(engine="ray", address=nodes.address)
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def workers(config: EngineConfig) -> Engine:
    found = cluster.Cluster(config)
    assert found.workers == 2
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", CASES["qwen2"]))


def square(unit: int) -> int:
    if unit == 7:
        raise PlanError("unit 7 cannot be done")
    return unit * unit


def test_results_come_in_order_and_an_error_as_itself(workers: Engine) -> None:
    seen: list[int] = []
    with pytest.raises(PlanError, match="unit 7 cannot be done"):
        workers.run(square, range(20), lambda _, made: seen.append(made))
    assert seen == [unit * unit for unit in range(7)]


@pytest.mark.parametrize("recipe", ["q4_k_m", "q3"])
def test_a_quantized_model_has_the_same_bytes(recipe: str, exported: Exported, workers: Engine, tmp_path: Path) -> None:
    exported.write(load_recipe(recipe), tmp_path / "here")
    exported.write(load_recipe(recipe), tmp_path / "there", engine=workers)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def products(moments: Moments, name: str) -> tuple[np.ndarray, float]:
    """E[x·xᵀ] of an input, the same in every process."""
    width = len(moments[name])
    values = np.random.default_rng(width).standard_normal((2 * width, width)).astype(np.float32)
    return values.T @ values / len(values), 0.1


class Dying(Compensated):
    """Kills the process that first prepares a matrix's quantizer, once for each name in `marks`."""

    def __init__(self, moments: Any, marks: Path, victims: tuple[str, ...]):
        super().__init__(moments, partial(products, moments))
        self.marks, self.victims = marks, victims

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.moments, self.marks, self.victims)

    def of(self, planned: PlannedMatrix, channels: Channels) -> Quantizer:
        mark = self.marks / planned.matrix.name
        if planned.matrix.name in self.victims and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().of(planned, channels)


def write(exported: Exported, folder: Path, search: Search, engine: Engine) -> dict[str, bytes]:
    with open_partial(folder / "partial", "key") as growing:
        write_artifact(growing, exported.draft(load_recipe("q3")), exported.checkpoint, exported.folder, search, engine)
        return contents(growing.folder)


def test_a_killed_worker_costs_its_unit(exported: Exported, workers: Engine, tmp_path: Path) -> None:
    victims = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
    search = Compensated(exported.moments, partial(products, exported.moments))
    expected = write(exported, tmp_path / "here", search, Threads(2))
    found = write(exported, tmp_path / "there", Dying(exported.moments, tmp_path, victims), workers)
    assert {name for name in victims if (tmp_path / name).exists()} == {*victims}, "three workers were killed"
    assert found == expected


def always_dying(unit: int) -> None:
    del unit
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_unit_that_kills_every_worker_is_an_error(
    config: EngineConfig, workers: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers here: each one takes seconds to start."""
    monkeypatch.setattr(cluster, "_RETRIES", 1)
    with pytest.raises(ResourceError, match=r"a unit was lost 2 times"):
        cluster.Cluster(config).run(always_dying, [0], lambda *_: None)


def lagging(mark: Path, second: str, unit: int) -> int:
    """Unit 5 lags for ever where it is tried first; tried again it gives its result, or `second` as an error."""
    if unit == 5 and not mark.exists():
        mark.touch()
        time.sleep(1000)
    if unit == 5 and second:
        raise PlanError(second)
    return unit


def test_a_unit_that_lags_is_tried_twice(workers: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_PATIENCE", 1.0)
    seen: list[int] = []
    workers.run(partial(lagging, tmp_path / "first", ""), range(8), lambda _, made: seen.append(made))
    assert seen == [*range(8)]
    with pytest.raises(PlanError, match="the second try"):
        workers.run(partial(lagging, tmp_path / "other", "the second try"), range(8), lambda *_: None)


def logits(ids: np.ndarray) -> np.ndarray:
    return np.random.default_rng(99).standard_normal((50, 50)).astype(np.float32)[ids]


def test_windows_of_divergence_are_scored_the_same(workers: Engine, tmp_path: Path) -> None:
    for name, engine in (("here", Here()), ("there", workers)):
        own, other = tmp_path / name / "own", tmp_path / name / "other"
        own.mkdir(parents=True)
        other.mkdir()
        divergence_scores.record_reference(logits, WINDOWS, own, engine)
        divergence_scores.compare(logits, WINDOWS, own, other, "x", engine)
    assert contents(tmp_path / "there" / "own") == contents(tmp_path / "here" / "own")
    assert contents(tmp_path / "there" / "other") == contents(tmp_path / "here" / "other")


def test_statistics_of_calibration_are_the_same(
    exported: Exported, workers: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of two batches, and a layer's correlations, which are made in the next one's run."""
    found = []
    for name, engine in (("here", Here()), ("there", workers)):
        monkeypatch.setattr(device, "chosen", lambda wide, engine=engine: engine)
        monkeypatch.setattr(stream, "BATCH_TOKENS", 60)
        (tmp_path / name).mkdir()
        slices = DecoderSlices(exported.model, exported.architecture, cache=True)
        passing, passed = (
            stream.LayerStream(slices, exported.folder, WINDOWS, tmp_path / name),
            stream.Passed({}, {}, {}, {}),
        )
        seen = list[dict[str, np.ndarray]]()
        while passing.layer <= exported.architecture.layers:
            passed = passing.advance(_correlating(passed), seen.append)
            products = {name: total.copy() for name, total in passed.products.items()}
            seen.append({**products, **{f"{name} x": x for name, x in passed.samples.items()}, **passed.ranges})
        found.append(seen)
    for here, there in zip(*found, strict=True):
        assert here.keys() == there.keys()
        for name, values in here.items():
            np.testing.assert_array_equal(there[name], values, strict=True)


def rounded(matrix: Any, rows: np.ndarray) -> np.ndarray:
    del matrix
    return (np.round(rows * 50) / 50).astype(np.float32)


def test_damage_of_matrices_is_the_same(
    exported: Exported, workers: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two threads here, and by workers of one core."""
    found, ids = [], np.stack(WINDOWS)
    for name, engine in (("here", Threads(2)), ("there", Bundles(workers, 1))):
        monkeypatch.setattr(device, "narrow", lambda engine=engine: engine)
        slices = DecoderSlices(exported.model, exported.architecture)
        with open_partial(tmp_path / name, "key") as growing:
            found.append(sensitivities(slices, exported.folder, exported.checkpoint, ids, rounded, growing, "tiny"))
    assert found[0] == found[1]


# --- tasks


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The full-precision tiny model, as onnxruntime-genai loads it."""
    made = export(tiny.make_model(tmp_path_factory.mktemp("subject") / "reference"), tiny.CONTEXT)
    generation = Generation((2,), 1, 2, {"do_sample": False}, ())
    write_json(
        made.folder / "genai_config.json", genai_config(made.architecture, generation, "model.onnx", tiny.CONTEXT)
    )
    entry = load_model("smollm2-135m").model_copy(
        update={"mmlu_mode": "letter", "humaneval_prompt": "completion", "context": tiny.CONTEXT}
    )
    return Subject(
        "tiny", REFERENCE, made.folder, made.folder / "model.onnx", made.architecture, entry, Store(),
        open=lambda one: OnnxDecoder(one.graph), open_writer=lambda one: Writer(one.folder),
    )  # fmt: skip


@pytest.fixture
def both(workers: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bytes]]:
    """What a task leaves in its folder, the same here on all cores and on the cluster."""

    def measured(measure: Any, subject: Subject, begin: Callable[[Path], object] = lambda folder: None) -> Any:
        found = []
        for name, engine in (("here", Here()), ("there", workers)):
            for module in (subjects, humaneval):
                monkeypatch.setattr(module, "chosen", lambda wide, engine=engine: engine)
            (folder := tmp_path / name).mkdir()
            begin(folder)
            found.append((measure(subject, folder), contents(folder)))
        assert found[1] == found[0]
        return found[0]

    return measured


@pytest.fixture(params=["in memory", "layer by layer"])
def asked(request: pytest.FixtureRequest, subject: Subject, tmp_path: Path) -> Subject:
    if request.param == "in memory":
        return subject
    return replace(
        subject, layered=True, states=tmp_path / "states",
        open=lambda one: LayeredDecoder(one.graph, one.architecture, one.states, one.name),
        open_writer=lambda one: LayeredWriter(one.graph, one.architecture, one.states, one.name),
    )  # fmt: skip


def test_questions_are_answered_the_same(both: Any, asked: Subject, mmlu_path: Path) -> None:
    metrics, files = both(mmlu.measure, replace(asked, wanted=MmluConfig(questions=12)))
    assert metrics["n"] == len(files[mmlu.ITEMS].splitlines()) == 12


def test_text_is_read_the_same(both: Any, asked: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "scored_ids", lambda *_: WINDOWS)
    wanted = divergence.DivergenceConfig(prose={"text-wiki": len(WINDOWS)}, window=len(WINDOWS[0]))
    metrics, _ = both(divergence.measure, replace(asked, wanted=wanted))
    assert metrics["windows"] == len(WINDOWS)


def test_answers_are_written_the_same(both: Any, asked: Subject, humaneval_path: Path) -> None:
    wanted = HumanEvalConfig(problems=6, max_new_tokens=12, timeout_seconds=10, temperature=1, samples=2)
    _, files = both(humaneval.measure, replace(asked, wanted=wanted))
    texts = {line for line in files[written.ITEMS].splitlines()}
    assert len(texts) == 12


def test_verdicts_are_the_same(both: Any, subject: Subject, humaneval_path: Path) -> None:
    """Of solutions that lie there: every second one is right."""
    wanted = HumanEvalConfig(problems=10, max_new_tokens=1, timeout_seconds=20)
    solved = replace(subject, wanted=wanted)

    def write(folder: Path) -> None:
        journal = Journal(folder / written.ITEMS)
        for number, problem in enumerate(problems_of(solved)):
            text = "\n" + problem.canonical_solution if number % 2 else "    pass\n"
            item = {"prompt": problem.prompt, "ids": [], "text": text, "cut": ""}
            journal.record(written.name_of(problem.task_id), item)

    metrics, _ = both(humaneval.measure, solved, write)
    assert metrics["pass_at_1"] == 0.5


# --- who takes part


def test_a_worker_of_another_class_is_refused_by_name(
    config: EngineConfig, workers: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "kernel_class", lambda: "x86_64 none")
    with pytest.raises(ResourceError, match="no node that may take part has 1 cores"):
        cluster.Cluster(config)
    assert "worker 127.0.0.1" in (told := capsys.readouterr().err)
    assert "is refused: kernel class x86_64" in told and "x86_64 none here" in told


def project(model: str, case: str) -> None:
    """The downloaded and exported model, in the working directory and its store."""
    checkpoint, store, workspace = Path("checkpoints") / model, Store(), Workspace(model)
    make_checkpoint(checkpoint, CASES[case])
    files = []
    for path in sorted(checkpoint.iterdir()):
        with open(path, "rb") as file:
            files.append(store.add(file, path.name))
    write_lock(workspace.lock, SourceLock(model, {}, "0", "MIT", tuple(files)))
    made = export(workspace.weights(store))
    workspace.export.mkdir()
    for path in (made.folder / "model.onnx", made.folder / "config.json"):
        path.rename(workspace.export / path.name)
    workspace.reference(store)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def head(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The head's project, with a model that the second node's lacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPELINE_STORE", raising=False)
    return tmp_path


def test_a_node_gets_what_it_lacks_once(
    config: EngineConfig, workers: Engine, clone: Path, head: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    project("first", "qwen2")
    project("other", "qwen2")
    monkeypatch.setattr(sys, "argv", ["pipeline", "quantize", "first", "q4"])
    engine = cluster.Cluster(config)
    assert engine.workers == 2
    own = files_below(Path("artifacts/first"))
    assert files_below(clone / "artifacts" / "first") == own
    assert "reference/model.safetensors" in own and "reference/model.safetensors.blake3" in own
    assert not (clone / "artifacts" / "other").exists(), "the command does not name it"
    weights = Workspace("first").read_lock().file("model.safetensors")
    assert Store(clone / "store").intact(weights)

    names = sorted(checkpoint := Checkpoint(Workspace("first").root / REFERENCE))
    rows: list[bytes] = []
    engine.run(checkpoint.rows, names, lambda _, values: rows.append(values.tobytes()))
    assert rows == [checkpoint.rows(name).tobytes() for name in names]

    monkeypatch.setattr(cluster, "Head", None)  # nothing is fetched again
    for root, content in ((Path(), "new"), (clone, "old")):  # of another variant, which another command makes
        write_json(root / "artifacts/first/variants/q3/plan.json", content)
    assert cluster.Cluster(config).workers == 2
    there = clone / "artifacts" / "first" / "export" / "config.json"
    there.write_text("{}")
    assert cluster.Cluster(config).workers == 1
    assert "is refused: artifacts/first/export/config.json" in capsys.readouterr().err
    assert there.read_text() == "{}"


def test_whole_variants_are_made_side_by_side(
    config: EngineConfig, workers: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two commands at a time on one cluster; the second node lacks the model when both begin."""
    tiny.make_store(tmp_path / "store")
    monkeypatch.delenv("PIPELINE_STORE", raising=False)
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    Path("pipeline").symlink_to(ROOT / "pipeline")  # where a command's workers find it
    for stage in (download, export_stage, calibrate):
        stage.run(tiny.MODEL)
    variants, expected = ("q4", "q4_k_m"), {}
    for variant in variants:
        quantize.run(tiny.MODEL, variant)
        artifact = Workspace(tiny.MODEL).artifact(variant)
        expected[variant] = contents(artifact)
        shutil.rmtree(artifact)
    tiny.edit(tmp_path / "configs/engine.yaml", address=config.address)
    command = [sys.executable, "-m", "pipeline", "quantize", tiny.MODEL]
    environment = os.environ | {"PIPELINE_ENGINE": "ray"}
    commands = [
        subprocess.Popen([*command, variant], env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)
        for variant in variants
    ]
    for variant, running in zip(variants, commands, strict=True):
        said, _ = running.communicate(timeout=300)
        assert running.returncode == 0 and "2 workers × 1 cores on 2 nodes" in said, said
        assert contents(Workspace(tiny.MODEL).artifact(variant)) == expected[variant]


def test_wrong_bytes_are_refused(
    config: EngineConfig, workers: Engine, clone: Path, head: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    project("damaged", "llama-untied")
    monkeypatch.setattr(sys, "argv", ["pipeline", "quantize", "damaged", "q4"])
    weights = Workspace("damaged").read_lock().file("model.safetensors")
    blob = Store().path(weights.sha256)
    blob.chmod(0o644)
    with open(blob, "r+b") as file:
        file.seek(weights.size // 2)
        file.write(bytes([file.read(1)[0] ^ 1]))
    assert cluster.Cluster(config).workers == 1
    assert f"model.safetensors: wrong bytes. Expected sha256 {weights.sha256}" in capsys.readouterr().err
    assert not Store(clone / "store").has(weights.sha256)
    assert not (clone / "artifacts" / "damaged" / "reference" / "model.safetensors").exists()


def test_only_listed_files_are_given(head: Path) -> None:
    project("first", "qwen2")
    for name in ("q4/plan.json", "q4/first.data.0", "q3/plan.json", "q3/first.data.0"):
        write_json(Path("artifacts/first/variants") / name, {})
    names = supply.listed(["first"], ["q4"])
    assert names[0] == "artifacts/first/source.json" and not any(name.startswith("checkpoints") for name in names)
    variants = [name.removeprefix("artifacts/first/variants/") for name in names if "variants" in name]
    assert variants == ["q4/first.data.0", "q4/plan.json"]
    (head / "secret").write_text("s")
    given = supply.Head(str(head), names)
    assert given.read("artifacts/first/source.json", 2) == (head / "artifacts/first/source.json").read_bytes()[2:]
    for name in ("secret", "artifacts/first/../../secret", str(head / "secret")):
        with pytest.raises(SourceError, match="is no file that a worker of this command reads"):
            given.read(name, 0)
