"""Two Ray nodes of one core each, on loopback: the bytes of the threads engine, also when workers are killed.

`make test-ray` installs Ray and runs this; without Ray it is skipped.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact.quantizers import Channels, Compensated, Moments, Quantizer, Search
from pipeline.artifact.write import write_artifact
from pipeline.calibrate.damage import sensitivities
from pipeline.config.engine import EngineConfig
from pipeline.engine import Bundles, Engine, Here, Threads, cluster
from pipeline.errors import PlanError, ResourceError
from pipeline.graph.slices import DecoderSlices
from pipeline.partial import open_partial
from pipeline.planning.recipes import PlannedMatrix
from pipeline.runtime import device
from pipeline.runtime.stream import LayerStream
from pipeline.tasks import divergence_scores
from tests.artifact.exported import Exported, contents, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

os.environ.setdefault(cluster._LOOPBACK, "0")
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.long
WINDOWS = [np.random.default_rng(seed).integers(0, 50, 12) for seed in range(9)]


@pytest.fixture(scope="module")
def config() -> Iterator[EngineConfig]:
    """Of a cluster that lives as long as this module."""
    from ray.cluster_utils import Cluster as Nodes

    settings: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
    nodes = Nodes(True, head_node_args={**settings, "include_dashboard": False})
    nodes.add_node(**settings)
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


def test_a_unit_that_kills_every_worker_is_an_error(workers: Engine) -> None:
    with pytest.raises(ResourceError, match=r"a unit was lost 6 times"):
        workers.run(always_dying, [0], lambda *_: None)


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
    found = []
    for name, engine in (("here", Here()), ("there", workers)):
        monkeypatch.setattr(device, "chosen", lambda wide, engine=engine: engine)
        (tmp_path / name).mkdir()
        slices = DecoderSlices(exported.model, exported.architecture, cache=True)
        passing = LayerStream(slices, exported.folder, WINDOWS, tmp_path / name)
        passed = [passing.advance() for _ in range(exported.architecture.layers + 1)]
        found.append([{**each.products, **each.samples, **each.ranges} for each in passed])
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


def test_a_worker_of_another_class_is_refused_by_name(
    config: EngineConfig, workers: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "kernel_class", lambda: "x86_64 none")
    with pytest.raises(ResourceError, match="no node that may take part has 1 cores"):
        cluster.Cluster(config)
    assert "worker 127.0.0.1" in (told := capsys.readouterr().err)
    assert "is refused: kernel class x86_64" in told and "x86_64 none here" in told
