"""Windows streamed layer by layer: statistics equal those of the whole graph, whatever was interrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from pipeline.errors import EvaluationError
from pipeline.files import sha256_of
from pipeline.graph.slices import DecoderSlices, product_inputs
from pipeline.quantize.factor import held_out_damping
from pipeline.runtime import stream as module
from pipeline.runtime.stream import LayerStream, batch_tokens, mirror, sampled
from tests.activations import make_decoder, run_whole
from tests.families import CASES
from tests.many_cores import with_cores
from tests.real_configs import architecture_of

WINDOWS = [np.random.default_rng(7).integers(3, 320, length) for length in (80, 80, 40, 1)]
TOKENS = sum(map(len, WINDOWS))


def whole(folder: Path, name: str, dtype: str = "F32") -> tuple[DecoderSlices, dict[str, np.ndarray]]:
    """A decoder's slices, and the inputs of its products over all windows by the whole graph: [tokens, channels]."""
    model, architecture = make_decoder(folder, name, dtype)
    taps = product_inputs(model, architecture)
    runs = [run_whole(folder, model, dict.fromkeys(taps.values()), ids) for ids in WINDOWS]
    return DecoderSlices(model, architecture), {
        key: np.concatenate([values[value] for values in runs]) for key, value in taps.items()
    }


def start(slices: DecoderSlices, folder: Path, layer: int | None = None, states: str = "states") -> LayerStream:
    (folder / states).mkdir(exist_ok=True)
    return LayerStream(slices, folder, WINDOWS, folder / states, layer)


def finish(stream: LayerStream) -> dict[str, np.ndarray]:
    """Sums and ranges of all layers from the stream's on."""
    found: dict[str, np.ndarray] = {}
    while stream.layer <= 3:
        passed = stream.advance()
        found |= {name: mirror(total) for name, total in passed.products.items()} | passed.ranges
    return found


def summed(inputs: list[np.ndarray], tokens: int) -> np.ndarray:
    """Σ x·xᵀ of windows' inputs as numpy adds it up in one panel: whenever so many tokens are together."""
    total, waiting = np.zeros((inputs[0].shape[1],) * 2, np.float32), list[np.ndarray]()
    for number, x in enumerate(inputs):
        waiting.append(x)
        if sum(map(len, waiting)) >= tokens or number == len(inputs) - 1:
            together = np.concatenate(waiting)
            total += together.T @ together
            waiting.clear()
    return np.triu(total)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16")])
def test_ranges_are_those_of_the_whole_graphs_cache(name: str, dtype: str, tmp_path: Path) -> None:
    """Over all windows; of a rotated pair of key channels, its greatest length."""
    model, architecture = make_decoder(tmp_path, name, dtype)
    found = finish(start(DecoderSlices(model, architecture, cache=True), tmp_path))
    names = {f"layers.{n}.{part}": f"present.{n}.{part}" for n in range(3) for part in ("key", "value")}
    plain = finish(start(DecoderSlices(model, architecture), tmp_path, states="plain"))
    turned = {f"{name}.rotated" for name in names if name.endswith(".value")}
    assert found.keys() == plain.keys() | names.keys() | turned
    assert all((found[key] == values).all() for key, values in plain.items())  # sums do not notice
    runs = [run_whole(tmp_path, model, names.values(), ids) for ids in WINDOWS]
    half = architecture.rope.dims // 2
    for key, value in names.items():
        tokens = np.concatenate([values[value] for values in runs], axis=1).astype(np.float64)  # [heads, tokens, dim]
        squares = tokens**2
        if key.endswith("key"):
            partner = np.arange(architecture.head_dim)
            partner[:half], partner[half : 2 * half] = partner[half : 2 * half].copy(), partner[:half].copy()
            squares += np.where(np.arange(architecture.head_dim) < 2 * half, squares[..., partner], 0)
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], np.sqrt(squares.max(axis=1)).reshape(-1), rtol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16")])
def test_sums_are_those_of_the_whole_graph(name: str, dtype: str, tmp_path: Path) -> None:
    slices, inputs = whole(tmp_path, name, dtype)
    found = finish(start(slices, tmp_path))
    assert list(found) == list(inputs)
    for key, x in inputs.items():
        want = x.astype(np.float64).T @ x.astype(np.float64)
        assert found[key].dtype == np.float32
        assert (found[key] == found[key].T).all()
        np.testing.assert_allclose(found[key], want, rtol=1e-4, atol=1e-5 * want.max())
        np.testing.assert_allclose(found[key].diagonal(), want.diagonal(), rtol=1e-4, atol=1e-6 * want.max())


