"""A rotated model computes what the model did: the written graph with its products in full precision, before any
rounding, against the export.

And statistics of its inputs are those that its inputs have.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from pipeline.artifact.graph import channel_names
from pipeline.artifact.quantizers import arranged
from pipeline.artifact.write import Draft
from pipeline.calibrate.correlations import packed, unpacked
from pipeline.config.recipes import RecipeConfig
from pipeline.errors import PlanError
from pipeline.graph.experts import mix_experts
from pipeline.graph.nodes import MICROSOFT, GraphWriter
from pipeline.graph.slices import DecoderSlices
from pipeline.quantize.cache import ROTATED
from pipeline.quantize.rotation import rotate
from pipeline.runtime.session import OnnxDecoder
from pipeline.runtime.stream import LayerStream
from tests.artifact.exported import Exported, changed, contents, export
from tests.artifact.test_experts import ROLES as EXPERTS
from tests.artifact.test_write import ROLES
from tests.families import CASES, make_checkpoint

ALL = {"residual": "all", "values": True, "down": 64}
SPLIT = {"high": "w8b16s", "low": "w2b32a", "high_fraction": 0.4}
RUNS = {"residual": 32, "values": True}
INPUTS = {"attention": 32, "output": 64, "mlp": 128, "down": 32}
PARTS = (INPUTS, {"residual": "all"}, {"values": True}, {"down": 32}, RUNS, ALL)
FAMILIES = ("llama-tied", "llama-biased", "qwen3", "mimo", "phi3", "phi3-partial-tied")


def recipe(rotation: dict[str, object], body: object = "w8b32a") -> RecipeConfig:
    """One plane everywhere, so that a product is one node."""
    rules = [{"roles": ROLES, "format": body}, {"roles": EXPERTS, "format": "w8b32a"}]
    return changed("q4", embedding="w8b32a", head="w8b32a", body=rules, rotation=rotation, kv_cache="float32")


def rotated(folder: Path, rotation: dict[str, object], case: str) -> Exported:
    """A case's export, read in rotated coordinates. One gain is 0, one tiny, as in trained models."""
    made = make_checkpoint(folder / "model", CASES[case])
    tensors = load_file(made / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][[3, 7]] = 0, 1e-4
    save_file(tensors, made / "model.safetensors")
    return export(made).rotated(recipe(rotation))


def in_full_precision(found: Exported, drafted: Draft, folder: Path) -> Path:
    """The written graph with every quantized product and look-up over the weights that were to be quantized."""
    model = onnx.load(folder / "tiny.onnx", load_external_data=False)
    planned = {item.matrix.name.removesuffix(".weight"): item for item in drafted.plan.tables}
    for node in [node for node in model.graph.node if node.op_type == "QMoE"]:
        _experts_in_full_precision(found, drafted, model.graph, node)
    for node in model.graph.node:
        if node.op_type not in {"MatMulNBits", "GatherBlockQuantized"}:
            continue
        looked_up = node.op_type == "GatherBlockQuantized"
        prefix = node.input[0 if looked_up else 1].partition(".codes")[0]
        name = prefix.removesuffix(".high").removesuffix(".low")
        item = planned[name]
        weights = found.checkpoint.rows(item.matrix.name)
        if item.split:
            weights = weights[:, stored(model, folder, channel_names(item)[prefix.endswith(".low")])]
        weights = arranged(weights, None, item.rotated)
        values = numpy_helper.from_array(weights if looked_up else np.ascontiguousarray(weights.T), f"{node.name}/full")
        model.graph.initializer.append(values)
        inputs = [values.name, node.input[1]] if looked_up else [node.input[0], values.name]
        output = node.output[0]
        node.CopyFrom(onnx.helper.make_node("Gather" if looked_up else "MatMul", inputs, [output], name=node.name))
    onnx.save(model, folder / "full.onnx")
    return folder / "full.onnx"


