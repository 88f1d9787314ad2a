"""The calibrate stage: its file, and that a killed run goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open

from pipeline.calibrate.results import read_moments, read_products, read_ranges
from pipeline.calibrate.texts import dataset, encoder, input_ids
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.calibration import CalibrationConfig, load_calibration
from pipeline.errors import EvaluationError
from pipeline.graph.slices import DecoderSlices
from pipeline.preflight.guard import guarded
from pipeline.runtime.chat import transcript
from pipeline.runtime.device import Gpu
from pipeline.runtime.stream import LayerStream, Passed, mirror
from pipeline.stages import calibrate, download, export, sensitivity, validate
from pipeline.tasks.registry import load_suite
from pipeline.tasks.unseen import check_unseen, evaluation_texts
from pipeline.workspace import MODEL_FILE, REFERENCE, Workspace
from tests import tiny
from tests.artifact.exported import contents
from tests.conftest import ROOT
from tests.torch_device import choose

# The process dies in the middle of layer 2: its states are half written.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pipeline.runtime.stream import LayerStream
from pipeline.stages import calibrate
batches = LayerStream._batches
def die(self, part):
    yield from batches(self, part)
    if self.layer == 2:
        os.kill(os.getpid(), signal.SIGKILL)
LayerStream._batches = die
calibrate.run({model!r})
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The tiny model's (3 layers, 4 windows of 64 tokens), exported."""
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    download.run(tiny.MODEL)
    export.run(tiny.MODEL)
    return Workspace(tiny.MODEL)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are measured from now on."""
    layers: list[int] = []
    advance = LayerStream.advance
    monkeypatch.setattr(
        LayerStream, "advance", lambda self, *beside: (layers.append(self.layer), advance(self, *beside))[1]
    )
    return layers


def _calibrate(workspace: Workspace) -> dict[str, bytes]:
    calibrate.run(tiny.MODEL)
    return contents(workspace.moments.parent)


def _stop(workspace: Workspace) -> Path:
    """Stop the stage before layer 3, where layer 2 is the next that is not recorded; the folder it leaves."""
    advance = LayerStream.advance

    def stopping(self: LayerStream, *beside: Any) -> Passed:
        if self.layer == 3:
            raise KeyboardInterrupt
        return advance(self, *beside)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerStream, "advance", stopping)
        calibrate.run(tiny.MODEL)
    return workspace.partial("calibration")


def test_every_input_is_measured_and_nothing_else_is_left(workspace: Workspace, passed: list[int]) -> None:
    _calibrate(workspace)
    assert passed == [0, 1, 2, 3]
    with safe_open(workspace.moments, "numpy") as file:
        assert list(file.metadata()) == ["key"]  # of several, the library writes the order that it likes
        body = [f"layers.{layer}.{part}" for layer in range(3) for part in ("attention", "output", "mlp", "down")]
        assert sorted(file.keys()) == sorted([*body, "head"])
    ranges = read_ranges(workspace)
    assert sorted(ranges) == [
        f"layers.{layer}.{part}" for layer in range(3) for part in ("key", "value", "value.rotated")
    ]
    assert all(found.shape == (64,) and (found > 0).all() for found in ranges.values())
    layers = {f"layers.{layer}.safetensors" for layer in range(3)}
    assert {file.name for file in workspace.moments.parent.iterdir()} == {
        workspace.moments.name,
        workspace.ranges.name,
    } | layers
    assert not workspace.partial("calibration").parent.exists()


def test_a_killed_run_goes_on_at_its_layer(workspace: Workspace, passed: list[int]) -> None:
    want = _calibrate(workspace)
    code = KILLED.format(root=str(ROOT), model=tiny.MODEL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = workspace.partial("calibration")
    assert contents(workspace.moments.parent) == want  # what was there stays until the new one is whole
    written = {"layers.0.safetensors", "layers.1.safetensors", "statistics.2.safetensors"}
    assert {file.name for file in partial.iterdir()} == written | {"hidden.2", "hidden.3"}
    passed.clear()
    assert _calibrate(workspace) == want
    assert passed == [2, 3]
    assert not partial.exists()


@pytest.mark.parametrize("name", ["hidden.2", "layers.0.safetensors", "statistics.2.safetensors"])
def test_damaged_files_are_not_believed(name: str, workspace: Workspace, passed: list[int]) -> None:
    states = _stop(workspace) / name
    data = bytearray(states.read_bytes())
    data[1000] ^= 1
    states.write_bytes(data)
    passed.clear()
    _calibrate(workspace)
    assert passed == [0, 1, 2, 3]


def test_correlations_are_those_of_the_text(workspace: Workspace) -> None:
    """Within float16's rounding of a correlation; what lies on the disk is what GPTQ factors."""
    calibrate.run(tiny.MODEL)
    store, moments = Store(), read_moments(workspace)
    folder = workspace.reference(store)
    slices = DecoderSlices(
        onnx.load(folder / MODEL_FILE, load_external_data=False), read_architecture(folder / "config.json")
    )
    Path("states").mkdir()
    stream = LayerStream(slices, folder, input_ids(load_calibration(), folder, store), Path("states"))
    while stream.layer < 3:
        for name, products in stream.advance().products.items():
            mirror(products)
            found, damping = read_products(workspace, name, moments[name])
            norms = np.sqrt(np.outer(moments[name], moments[name]))
            assert (found == found.T).all() and (found.diagonal() == moments[name]).all()
            np.testing.assert_array_less(np.abs(found - products / 256), norms * 2**-11 + 1e-12)
            assert damping > 0


