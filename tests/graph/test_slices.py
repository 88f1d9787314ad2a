"""Slices of decoder graphs: chained, they compute what the whole graph computes; alone, each holds its layer only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from pipeline.checkpoint.architecture import bias_of
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import GraphError
from pipeline.graph.slices import DecoderSlices, Slice, product_inputs
from tests.activations import make_decoder, run, run_whole
from tests.families import CASES, transformers_model

WEIGHTS = ("model.", "lm_head")


def run_slice(
    folder: Path, part: Slice, value: np.ndarray, weights: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """A slice's outputs, [1, tokens, …] by name, for its hidden states or the token ids, and open weights."""
    (folder / "slice.onnx").write_bytes(part.model.SerializeToString())
    session = ort.InferenceSession(folder / "slice.onnx", providers=["CPUExecutionProvider"])
    values = run(session, {part.source or "input_ids": value, **(weights or {})})
    return dict(zip((output.name for output in session.get_outputs()), values, strict=True))


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    """Equal up to float32 rounding, relative to the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("tokens", [40, 80])  # on both sides of LongRoPE's switch at 64
@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16")])
def test_chained_slices_are_the_whole_graph(name: str, dtype: str, tokens: int, tmp_path: Path) -> None:
    model, architecture = make_decoder(tmp_path, name, dtype)
    slices = DecoderSlices(model, architecture)
    ids = np.random.default_rng(1).integers(3, 320, tokens)
    parts = [*map(slices.layer, range(architecture.layers + 1))]
    taps = {key: value for part in parts for key, value in part.taps.items()}
    want = run_whole(tmp_path, model, dict.fromkeys(["logits", *taps.values()]), ids)

    first = slices.embedding()
    hidden, target = run_slice(tmp_path, first, ids[None])[first.target], first.target
    got: dict[str, np.ndarray] = {}
    for part in parts:
        assert part.source == target
        values = run_slice(tmp_path, part, hidden)
        got |= {key: values[value][0] for key, value in part.taps.items()}
        if target := part.target:
            hidden = values[target]
    assert list(got) == list(dict.fromkeys(matrix.input for matrix in architecture.matrices))
    for key, value in got.items():
        assert_close(value, want[taps[key]])
    head, checkpoint = architecture.head, Checkpoint(tmp_path)
    assert_close(got["head"] @ checkpoint.rows(head.name).T + bias_of(head, checkpoint), want["logits"])


@pytest.mark.parametrize("name", CASES)
def test_a_slice_holds_its_own_weights_only(name: str, tmp_path: Path) -> None:
    model, architecture = make_decoder(tmp_path, name)
    before = model.SerializeToString(deterministic=True)
    slices = DecoderSlices(model, architecture)

    def weights(part: Slice) -> set[str]:
        return {tensor.name for tensor in part.model.graph.initializer if tensor.name.startswith(WEIGHTS)}

    expected = set(architecture.expected_tensors())
    assert weights(slices.embedding()) == {"model.embed_tokens.weight"}
    assert weights(slices.layer(architecture.layers)) == set(architecture.norm("model.norm"))
    for layer in range(architecture.layers):
        prefix = f"model.layers.{layer}."
        assert weights(slices.layer(layer)) == {tensor for tensor in expected if tensor.startswith(prefix)}
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "F32") for name in CASES), *((name, dtype) for name in ("qwen2", "phi3") for dtype in ("F16", "BF16"))],
)
def test_an_open_layer_with_its_own_weights_is_the_layer(name: str, dtype: str, tmp_path: Path) -> None:
    """Whatever the checkpoint's type; with one matrix replaced it is another function, and holds no matrix itself."""
    model, architecture = make_decoder(tmp_path, name, dtype)
    slices, checkpoint = DecoderSlices(model, architecture), Checkpoint(tmp_path)
    hidden = np.random.default_rng(2).standard_normal((1, 80, architecture.hidden)).astype(np.float32)
    for layer in (0, 2):
        closed, opened = slices.layer(layer), slices.open_layer(layer)
        weights = {matrix.name: checkpoint.rows(matrix.name) for matrix in architecture.body(layer)}
        assert opened.target is not None
        assert (opened.source, opened.target) == (closed.source, closed.target)
        assert {value.name for value in opened.model.graph.input} >= weights.keys()
        assert not weights.keys() & {tensor.name for tensor in opened.model.graph.initializer}
        want = run_slice(tmp_path, closed, hidden)[opened.target]
        assert_close(run_slice(tmp_path, opened, hidden, weights)[opened.target], want)
        if layer == 0:
            for matrix in architecture.body(layer):
                other = weights | {matrix.name: 0 * weights[matrix.name]}
                got = run_slice(tmp_path, opened, hidden, other)[opened.target]
                assert np.abs(got - want).max() > 1e-2