def _experts_in_full_precision(found: Exported, drafted: Draft, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """A layer's experts over the weights that were to be quantized, in place of the operator over those that were."""
    layer, writer = int(node.name.split(".")[1]), GraphWriter()
    own = {(item.matrix.expert, item.matrix.role): item for item in drafted.plan.body if item.matrix.layer == layer}

    def product(x: str, expert: int, role: str) -> str:
        item = own[expert, role]
        weights = arranged(found.checkpoint.rows(item.matrix.name), None, item.rotated)
        return writer.node("MatMul", [x, writer.constant(item.matrix.name, weights.T)], f"{item.matrix.name}/product")

    def run(rows: str, expert: int) -> str:
        gate, up = (product(rows, expert, role) for role in ("expert_gate", "expert_up"))
        silu = writer.node("QuickGelu", [gate], f"{gate}/silu", MICROSOFT, alpha=1.0)
        return product(writer.node("Mul", [silu, up], f"{gate}/gated"), expert, "expert_down")

    mix_experts(
        writer, node.input[0], node.input[1], found.architecture.hidden, found.architecture.experts, node.name, run
    )
    place = list(graph.node).index(node)
    nodes = [*graph.node[:place], *writer.nodes.values(), *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    names = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for name, tensor in writer.initializers.items() if name not in names)


def stored(model: onnx.ModelProto, folder: Path, name: str) -> np.ndarray:
    tensor = next(item for item in model.graph.initializer if item.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    return np.fromfile(folder / place["location"], "<i4", tensor.dims[0], offset=int(place["offset"]))


def difference(found: Exported, drafted: Draft, folder: Path) -> float:
    """The largest of any logit, in parts of the largest logit."""
    ids = np.random.default_rng(3).integers(0, found.architecture.vocab, 40).tolist()
    want, _ = OnnxDecoder(found.folder / "model.onnx").run(ids)
    got, _ = OnnxDecoder(in_full_precision(found, drafted, folder)).run(ids)
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("rotation", PARTS, ids=str)
@pytest.mark.parametrize("case", FAMILIES)
def test_the_function_stays(case: str, rotation: dict[str, object], tmp_path: Path) -> None:
    found = rotated(tmp_path, rotation, case)
    drafted = found.write(recipe(rotation), tmp_path / "artifact")
    assert sum(file.stat().st_size for file in (tmp_path / "artifact").iterdir()) == drafted.bytes
    assert difference(found, drafted, tmp_path / "artifact") < 1e-4


@pytest.mark.parametrize("rotation", [INPUTS, {"values": True}, {"values": True} | INPUTS], ids=str)
def test_the_function_stays_under_layer_norms_and_with_experts(rotation: dict[str, object], tmp_path: Path) -> None:
    found = rotated(tmp_path, rotation, "phimoe")
    drafted = found.write(recipe(rotation), tmp_path / "artifact")
    assert difference(found, drafted, tmp_path / "artifact") < 1e-4


@pytest.mark.parametrize("rotation", [ALL, RUNS], ids=str)
def test_no_rotation_of_the_residual_passes_a_layer_norm(rotation: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"subtracts the mean.*Leave out `residual`"):
        rotated(tmp_path, rotation, "phimoe")


def test_the_function_stays_where_matrices_are_split(tmp_path: Path) -> None:
    turned = ALL | INPUTS
    found = rotated(tmp_path, turned, "phi3")
    drafted = found.write(recipe(turned, SPLIT), tmp_path / "artifact")
    assert {item.rotated for item in drafted.plan.body} == {32, 64}
    assert difference(found, drafted, tmp_path / "artifact") < 1e-4


def test_weights_are_rotated_at_all(tmp_path: Path) -> None:
    """Every matrix of an untied model is another one, and every norm's gain is 1."""
    found = rotated(tmp_path, {"residual": "all", "values": True}, "mimo")
    plain = export(found.folder).checkpoint
    for name in found.architecture.expected_tensors():
        values, before = found.checkpoint.rows(name), plain.rows(name)
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            np.testing.assert_array_equal(values, before)
        else:
            assert np.abs(values - before).max() > 0.1 * np.abs(before).max(), name


@pytest.mark.parametrize("rotation", [ALL, RUNS], ids=str)
@pytest.mark.parametrize("case", ["mimo", "phi3"])
def test_rows_do_not_depend_on_how_they_are_asked_for(case: str, rotation: dict[str, object], tmp_path: Path) -> None:
    found = rotated(tmp_path, rotation, case)
    for matrix in (*found.architecture.tables, *found.architecture.body(1)):
        whole = found.checkpoint.rows(matrix.name)
        bounds = sorted({0, 1, 45, 61, matrix.rows})
        parts = [found.checkpoint.rows(matrix.name, *pair) for pair in pairwise(bounds)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path) -> None:
    found, wanted = rotated(tmp_path, ALL, "mimo"), recipe(ALL)
    for threads in (1, 3):
        found.write(wanted, tmp_path / f"by-{threads}", threads)
    assert contents(tmp_path / "by-1") == contents(tmp_path / "by-3")


@pytest.mark.parametrize("case", ["mimo", "phi3-partial-tied"])
def test_statistics_are_those_of_the_rotated_inputs(case: str, tmp_path: Path) -> None:
    """Measured on the model as it is, turned, against measured on the rotated model."""
    found = rotated(tmp_path, {"residual": "all", "values": True}, case)
    measured, products = passed(found, tmp_path / "plain")
    tensors = {name: found.checkpoint.rows(name) for name in found.architecture.expected_tensors()}
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / "config.json").write_bytes((found.folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "turned" / "model.safetensors")
    if not found.architecture.tied:
        expected, others = passed(export(tmp_path / "turned"), tmp_path / "states")
        for name, values in products.items():
            got, want = found.checkpoint.products(name, values), others[name]
            dead = 2 if name == "layers.1.attention" else 0  # a gain of 0 hides a channel
            np.testing.assert_allclose(got.trace(), want.trace(), rtol=0.05 if dead else 2e-3)
            if not dead:
                np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())
        ranges = found.checkpoint.ranges(measured)
        for name, values in ranges.items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-4)
    assert {f"layers.{layer}.value{ROTATED}" for layer in range(3)} <= measured.keys()


