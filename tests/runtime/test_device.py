"""A GPU computes what the CPU does, with the CPU in its place where it fails; artifacts never go there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import keys
from pipeline.config.models import load_device
from pipeline.errors import ConfigError
from pipeline.graph.slices import DecoderSlices
from pipeline.keys.closure import Closure
from pipeline.runtime import device
from pipeline.runtime.device import CPU, Device, Gpu, chosen_device, computed_by, passing
from pipeline.runtime.interpreter import Interpreter
from pipeline.runtime.session import OnnxDecoder
from pipeline.runtime.side_by_side import SideBySide
from pipeline.runtime.stream import LayerStream
from tests.activations import make_decoder
from tests.torch_device import GIVEN_OUT, Failing, choose

WINDOWS = [np.random.default_rng(7).integers(3, 320, length) for length in (80, 40)]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What one test chooses is no other's."""
    caches = (device._configured, device._device)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


# --- which one -------------------------------------------------------------------------------------------------------


def test_the_cpu_unless_something_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_DEVICE", raising=False)
    assert load_device() == "cpu"
    assert chosen_device() is CPU
    assert computed_by() == "cpu"


def test_auto_takes_a_gpu_where_torch_has_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device() is CPU
    assert "device: auto: torch" in capsys.readouterr().err
    device._device.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    assert (chosen_device().kind, chosen_device().name) == ("cuda", "cuda NVIDIA T4")


def test_cuda_without_a_gpu_is_an_error_that_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^device: cuda: torch .*pip install --force-reinstall -r requirements\.txt"):
        chosen_device()


def test_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", "cdua")
    with pytest.raises(ConfigError, match=r"^PIPELINE_DEVICE: device: .*did you mean 'cuda'"):
        load_device()


def test_a_gpu_too_small_for_the_weights_does_not_say_how_many_texts_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 10**9, 24 * 10**9))
    monkeypatch.setattr(device.machine, "available_memory", lambda: 123)
    found = Gpu("cpu", "torch")
    assert found.memory(4 * 10**9) == 6 * 10**9
    assert found.memory(11 * 10**9) == CPU.memory(11 * 10**9) == 123


# --- a past ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 5], ids=["grows", "has room"])
def test_tokens_after_a_past_are_those_of_the_whole_text(room: int, tmp_path: Path) -> None:
    """Of two texts of other lengths, one after the other in one batch."""
    model, architecture = make_decoder(tmp_path, "mimo", "BF16")
    part = DecoderSlices(model, architecture, cache=True).layer(1)
    run = Interpreter(part.model, tmp_path)
    hidden, lengths, total = torch.randn(2, 12, architecture.hidden), torch.tensor([12, 9]), 12
    want, *_ = run.run([str(part.target)], {str(part.source): hidden, "attention_mask": torch.ones(2, 12).long()})
    names = {value: value.replace("present.", "past_key_values.") for value in part.cached.values()}
    first = {str(part.source): hidden[:, :9], "attention_mask": torch.ones(2, 9).long()}
    past = dict(zip(names.values(), run.run(list(names), first), strict=True))
    for values in past.values():
        values[1, :, 6:] = 9  # of the second text these tokens come again
    if room:
        past = {name: torch.nn.functional.pad(value, (0, 0, 0, room)) for name, value in past.items()}
    new = torch.stack([hidden[0, 9:12], hidden[1, 6:9]])
    mask = (torch.arange(total) < lengths[:, None]).long()
    got, key = run.run([str(part.target), "present.1.key"], {str(part.source): new, "attention_mask": mask, **past})
    torch.testing.assert_close(got, torch.stack([want[0, 9:12], want[1, 6:9]]), atol=1e-5, rtol=1e-5)
    assert key.shape[2] == (total if not room else 9 + room)
    assert (key.data_ptr() == past["past_key_values.1.key"].data_ptr()) == bool(room)


# --- where it fails --------------------------------------------------------------------------------------------------


def test_what_fails_is_the_cpu_s_from_then_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, asked = Gpu("cpu", "torch"), []
    choose(monkeypatch, found)

    def work(where: Device) -> str:
        asked.append(where)
        if where is not CPU:
            raise RuntimeError(GIVEN_OUT)
        return "done"

    assert [passing("layer 3", work) for _ in range(2)] == ["done", "done"]
    assert asked == [found, CPU, CPU]
    said = "layer 3: cpu torch does not compute it (CUDA out of memory. Tried to allocate 2.00 GiB.); the CPU does\n"
    assert capsys.readouterr().err == said
    assert computed_by() == "cpu torch; on the CPU: layer 3"
    assert passing("layer 4", lambda where: where) is found


def test_an_error_that_is_not_the_device_s_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, found := Gpu("cpu", "torch"))

    def work(where: Device) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        passing("layer 3", work)
    assert not found.fallen


def statistics(folder: Path, decoder: Any) -> dict[str, np.ndarray]:
    (folder / "states").mkdir(exist_ok=True)
    stream, found = LayerStream(DecoderSlices(*decoder, cache=True), folder, WINDOWS, folder / "states"), {}
    while stream.layer <= 3:
        passed = stream.advance()
        found |= passed.products | passed.ranges
    return found


def test_layers_that_do_not_fit_are_calibrated_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = make_decoder(tmp_path, "mimo", "BF16")
    want = statistics(tmp_path, decoder)
    choose(monkeypatch, found := Failing(2))
    got = statistics(tmp_path, decoder)
    assert found.fallen == {f"calibration: layer {layer}" for layer in (1, 2, 3)}
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert got.keys() == want.keys()
    for name, values in got.items():
        np.testing.assert_allclose(values, want[name], rtol=1e-4, atol=1e-5 * np.abs(want[name]).max())


def test_texts_go_on_where_a_layer_falls_back_between_two_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values go with it; the head never fitted."""
    _, architecture = make_decoder(tmp_path, "mimo", "BF16")
    whole, ids = OnnxDecoder(tmp_path / "model.onnx"), WINDOWS[1].tolist()
    choose(monkeypatch, found := Failing(3))
    model = SideBySide(tmp_path / "model.onnx", architecture, 1, 50)
    for length in range(30, 34):
        got = model.run([ids[:length] if length == 30 else ids[length - 1 : length]])[0]
        want = whole.run(ids[:length])[0][-1]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        if length == 31:
            monkeypatch.setattr(found, "put", fails)
    assert found.fallen == {"writing: head", *(f"writing: layer {layer}" for layer in range(3))}
    assert all(isinstance(values, np.ndarray) for layer in model.cache for values in layer)


def fails(_: np.ndarray) -> None:
    raise RuntimeError(GIVEN_OUT)


# --- what never goes there, and what knows it ------------------------------------------------------------------------


def test_written_files_are_opened_on_the_cpu_whatever_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, Gpu("cpu", "torch"))
    make_decoder(tmp_path, "mimo")
    assert OnnxDecoder(tmp_path / "model.onnx").session.get_providers() == ["CPUExecutionProvider"]
    assert "pipeline.runtime.device" not in Closure.of("pipeline.runtime.session", "pipeline.runtime.generate").sources


@pytest.mark.parametrize(("stage", "counts"), [("calibrate", True), ("sensitivity", True), ("quantize", False)])
def test_the_device_is_part_of_the_code_key(stage: str, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("cpu", "cuda"):
        monkeypatch.setenv("PIPELINE_DEVICE", name)
        found.append(keys.of(stage, "smollm2-135m", "q4" if stage == "quantize" else None))
    assert (found[0] != found[1]) == counts