@pytest.mark.parametrize("tokens", [1, 100, 2048])
def test_products_of_batches_are_added_in_their_order(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit those of the windows' own inputs, multiplied and added one batch after another."""
    monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(module, "SAMPLE_TOKENS", TOKENS)
    monkeypatch.setattr(module, "sampled", lambda windows: frozenset(range(len(windows))))
    slices = DecoderSlices(*make_decoder(tmp_path, "qwen2"))
    assert batch_tokens(slices.architecture) == max(tokens, 107)
    stream, ends = start(slices, tmp_path), np.cumsum([len(ids) for ids in WINDOWS])[:-1]
    with threadpool_limits(1, "blas"):
        while stream.layer <= 3:
            passed = stream.advance()
            for name, x in passed.samples.items():
                want = summed(np.split(x, ends), batch_tokens(slices.architecture))
                np.testing.assert_array_equal(np.triu(passed.products[name]), want)


@pytest.mark.parametrize(("name", "tokens"), [("mimo-8b", 3681), ("phi-4", 6006), ("smollm2-135m", 2048)])
def test_batches_grow_with_the_width(name: str, tokens: int, tmp_path: Path) -> None:
    """Inputs of so many tokens take no fewer bytes than the triangles that they become."""
    assert batch_tokens(architecture_of(name, tmp_path)) == tokens


def test_panels_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one panel; in many, the last shorter; all windows in one product, two in each, and the rest."""
    slices = DecoderSlices(*make_decoder(tmp_path, "qwen2"))
    want = finish(start(slices, tmp_path))
    monkeypatch.setattr(module, "PANEL_BYTES", 7 * 4 * 128)
    monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    for name, values in finish(start(slices, tmp_path, states="panels")).items():
        assert (values == values.T).all()
        np.testing.assert_allclose(values, want[name], rtol=1e-4, atol=1e-6 * want[name].max())


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_no_digit_depends_on_the_cores(dtype: str, tmp_path: Path) -> None:
    """Products, samples, ranges and hidden states, and the damping that they ask for, on 1, 2 and 3 threads."""
    slices, found = DecoderSlices(*make_decoder(tmp_path, "qwen2", dtype), cache=True), list[dict[str, bytes]]()
    for cores in (1, 2, 3):
        with with_cores(cores):
            stream, statistics = start(slices, tmp_path, states=str(cores)), dict[str, bytes]()
            while stream.layer <= 3:
                passed, digest = stream.advance(), stream.digest
                values = {name: mirror(total) for name, total in passed.products.items()} | passed.ranges
                statistics |= {name: value.tobytes() for name, value in values.items()} | {"states": digest.encode()}
                for name, x in passed.samples.items():
                    damping = held_out_damping(passed.products[name], x, passed.tokens[name])
                    statistics |= {f"{name} x": x.tobytes(), f"{name} damping": damping.hex().encode()}
                    statistics[f"{name} left"] = passed.products[name].tobytes()
            found.append(statistics)
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_samples_are_some_windows_inputs(tmp_path: Path) -> None:
    """A quarter of the windows, spread over the text."""
    slices, inputs = whole(tmp_path, "llama-tied")
    (kept,) = sampled(WINDOWS)
    first = sum(map(len, WINDOWS[:kept]))
    stream = start(slices, tmp_path)
    for _ in range(3):
        for name, values in stream.advance().samples.items():
            np.testing.assert_allclose(values, inputs[name][first : first + len(WINDOWS[kept])], rtol=2e-4, atol=1e-5)


def test_windows_that_are_kept() -> None:
    even = [np.zeros(512)] * 14
    assert sorted(sampled(even)) == [3, 10]
    assert sampled(even[:3]) == frozenset()
    assert len(sampled([np.zeros(5000)] * 100)) == 1


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_goes_on_at_any_layer(layer: int, tmp_path: Path) -> None:
    """With the file before that layer and nothing else, to the bit."""
    slices = DecoderSlices(*make_decoder(tmp_path, "phi3-longrope-partial"))
    want = finish(start(slices, tmp_path))
    first = start(slices, tmp_path)
    for _ in range(layer):
        first.advance()
    assert sha256_of(tmp_path / "states" / LayerStream.states_file(layer)) == first.digest
    if layer < 3:
        (tmp_path / "states" / LayerStream.states_file(layer + 1)).write_bytes(b"cut short by a kill")
    got = finish(start(slices, tmp_path, layer))
    assert list(got) == [name for number in range(layer, 4) for name in slices.inputs(number)]
    for name, values in got.items():
        assert (values == want[name]).all()


@pytest.mark.parametrize("content", [None, b"of other windows"])
def test_states_that_do_not_fit_are_refused(content: bytes | None, tmp_path: Path) -> None:
    slices = DecoderSlices(*make_decoder(tmp_path, "llama-tied"))
    (tmp_path / "states").mkdir()
    if content:
        (tmp_path / "states" / LayerStream.states_file(1)).write_bytes(content)
    with pytest.raises(EvaluationError, match=f"{TOKENS * 128 * 4:,}"):
        start(slices, tmp_path, layer=1)


def test_other_units_come_first_and_once(tmp_path: Path) -> None:
    """What they give is there before the layer's states are."""
    slices, seen = DecoderSlices(*make_decoder(tmp_path, "llama-untied")), list[tuple[int, int]]()
    stream = start(slices, tmp_path)
    written = tmp_path / "states" / LayerStream.states_file(1)
    stream.advance((partial(int, n) for n in range(3)), lambda made: seen.append((made, written.stat().st_size)))
    assert seen == [(0, 0), (1, 0), (2, 0)]
    assert written.stat().st_size == TOKENS * 128 * 4
    assert not list(tmp_path.glob("*slice*"))  # nothing of ours stays beside the weights
