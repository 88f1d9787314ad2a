"""How much calibration text a model of some width gets, what damping follows, and when GPTQ is not worth its hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.calibration import CalibrationConfig, load_calibration
from pipeline.errors import PipelineError
from pipeline.preflight import guard
from pipeline.preflight.compensation import damping, futile
from pipeline.stages import calibrate, download, export
from tests import tiny


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    download.run(tiny.MODEL)


def test_texts_grow_with_the_widest_input_in_whole_windows_and_chats_do_not() -> None:
    small = CalibrationConfig(texts={"a": 3000, "b": 1000}, chats={"c": 500}, window=512, per_channel=4)
    assert small.grown(1000) is small
    large = small.grown(11_008)
    assert large.chats == small.chats
    assert 4 * 11_008 <= large.tokens < 4 * 11_008 + 2 * 512
    assert all(tokens % 512 == 0 for tokens in large.texts.values())
    assert large.texts["a"] == pytest.approx(3 * large.texts["b"], abs=3 * 512)


@pytest.mark.parametrize("model", ["mimo-8b", "phi-4"])
def test_shipped_calibration_pays_for_the_models_of_this_product(model: str) -> None:
    assert load_calibration().per_channel >= 4
    assert futile(model, ("q4", "q4_k_m")) is None
    assert "4.0 for each of the" in (damping(model, ("q4",)) or "")


@pytest.mark.usefixtures("project")
def test_the_damping_is_foretold_and_then_what_was_chosen() -> None:
    assert "damping about" in (damping(tiny.MODEL, ("q4",)) or "")
    export.run(tiny.MODEL)
    calibrate.run(tiny.MODEL)
    assert "chosen on held-out windows" in (damping(tiny.MODEL, ("q4",)) or "")
    tiny.edit(Path("configs/recipes/q4.yaml"), search="weighted")
    assert damping(tiny.MODEL, ("q4",)) is None


@pytest.mark.usefixtures("project")
def test_hours_that_compensate_nothing_are_refused_until_the_remedy_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where they are hours: for a model of a billion parameters."""
    text = Path("configs/calibration.yaml")
    tiny.edit(text, texts={tiny.CALIBRATION: 64})
    guard.before("quantize", tiny.MODEL, "q4")
    monkeypatch.setattr(guard, "HOURS_FROM", 1)
    monkeypatch.setattr(guard, "hopeless", lambda *_: None)
    with pytest.raises(PipelineError, match=r"64 calibration tokens for the \d+ channels.*`per_channel: 4`"):
        guard.before("quantize", tiny.MODEL, "q4")
    tiny.edit(text, per_channel=4)
    guard.before("quantize", tiny.MODEL, "q4")