def passed(found: Exported, states: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ranges and E[x·xᵀ] of all layers over some tokens, as `calibrate` keeps them."""
    states.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    windows = [rng.integers(0, found.architecture.vocab, 64) for _ in range(6)]
    stream = LayerStream(DecoderSlices(found.model, found.architecture, cache=True), found.folder, windows, states)
    ranges, products = dict[str, np.ndarray](), dict[str, np.ndarray]()
    while stream.layer < found.architecture.layers:
        layer = stream.advance()
        ranges |= layer.ranges
        for name, values in layer.products.items():
            moments = np.ascontiguousarray(values.diagonal())
            products[name] = unpacked(packed(values), moments) / np.float32(64 * 6)
    return ranges, products


def test_rotations_are_plain_nodes(tmp_path: Path) -> None:
    """What a phone's runtime and every reader of the graph knows; a table stored once stays one."""
    found = rotated(tmp_path, ALL, "llama-tied")
    drafted = found.write(recipe(ALL), tmp_path / "artifact")
    before = found.draft(recipe({}))
    added = {node.op_type for node in drafted.model.graph.node} - {node.op_type for node in before.model.graph.node}
    assert added <= {"MatMul", "Reshape", "Mul"}
    assert len(drafted.layout.places) == len(before.layout.places) + 1
    ort.InferenceSession(tmp_path / "artifact" / "tiny.onnx", providers=["CPUExecutionProvider"])


def test_a_loud_channel_is_spread(tmp_path: Path) -> None:
    """What rotation is for."""
    found = rotated(tmp_path, {"residual": "all"}, "llama-untied")
    plain = np.ones(128, np.float32)
    plain[17] = 1000
    turned = found.checkpoint.moments({"head": plain})["head"]
    assert turned.max() < 1.5 * turned.min()
    assert rotate(np.eye(128, dtype=np.float32), 128).shape == (128, 128)
