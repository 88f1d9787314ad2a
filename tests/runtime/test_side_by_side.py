"""Texts that pass a model together have the logits that each has by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.chunks import SUFFIX, copied
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.runtime import side_by_side
from pipeline.runtime.device import Gpu
from pipeline.runtime.session import OnnxDecoder
from pipeline.runtime.side_by_side import SideBySide, fitting_texts, token_bytes, working_bytes
from tests.activations import make_decoder
from tests.families import CASES
from tests.many_cores import with_cores
from tests.real_configs import architecture_of

pytest_plugins = ["tests.torch_device"]

RNG = np.random.default_rng(5)
TEXTS = [RNG.integers(3, 320, length).tolist() for length in (70, 62, 20, 40)]
TYPES = [*((name, "F32") for name in CASES), ("phi3", "F16"), ("mimo", "BF16")]


def make(folder: Path, name: str, dtype: str = "F32") -> SideBySide:
    _, architecture = make_decoder(folder, name, dtype)
    return SideBySide(folder / "model.onnx", architecture, 3, 80)


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_a_text_s_logits_are_its_own(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With others before, beside and after it: one ends, another takes its room; prompts take several chunks, and a
    text passes LongRoPE's switch at 64."""
    monkeypatch.setattr(side_by_side, "CHUNK", 16)
    model, whole = make(tmp_path, name, dtype), OnnxDecoder(tmp_path / "model.onnx")
    running: list[tuple[int, int]] = []  # number among TEXTS, tokens that have passed

    def advance(*new: tuple[int, int]) -> None:
        running[:] = [*((text, length + 1) for text, length in running), *new]
        rows = [TEXTS[text][:length] for text, length in running]
        begun = len(rows) - len(new)
        ids = [row if n >= begun or len(row) == model.switch + 1 else row[-1:] for n, row in enumerate(rows)]
        for got, row in zip(model.run(ids), rows, strict=True):
            want = whole.run(row)[0][-1]
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        assert model.lengths == [length for _, length in running]

    def drop(place: int) -> None:
        model.drop(place)
        running[place] = running[-1]
        running.pop()

    advance((0, 50), (1, 60), (2, 3))
    advance()
    advance()
    drop(1)
    advance((3, 33))
    advance()
    drop(2)
    drop(0)
    for _ in range(3):
        advance()
    assert [text for text, _ in running] == [2]
    drop(0)
    advance((0, 63))
    advance()
    advance()


WIDE = {"hidden_size": 1024, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("family", ["mimo", "phi3-longrope", "qwen2"])
def test_no_other_text_and_no_number_of_cores_decides_a_bit(family: str, tmp_path: Path) -> None:
    """Of a text of 70 tokens and five more; others come before and after it, and join and end meanwhile."""
    case = CASES[family]
    _, architecture = make_decoder(tmp_path, replace(case, config=case.config | WIDE) if family == "qwen2" else case)
    found = []
    for cores, before, after in ((1, 0, 0), (3, 0, 1), (2, 1, 2), (16, 2, 0)):
        with with_cores(cores):
            model = SideBySide(tmp_path / "model.onnx", architecture, 4, 80)
            rows = [model.run([*TEXTS[1 : 1 + before], TEXTS[0]])[before]]
            for step in range(4):
                new = TEXTS[len(TEXTS) - after :] if step == 1 else []
                rows.append(model.run([*([5 + step] for _ in model.lengths), *new])[before])
            for _ in range(after):
                model.drop(len(model.lengths) - 1)
            if before:
                model.drop(0)  # the last takes its number
            rows.append(model.run([[9] for _ in model.lengths])[0])
        found.append(np.stack(rows))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize(("name", "dtype"), [("phi3-longrope", "F32"), ("mimo", "BF16")])
def test_a_text_s_logits_are_its_own_on_a_gpu(
    name: str, dtype: str, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_a_text_s_logits_are_its_own(name, dtype, tmp_path, monkeypatch)
    assert not gpu.fallen


def test_memory_grows_with_what_is_written(tmp_path: Path) -> None:
    _, architecture = make_decoder(tmp_path, "mimo")
    assert token_bytes(architecture) == 2 * 4 * 3 * 2 * 32
    model = SideBySide(tmp_path / "model.onnx", architecture, 2, 64)
    assert sum(values.nbytes for layer in model.cache for values in layer) == 2 * 64 * token_bytes(architecture)


@pytest.mark.parametrize(("name", "most"), [("mimo-8b", 294_912), ("phi-4", 409_600)])
def test_memory_chooses_how_many(name: str, most: int, tmp_path: Path) -> None:
    architecture, tokens = architecture_of(name, tmp_path), 1000
    assert token_bytes(architecture) == most
    assert fitting_texts(architecture, 164, tokens, 0) == 1
    assert fitting_texts(architecture, 5, tokens, 10**12) == 5
    counts = [fitting_texts(architecture, 164, tokens, memory * 10**9) for memory in (8, 16, 24, 32)]
    assert counts == sorted(set(counts))
    for memory, count in zip((8, 16, 24, 32), counts, strict=True):
        room = 0.75 * memory * 10**9 - working_bytes(architecture, 164)
        assert count <= room / (tokens * most) < count + 1
    assert fitting_texts(architecture, 164, 2 * tokens, 32 * 10**9) == counts[-1] // 2


def test_the_first_pass_compares_every_weight_with_what_was_downloaded(tmp_path: Path) -> None:
    """Later ones trust the file, as a runtime does that has mapped it."""
    file = tmp_path / "model.safetensors"
    make_decoder(tmp_path, "qwen2")
    with open(file, "rb") as source:
        file.with_name(file.name + SUFFIX).write_bytes(copied(source).chunks)
    architecture = read_architecture(tmp_path / "config.json")
    first, later = (SideBySide(tmp_path / "model.onnx", architecture, 1, 8) for _ in range(2))
    later.run([[3]])
    ref = Checkpoint(tmp_path)["model.layers.2.mlp.down_proj.weight"]
    with open(file, "r+b") as stream:
        stream.seek(ref.offset)
        stream.write(b"\x01")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        first.run([[3]])
    later.run([[4]])