def test_other_text_starts_anew(workspace: Workspace, passed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    _stop(workspace)
    tiny.edit(Path("configs/calibration.yaml"), texts={tiny.CALIBRATION: 192})
    passed.clear()
    _calibrate(workspace)
    assert passed == [0, 1, 2, 3]
    assert "dropped" in capsys.readouterr().err


def test_conversations_are_calibrated_on_as_the_model_reads_them(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows of a chat begin with the template's text, and their tokens count."""
    store, folder = Store(), workspace.reference(Store())
    plain = CalibrationConfig(texts={tiny.CALIBRATION: 128}, window=64)
    both = CalibrationConfig(texts={tiny.CALIBRATION: 128}, chats={"chat-coding": 192}, window=64)
    windows, chats = input_ids(plain, folder, store), input_ids(both, folder, store)[2:]
    assert [len(ids) for ids in chats] == [64, 64, 64] and both.tokens == 320
    assert all((a == b).all() for a, b in zip(windows, input_ids(both, folder, store), strict=False))
    rendered = encoder(folder)(transcript(folder, dataset("chat-coding", store)))
    np.testing.assert_array_equal(chats[0], rendered[:64])
    Path("configs/calibration.yaml").write_text(both.model_dump_json())
    calibrate.run(tiny.MODEL)
    assert "over 320 tokens" in capsys.readouterr().out


def test_a_gpu_goes_on_with_no_other_device_s_work(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    key = calibrate._key(workspace, [])
    choose(monkeypatch, Gpu("cpu", "torch"))
    assert calibrate._key(workspace, []) != key
    calibrate.run(tiny.MODEL)
    with safe_open(workspace.moments, "numpy") as file:
        assert file.metadata()["key"] != key


def test_what_judges_does_not_calibrate(workspace: Workspace) -> None:
    """A sentence of it in a window is enough."""
    store, folder = Store(), workspace.reference(Store())
    suite = load_suite("seconds")
    texts = dict(evaluation_texts(suite, store))
    assert texts.keys() == {"text-wiki", "chat-mt-bench", "text-bottle", "text-vietnamese", "mmlu", "humaneval"}
    windows, encode = input_ids(load_calibration(), folder, store), encoder(folder)
    check_unseen(windows, folder, suite, store)
    for judging, found in texts.items():
        sentence = max(found[-1].splitlines(), key=len)[:400]
        planted = [*windows, np.array(encode(f"Once upon a time. {sentence}"))]
        with pytest.raises(EvaluationError, match=rf"13-grams with {judging}, which judges"):
            check_unseen(planted, folder, suite, store)


@pytest.mark.parametrize(
    ("stage", "arguments", "output"),
    [(calibrate, (), "calibration"), (sensitivity, (), "sensitivity"), (validate, (REFERENCE,), "evaluation")],
    ids=["calibrate", "sensitivity", "reference"],
)
def test_no_stage_goes_on_when_the_suite_judges_on_what_was_tuned(
    workspace: Workspace, stage: ModuleType, arguments: tuple[str, ...], output: str
) -> None:
    """The suite may be changed after calibration, whose own stage does not run again then."""
    if stage is not calibrate:
        calibrate.run(tiny.MODEL)
    suite = Path("configs/evaluation/seconds.yaml")
    tiny.edit(suite, divergence={"prose": {tiny.CALIBRATION: 20}, "window": 65})
    with pytest.raises(EvaluationError, match=rf"13-grams with {tiny.CALIBRATION}, which judges: .* or the suite"):
        guarded(stage.__name__.rpartition(".")[2], stage.run, tiny.MODEL, *arguments)
    assert not (workspace.root / output).exists()
