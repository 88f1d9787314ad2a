"""The int8 KV cache of written artifacts, against the same artifact with a float32 cache, family by family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pipeline.checkpoint.architecture import Architecture
from pipeline.errors import PlanError
from pipeline.quantize.cache import magnitudes, scales
from pipeline.runtime.session import OnnxDecoder, State
from tests.artifact.exported import PART_BYTES, Exported, changed, export
from tests.families import CASES, make_checkpoint

FLOAT, INT8 = changed("q4", search="nearest"), changed("q4", search="nearest", kv_cache="int8")
IDS = np.random.default_rng(5).integers(3, 320, 80).tolist()
CALIBRATION = np.random.default_rng(9).integers(3, 320, (33, 12)).tolist()
# Root mean square of the logits' error in parts of the logits'. Random weights turn one flipped code of the int8
# activations into 1 to 2 %.
ERROR = 0.04


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(make_checkpoint(folder / name, case)) for name, case in CASES.items()}


def cached(state: State, architecture: Architecture) -> dict[str, np.ndarray]:
    """What a state holds: [heads, tokens, channels] by name, in the order of the graph's outputs."""
    names = [f"layers.{layer}.{part}" for layer in range(architecture.layers) for part in ("key", "value")]
    return {name: value.numpy()[0] for name, value in zip(names, state.values, strict=True)}


def ranges_of(exported: Exported) -> dict[str, np.ndarray]:
    """Ranges over windows of 12 tokens, by the whole full-precision graph."""
    decoder, dims = OnnxDecoder(exported.folder / "model.onnx"), exported.architecture.rope.dims
    windows = [cached(decoder.run(ids)[1], exported.architecture) for ids in CALIBRATION]
    return {
        name: np.max([magnitudes(found[name], dims if name.endswith("key") else 0) for found in windows], axis=0)
        for name in windows[0]
    }


def write(exported: Exported, folder: Path, ranges: dict[str, np.ndarray]) -> Path:
    """The artifact with an int8 cache; its graph's path."""
    exported.write(INT8, folder, ranges=ranges)
    return folder / "tiny.onnx"


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_a_float_cache(name: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    """Calibrated on windows of 12 tokens, judged on 80: keys keep their range at positions that calibration never saw,
    on both sides of LongRoPE's switch."""
    exported = exports[name]
    exported.write(FLOAT, tmp_path / "float")
    decoder = OnnxDecoder(write(exported, tmp_path / "int8", ranges_of(exported)))
    want, _ = OnnxDecoder(tmp_path / "float/tiny.onnx").run(IDS)
    got, state = decoder.run(IDS)
    # Random routers send some tokens to other experts, however activations are rounded, and later tokens read those.
    rows = zip(got, want, strict=True) if exported.architecture.experts else [(got, want)]
    assert 0 < np.quantile([error(*pair) for pair in rows], 0.25) < ERROR
    for values in cached(state, exported.architecture).values():
        assert values.dtype == np.int8
        assert (np.abs(values.astype(int)).max(axis=(1, 2)) > 60).all()  # the codes are used


@pytest.mark.parametrize("name", CASES)
def test_decoding_through_the_cache_is_the_whole_text_at_once(
    name: str, exports: dict[str, Exported], tmp_path: Path
) -> None:
    exported = exports[name]
    decoder = OnnxDecoder(write(exported, tmp_path / "int8", ranges_of(exported)))
    ids = IDS[:60]  # short of LongRoPE's switch, which turns later keys only
    want, whole = decoder.run(ids)
    logits, state = decoder.run(ids[:40])
    steps = [logits]
    for token in ids[40:]:
        logits, state = decoder.run([token], state)
        steps.append(logits)
    assert error(np.concatenate(steps), want) < ERROR
    for key, values in cached(state, exported.architecture).items():
        # A rounding difference before moves a code by one here and there, never a value's place.
        assert np.abs(values.astype(int) - cached(whole, exported.architecture)[key]).mean() < 0.2, key


def test_the_file_is_as_planned(exports: dict[str, Exported], tmp_path: Path) -> None:
    exported = exports["phi3-partial-tied"]
    ranges = ranges_of(exported)
    drafted, plain = exported.write(INT8, tmp_path / "int8", ranges=ranges), exported.draft(FLOAT)
    assert sum((tmp_path / "int8" / file).stat().st_size for file in drafted.files) == drafted.bytes
    assert 4 * drafted.plan.cache.bytes == plain.plan.cache.bytes == 4 * 2 * 3 * 64  # layers, kv_heads · head_dim
    assert {place.name for place in drafted.model.graph.initializer} - {
        place.name for place in plain.model.graph.initializer
    } == {f"{name}.scales" for name in ranges}
    model = onnx.load(tmp_path / "int8/tiny.onnx")
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, found in ranges.items():
        assert tensors[f"{name}.scales"].shape == (1, 1, 1, 64)
        np.testing.assert_array_equal(tensors[f"{name}.scales"].reshape(-1), scales(found))
    cache = [v for v in [*model.graph.input, *model.graph.output] if "key" in v.name or "value" in v.name]
    assert {value.type.tensor_type.elem_type for value in cache} == {TensorProto.INT8}
    assert len(cache) == 12


@pytest.mark.parametrize(
    ("ranges", "part"),
    [
        (None, "there are none"),
        (np.ones(32, np.float32), "they are [32]"),
        (np.full(64, np.inf, np.float32), "channel 0 has inf"),
        (np.r_[np.ones(63, np.float32), np.nan].astype(np.float32), "channel 63 has nan"),
        (np.full(64, -1, np.float32), "channel 0 has -1"),
        (np.zeros(64, np.float32), "all are 0"),
    ],
)
def test_ranges_must_fit(ranges: np.ndarray | None, part: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    exported = exports["llama-tied"]
    wrong = {f"layers.{layer}.{kind}": np.ones(64, np.float32) for layer in range(3) for kind in ("key", "value")}
    wrong.pop("layers.1.value")
    wrong |= {} if ranges is None else {"layers.1.value": ranges}
    with pytest.raises(PlanError) as caught:
        exported.write(INT8, tmp_path / "artifact", ranges=wrong)
    assert "'layers.1.value'" in str(caught.value)
    assert part in str(caught.value)
    assert "calibrate" in str(caught.value)
    assert not (tmp_path / "artifact").exists()


def test_a_channel_that_calibration_never_excited_works(exports: dict[str, Exported], tmp_path: Path) -> None:
    """What it carries later is kept as far as its scale reaches, and nothing else suffers."""
    exported = exports["mimo"]
    ranges = ranges_of(exported)
    exported.write(FLOAT, tmp_path / "float")
    ranges["layers.1.value"][5] = 0
    got, _ = OnnxDecoder(write(exported, tmp_path / "int8", ranges)).run(IDS)
    want, _ = OnnxDecoder(tmp_path / "float/tiny.onnx").run(IDS)
    assert np.isfinite(got).all()
    assert error(got, want) < 5 * ERROR


def test_parts_do_not_change_with_the_cache(exports: dict[str, Exported], tmp_path: Path) -> None:
    """The weights are the float variant's, byte for byte."""
    exported = exports["qwen2"]
    exported.write(INT8, tmp_path / "int8", ranges=ranges_of(exported), part_bytes=PART_BYTES)
    exported.write(FLOAT, tmp_path / "float", part_bytes=PART_BYTES)
    weights = []
    for folder in ("int8", "float"):
        model = onnx.load(tmp_path / folder / "tiny.onnx")
        weights.append({tensor.name: tensor.raw_data for tensor in model.graph.initializer})
    assert {name: weights[0][name] for name in weights[1]} == weights[1]