def test_after_the_last_layer_nothing_is_multiplied(tmp_path: Path) -> None:
    """The head's product, a model's largest, is left out; so is everything that another layer needs."""
    slices = DecoderSlices(*make_decoder(tmp_path, "phi3-longrope"), cache=True)
    rest = slices.layer(3)
    assert [node.op_type for node in rest.model.graph.node] == ["SimplifiedLayerNormalization"]
    assert [value.name for value in rest.model.graph.input] == [rest.source] == ["model.norm/sum"]
    assert (rest.target, list(rest.taps), rest.cached) == (None, ["head"], {})


def test_longrope_chooses_its_tables_in_every_layer(tmp_path: Path) -> None:
    slices = DecoderSlices(*make_decoder(tmp_path, "phi3-longrope"))
    for layer in range(3):
        graph = slices.layer(layer).model.graph
        assert sum(node.op_type == "If" for node in graph.node) == 1
        tables = {tensor.name for tensor in graph.initializer if tensor.name.endswith("_cache")}
        assert tables == {f"{kind}_{part}_cache" for kind in ("short", "long") for part in ("cos", "sin")}


def test_a_graph_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, architecture = make_decoder(tmp_path, "qwen2")
    norm = next(node for node in model.graph.node if node.name == "model.layers.1.input_layernorm")
    norm.name = "renamed"
    with pytest.raises(GraphError, match=r"model\.layers\.1\.input_layernorm.*export stage"):
        DecoderSlices(model, architecture)


# --- where products read


@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16")])
def test_inputs_of_every_product(name: str, dtype: str, tmp_path: Path) -> None:
    """transformers' linear layers, hooked, see the same values, family by family."""
    import torch

    model, architecture = make_decoder(tmp_path, name, dtype)
    taps = product_inputs(model, architecture)
    ids = np.random.default_rng(0).integers(3, 320, 24)
    got = run_whole(tmp_path, model, dict.fromkeys(taps.values()), ids)

    want: dict[str, np.ndarray] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: object, inputs: tuple[torch.Tensor], __: object) -> None:
            want[name] = inputs[0].flatten(0, -2).numpy()

        return hook

    reference = transformers_model(tmp_path, CASES[name])
    own = CASES[name].own
    modules = {} if own else dict(reference.named_modules())
    for matrix in () if own else architecture.matrices:
        module = modules["lm_head" if matrix.role == "head" else matrix.name.removesuffix(".weight")]
        module.register_forward_hook(remember(matrix.input))
    with torch.no_grad():
        reference(torch.tensor(ids[None]))
    for matrix in architecture.matrices if own else ():
        want[matrix.input] = reference.seen[matrix.name].flatten(0, -2).numpy()
    idle = taps.keys() - want.keys()  # transformers does not call an expert that no token wakes
    assert want.keys() <= taps.keys() and all(".experts." in key and not got[taps[key]].size for key in idle)
    for key, value in want.items():
        found, wanted = got[taps[key]], value
        if ".experts." in key:  # transformers takes the tokens of which an expert is the first choice first
            found, wanted = (rows[rows[:, 0].argsort()] for rows in (found, value))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(value).max())


def test_in_the_order_of_execution(tmp_path: Path) -> None:
    parts = ("attention", "output", "mlp", "down")
    body = [f"layers.{layer}.{part}" for layer in range(3) for part in parts]
    assert list(product_inputs(*make_decoder(tmp_path, "qwen2"))) == [*body, "head"]
