"""The stage learn: nothing for recipes without it; what it learned is what quantize writes, in the same places."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
import yaml

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.learn import training
from pipeline.preflight.guard import guarded
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import calibrate, download, export, learn, quantize
from pipeline.workspace import PLAN_FILE, Workspace
from tests import tiny
from tests.artifact.exported import contents

LEARNED = "q4_learned"


def settings(**learning: object) -> None:
    """configs/recipes/q4_learned.yaml"""
    recipe = {"extends": "q4", "title": "Q4, learned", "version": 1, "gate": "q4", "learn": learning}
    Path(f"configs/recipes/{LEARNED}.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, calibrated; q4 is written."""
    folder = tmp_path_factory.mktemp("learn")
    with pytest.MonkeyPatch.context() as patch:
        tiny.make_store(folder / "store")
        patch.setenv("PIPELINE_STORE", str(folder / "store"))
        patch.chdir(tiny.copy_configs(folder))
        tiny.edit(Path("configs/recipes/q4.yaml"), search="nearest")  # leaves something to gain
        tiny.edit(Path("configs/calibration.yaml"), texts={"text-c4": 256})
        settings(steps=6, tokens=192, rate=5e-3, seed=1)  # on which it gains
        for stage in (download, export, calibrate):
            stage.run(tiny.MODEL)
        guarded("learn", learn.run, tiny.MODEL, "q4")
        quantize.run(tiny.MODEL, "q4")
    return folder


@pytest.fixture
def workspace(project: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The project as working directory; tests run in the order of the file."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("PIPELINE_STORE", str(project / "store"))
    monkeypatch.setattr(training, "cores", lambda: 1)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    return Workspace(tiny.MODEL)


def tensors(workspace: Workspace, variant: str) -> dict[str, tuple[object, ...]]:
    """Of every stored tensor of an artifact its type, shape, place and bytes; of the nodes all, under ""."""
    (path,) = workspace.artifact(variant).glob("*.onnx")
    (data,) = (path.read_bytes() for path in workspace.artifact(variant).glob("*.data.*"))
    graph = onnx.load(path, load_external_data=False).graph
    found: dict[str, tuple[object, ...]] = {"": tuple(node.SerializeToString() for node in graph.node)}
    for item in graph.initializer:
        if place := {entry.key: entry.value for entry in item.external_data}:
            at, length = int(place["offset"]), int(place["length"])
            found[item.name] = item.data_type, tuple(item.dims), at, data[at : at + length]
    return found


def test_a_recipe_without_it_learns_nothing(workspace: Workspace) -> None:
    assert list(workspace.learned("q4").iterdir()) == []
    assert "learned" not in read_json(workspace.artifact("q4") / PLAN_FILE)


def test_quantize_wants_what_is_to_be_learned(workspace: Workspace) -> None:
    with pytest.raises(PipelineError, match=rf"learned/{LEARNED}: nothing whole.*pipeline learn tiny {LEARNED}"):
        quantize.run(tiny.MODEL, LEARNED)


def test_a_killed_run_goes_on_and_quantize_adopts_its_files(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = training._Training.step

    def interrupted(self: training._Training, some: torch.Tensor) -> None:
        if len(self.losses) == 2:
            raise KeyboardInterrupt
        step(self, some)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Training, "step", interrupted)
        learn.run(tiny.MODEL, LEARNED)
    guarded("learn", learn.run, tiny.MODEL, LEARNED)
    quantize.run(tiny.MODEL, LEARNED)
    assert not (workspace.root / "partial").exists()
    plan = read_json(workspace.artifact(LEARNED) / PLAN_FILE)
    assert plan["learned"]["kl_after"] < plan["learned"]["kl_before"]
    assert (plan["learned"]["steps"], len(plan["learned"]["losses"])) == (6, 6)
    own, plain = tensors(workspace, LEARNED), tensors(workspace, "q4")
    assert own.keys() == plain.keys()
    assert {name.rpartition(".")[2] for name in own if own[name] != plain[name]} == {"scales", "largest", "weight"}
    assert all(own[name][:-1] == plain[name][:-1] for name in own)  # types, shapes and places
    before = contents(workspace.learned(LEARNED))
    learn.run(tiny.MODEL, LEARNED)
    quantize.run(tiny.MODEL, LEARNED)
    assert "kept" in (text := capsys.readouterr().out) and "written before" in text
    (workspace.learned(LEARNED) / "learned.json").unlink()
    learn.run(tiny.MODEL, LEARNED)  # without an interruption
    assert contents(workspace.learned(LEARNED)) == before


def test_other_settings_learn_again(workspace: Workspace) -> None:
    before = read_json(workspace.artifact(LEARNED) / PLAN_FILE)
    settings(steps=2, tokens=192, rate=5e-4)
    learn.run(tiny.MODEL, LEARNED)
    quantize.run(tiny.MODEL, LEARNED)
    after = read_json(workspace.artifact(LEARNED) / PLAN_FILE)
    assert after["learned"]["steps"] == 2
    assert after["sha256"] != before["sha256"]
    OnnxDecoder(next(workspace.artifact(LEARNED).glob("*.onnx"))).run([1, 2, 3])


def test_torch_that_is_missing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings(steps=3, tokens=128)
    monkeypatch.setitem(sys.modules, "pipeline.runtime.interpreter", None)
    with pytest.raises(PipelineError, match=r"needs torch, which does not load.*remove `learn` from the recipe"):
        learn.run(tiny.MODEL, LEARNED)
