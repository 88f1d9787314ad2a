"""A decoder whose questions pass layer by layer answers as the whole graph does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint.architecture import Architecture
from pipeline.errors import EvaluationError
from pipeline.runtime.device import Gpu
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.session import OnnxDecoder
from tests.activations import make_decoder
from tests.families import CASES

pytest_plugins = ["tests.torch_device"]

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(3, 320, length) for length in (70, 5, 20)]
ANSWERS = [RNG.integers(3, 320, length) for length in (1, 6, 2)]


def ask(decoder: Any) -> list[np.ndarray]:
    """Logits of prompts, of answers to each in turn, of one answer continued, and of a prompt asked again."""
    found = []
    for prompt in PROMPTS:
        logits, state = decoder.run(prompt)
        found.append(logits)
        for answer in ANSWERS:
            logits, after = decoder.run(answer, state)
            found.append(logits)
        found.append(decoder.run(ANSWERS[0], after)[0])
    return [*found, decoder.run(PROMPTS[0])[0]]


def make(folder: Path, name: str, dtype: str = "F32") -> tuple[LayeredDecoder, Architecture]:
    _, architecture = make_decoder(folder, name, dtype)
    return again(folder, architecture), architecture


def again(folder: Path, architecture: Architecture) -> LayeredDecoder:
    """As after a restart: with what lies in the folder of states."""
    return LayeredDecoder(folder / "model.onnx", architecture, folder / "states", "tiny")


@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16"), ("mimo", "BF16")])
def test_logits_are_those_of_the_whole_graph(name: str, dtype: str, tmp_path: Path) -> None:
    """After a prompt as well as at its start, and across LongRoPE's switch at 64 tokens."""
    decoder, _ = make(tmp_path, name, dtype)
    decoder.prepare(ask)
    for got, want in zip(ask(decoder), ask(OnnxDecoder(tmp_path / "model.onnx")), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("name", "dtype"), [("phi3-longrope", "F32"), ("mimo", "BF16")])
def test_logits_are_those_of_the_whole_graph_on_a_gpu(name: str, dtype: str, gpu: Gpu, tmp_path: Path) -> None:
    test_logits_are_those_of_the_whole_graph(name, dtype, tmp_path)
    assert not gpu.fallen


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("file", range(5))
def test_an_interrupted_pass_goes_on_at_its_layer(file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes one of the files: embedding, three layers, norm."""
    decoder, architecture = make(tmp_path, "qwen2")
    decoder.prepare(ask)
    want = ask(decoder)
    for path in (tmp_path / "states").iterdir():
        path.unlink()
    passed: list[int] = []
    whole = LayeredDecoder._outputs

    def dying(self: LayeredDecoder, session: Any, part: Any, number: int) -> Any:
        passed.append(number)
        for count, hidden in enumerate(whole(self, session, part, number)):
            if number == file and count == 4:
                raise Killed
            yield hidden

    monkeypatch.setattr(LayeredDecoder, "_outputs", dying)
    with pytest.raises(Killed):
        again(tmp_path, architecture).prepare(ask)
    assert passed == list(range(file + 1))
    monkeypatch.setattr(LayeredDecoder, "_outputs", lambda *a: (passed.append(a[3]), whole(*a))[1])
    passed.clear()
    resumed = again(tmp_path, architecture)
    resumed.prepare(ask)
    assert passed == list(range(file, 5))
    for got, expected in zip(ask(resumed), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_was_answered_needs_no_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some answers were recorded before a kill: the others are asked of the hidden states that are there."""
    decoder, architecture = make(tmp_path, "llama-tied")
    decoder.prepare(ask)
    _, state = decoder.run(PROMPTS[2])
    want, _ = decoder.run(ANSWERS[1], state)
    monkeypatch.setattr(LayeredDecoder, "_pass", lambda *_: pytest.fail("a layer was loaded"))
    rest = again(tmp_path, architecture)
    rest.prepare(lambda some: some.run(ANSWERS[1], some.run(PROMPTS[2])[1]))
    np.testing.assert_array_equal(rest.run(ANSWERS[1], rest.run(PROMPTS[2])[1])[0], want)


def test_other_questions_pass_afresh(tmp_path: Path) -> None:
    decoder, architecture = make(tmp_path, "llama-tied")
    decoder.prepare(ask)
    other = again(tmp_path, architecture)
    other.prepare(lambda some: some.run(PROMPTS[2][1:]))
    want, _ = OnnxDecoder(tmp_path / "model.onnx").run(PROMPTS[2][1:])
    np.testing.assert_allclose(other.run(PROMPTS[2][1:])[0], want, atol=1e-4)
    with pytest.raises(EvaluationError, match="70 tokens were not announced"):
        other.run(PROMPTS[0])


def test_states_of_one_layer_lie_on_the_disk(tmp_path: Path) -> None:
    decoder, architecture = make(tmp_path, "llama-untied")
    decoder.prepare(lambda some: [some.run(ids) for ids in PROMPTS])
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "states").glob("hidden*")}
    assert sizes == {f"hidden.{architecture.layers + 1}": 4 * 95 * architecture.hidden}


def test_nothing_asked_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = make(tmp_path, "llama-tied")
    monkeypatch.setattr(LayeredDecoder, "_pass", lambda *_: pytest.fail("a layer was loaded"))
    decoder.prepare(lambda some: None)
    assert not (tmp_path / "states").exists()
