"""The written file is what is judged: its bytes, decoded here by another decoder, and what ONNX Runtime makes of them.

Levels of evidence, for every family and recipe:
1. sizes: every part and the total as planned;
2. weights: each MatMulNBits and GatherBlockQuantized, decoded from the file, equals what the quantizer computed;
3. kernels: ONNX Runtime's product with unit vectors, where int8 activations are exact, gives those weights;
4. model: logits equal a float model of those weights, up to int8 activations.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from pipeline.artifact import write
from pipeline.artifact.graph import QuantizedGraph, channel_names
from pipeline.artifact.work import Range, Unit, quantize_unit, units
from pipeline.artifact.write import Draft, PartWriter
from pipeline.checkpoint.architecture import Matrix, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import RecipeConfig
from pipeline.engine import units as engine_units
from pipeline.errors import CheckpointError, GraphError, PlanError, ResourceError
from pipeline.planning.recipes import PlannedMatrix, make_plan
from pipeline.quantize.formats import Quantized
from pipeline.quantize.search import nearest, weighted
from pipeline.quantize.split import channel_importance, split_channels
from pipeline.runtime.session import OnnxDecoder
from tests.artifact.exported import PART_BYTES, Exported, changed, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

DENSE = [name for name, case in CASES.items() if "num_local_experts" not in case.config]  # tests.artifact.test_experts
ROLES = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
RECIPES = {
    "q4": load_recipe("q4"),
    "q4_k_m": load_recipe("q4_k_m"),
    "q3": load_recipe("q3"),
    "nearest": changed("q4", search="nearest"),
}
# Other tables and bodies, so that every format of the vocabulary is written, decoded and run once.
TABLES = {
    "w4 tables": changed("q4", embedding="w4b64a", head="w4b32s", body=[{"roles": ROLES, "format": "w2b32a"}]),
    "w2 tables": changed("q4", embedding="w2b64s", head="w2b32a", body=[{"roles": ROLES, "format": "w4b16s"}]),
    "w8 tables": changed("q4", embedding="w8b128a", head="w8b64a", body=[{"roles": ROLES, "format": "w8b64a"}]),
    "w6 tables": changed("q4", embedding="w6b64a", head="w6b128a", body=[{"roles": ROLES, "format": "w6b64a"}]),
    "w6 split": changed(
        "q4",
        embedding="w6b32a",
        head="w6b32a",
        body=[{"roles": ROLES, "format": {"high": "w6b32a", "low": "w2b64a", "high_fraction": 0.5}}],
    ),
    "w4s": changed("q4", embedding="w4b16s", head="w4b128a", body=[{"roles": ROLES, "format": "w2b64s"}]),
    "short scales": changed(
        "q4",
        embedding="w6b64a8",
        head="w4b32s8",
        body=[{"roles": ROLES, "format": {"high": "w4b64a8", "low": "w2b64s8", "high_fraction": 0.5}}],
    ),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    made = {name: export(make_checkpoint(folder / name, CASES[name])) for name in DENSE}
    made["half"] = export(make_checkpoint(folder / "half", CASES["phi3"], dtype="F16"))
    return made


# --- a second decoder: the operators' documentation, bit by bit -------------------------------------------------------

NUMPY = {
    TensorProto.UINT8: "u1", TensorProto.INT8: "i1", TensorProto.FLOAT16: "<f2", TensorProto.FLOAT: "<f4",
    TensorProto.INT32: "<i4",
}  # fmt: skip


class Written:
    """An artifact read back with nothing of the pipeline's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = onnx.load(folder / "tiny.onnx", load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.cast_of = {node.output[0]: node.input[0] for node in self.nodes("Cast")}
        self.larger = {
            node.output[0]: (node.input[0], onnx.numpy_helper.to_array(self.tensors[node.input[1]]))
            for node in self.nodes("Mul")
            if node.input[1] in self.tensors
        }
        products = {node.output[0]: node.input for node in self.nodes("Mul")}
        self.shares = {name: pair for name, pair in products.items() if set(pair) <= self.cast_of.keys()}

    def value(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        place = {item.key: item.value for item in tensor.external_data}
        start, length = int(place["offset"]), int(place["length"])
        raw = (self.folder / place["location"]).read_bytes()[start : start + length]
        return np.frombuffer(raw, NUMPY[tensor.data_type]).reshape(tuple(tensor.dims))

    def nodes(self, op: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type == op]

    def weights(self, node: onnx.NodeProto) -> np.ndarray:
        """The float64 matrix [rows, columns] that a quantized node multiplies by or looks up."""
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        gather = node.op_type == "GatherBlockQuantized"
        data, scales, *zeros = (
            node.input[position] for position in ((0, 2, 3) if gather else (1, 2, 3)) if position < len(node.input)
        )
        bits, block = attributes["bits"], attributes["block_size"]
        scales, unit = self.larger.get(scales, (scales, 1))
        scales, *largest = self.shares.get(scales, [scales])
        scale = self.value(self.cast_of[scales]).astype(np.float64) * unit
        for name in largest:
            scale = scale * self.value(self.cast_of[name])
        rows, blocks = scale.shape
        codes = fields(self.value(data).reshape(rows, -1), bits)[:, : blocks * block].reshape(rows, blocks, block)
        zero = fields(self.value(zeros[0]), bits)[:, :blocks, None] if zeros else 1 << (bits - 1)
        return ((codes - zero) * scale[..., None]).reshape(rows, -1)


def fields(data: np.ndarray, bits: int) -> np.ndarray:
    """Consecutive `bits`-wide little-endian numbers of each row of bytes, one bit at a time."""
    bit = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits)
    return (bit.astype(np.int64) << np.arange(bits)).sum(axis=2)


# --- what the quantizer computed --------------------------------------------------------------------------------------


def orders(exported: Exported, drafted: Draft) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(high, low) channels of each split input, from whole matrices."""
    groups: dict[str, list[Matrix]] = {}
    sizes: dict[str, int] = {}
    for planned in drafted.plan.body:
        if planned.split:
            groups.setdefault(planned.matrix.input, []).append(planned.matrix)
            sizes[planned.matrix.input] = planned.pieces[0].columns
    found = {}
    for name, group in groups.items():
        norms = [(exported.checkpoint.rows(matrix.name).astype(np.float64) ** 2).sum(axis=0) for matrix in group]
        found[name] = split_channels(channel_importance(exported.moments[name], norms), sizes[name])
    return found


def computed(
    exported: Exported, planned: PlannedMatrix, recipe: RecipeConfig, order: tuple[np.ndarray, ...]
) -> list[np.ndarray]:
    """What the quantizer says of each piece of a whole matrix."""
    matrix = planned.matrix
    weights = exported.checkpoint.rows(matrix.name)
    moments = exported.moments.get(matrix.input, np.ones(matrix.columns, np.float32))
    pieces = []
    for piece, columns in zip(planned.pieces, order or (slice(None),), strict=True):
        part = np.ascontiguousarray(weights[:, columns])
        found = (
            nearest(part, piece.format)
            if recipe.search == "nearest"
            else weighted(part, moments[columns], piece.format)
        )
        pieces.append(found.dequantize())
    return pieces


def check_weights(exported: Exported, drafted: Draft, recipe: RecipeConfig, written: Written) -> dict[str, np.ndarray]:
    """Compare every quantized node with the quantizer; return the stored matrices by checkpoint name."""
    channels = orders(exported, drafted)
    nodes = {node.output[0]: node for node in written.nodes("MatMulNBits")}
    stored: dict[str, np.ndarray] = {}
    for planned in (*drafted.plan.body, drafted.plan.head):
        matrix = planned.matrix
        head = "logits/product" if matrix.bias else "logits"
        output = head if matrix.role == "head" else f"layers.{matrix.layer}.{matrix.role}"
        outputs = [f"{output}.high", f"{output}.low"] if planned.split else [output]
        order = channels.get(matrix.input, ()) if planned.split else ()
        whole = np.zeros((matrix.rows, matrix.columns))
        expected = computed(exported, planned, recipe, order)
        for name, piece, columns in zip(outputs, expected, order or (slice(None),), strict=True):
            planes = [name] if name in nodes else [f"{name}.bits4", f"{name}.bits2"]
            got = sum(written.weights(nodes.pop(plane)) for plane in planes)
            np.testing.assert_array_equal(got, piece)
            whole[:, columns] = got
        for name, indices in zip(channel_names(planned), order, strict=False):
            np.testing.assert_array_equal(written.value(name), indices)
        stored[matrix.name] = whole
    assert not nodes
    table = sum(written.weights(gather) for gather in written.nodes("GatherBlockQuantized"))
    np.testing.assert_array_equal(table, computed(exported, drafted.plan.tables[0], recipe, ())[0])
    stored["model.embed_tokens.weight"] = table
    return stored


def check_kernels(written: Written) -> None:
    """ONNX Runtime's own reading of the file, all quantized nodes in one session.

    A unit vector quantizes to int8 without error (127 · 1/127), so a product with the identity is the weights.
    """
    graph = onnx.GraphProto(name="kernels")
    graph.initializer.extend(written.model.graph.initializer)
    graph.node.extend(
        node for node in written.model.graph.node if ".scales/" in node.output[0] or ".largest/" in node.output[0]
    )
    widths = set()
    for node in [*written.nodes("MatMulNBits"), *written.nodes("GatherBlockQuantized")]:
        copy = graph.node.add()
        copy.CopyFrom(node)
        if node.op_type == "MatMulNBits":
            width = next(item.i for item in node.attribute if item.name == "K")
            widths.add(width)
            copy.input[0] = f"eye.{width}"
        graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n"]))
    graph.input.extend(
        helper.make_tensor_value_info(f"eye.{width}", TensorProto.FLOAT, [width, width]) for width in widths
    )
    path = written.folder / "kernels.onnx"
    path.write_bytes(
        onnx.ModelProto(ir_version=10, opset_import=written.model.opset_import, graph=graph).SerializeToString()
    )
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = len(written.weights(written.nodes("GatherBlockQuantized")[0]))
    feeds = {f"eye.{width}": np.eye(width, dtype=np.float32) for width in widths} | {"input_ids": np.arange(rows)}
    results = dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))
    for node in written.nodes("MatMulNBits"):
        want = written.weights(node).T
        np.testing.assert_allclose(results[node.output[0]], want, rtol=0, atol=1e-5 * np.abs(want).max())
    for node in written.nodes("GatherBlockQuantized"):
        np.testing.assert_array_equal(results[node.output[0]], written.weights(node).astype(np.float32))


def check_model(exported: Exported, stored: dict[str, np.ndarray], folder: Path, scratch: Path) -> None:
    """Logits against a float model of the stored weights. int8 activations cost about 1 % here; a wrong wire 100 %."""
    scratch.mkdir()
    shutil.copyfile(exported.folder / "config.json", scratch / "config.json")
    names = exported.architecture.expected_tensors()
    tensors = {name: stored.get(name, exported.checkpoint.rows(name)).astype(np.float32) for name in names}
    save_file(tensors, scratch / "model.safetensors")
    export(scratch)
    ids = np.random.default_rng(3).integers(0, exported.architecture.vocab, 80)  # past LongRoPE's switch at 64
    (got, _), (want, _) = (OnnxDecoder(path).run(ids) for path in (folder / "tiny.onnx", scratch / "model.onnx"))
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.05


def test_a_phone_gets_the_last_tokens_logits_and_validation_all(exports: dict[str, Exported], tmp_path: Path) -> None:
    """The same weights, one node apart: equal to the bit for one token; for many, up to how a kernel rounds one row of
    activations and several."""
    exported = exports["llama-tied"]
    exported.write(load_recipe("q4"), tmp_path)
    path, ids = tmp_path / "tiny.onnx", np.random.default_rng(5).integers(0, exported.architecture.vocab, 24)
    shipped = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count, tolerance in ((1, 0.0), (24, 0.03)):
        feeds = {"input_ids": ids[None, :count], "attention_mask": np.ones((1, count), np.int64)}
        feeds |= {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in shipped.get_inputs()
            if value.name.startswith("past")
        }
        (got,) = shipped.run(["logits"], feeds)
        every, _ = OnnxDecoder(path).run(ids[:count].tolist())
        assert (got.shape, every.shape) == ((1, 1, every.shape[1]), (count, every.shape[1]))
        np.testing.assert_allclose(got[0, 0], every[-1], atol=tolerance * np.abs(every[-1]).max(), rtol=0)


def check_all(exported: Exported, recipe: RecipeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    drafted = exported.write(recipe, folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sizes.pop("tiny.onnx") == drafted.model.ByteSize()
    assert [sizes.pop(f"tiny.data.{number}") for number in range(len(drafted.layout.parts))] == list(
        drafted.layout.parts
    )
    assert not sizes
    assert len(drafted.layout.parts) > 1
    assert max(drafted.layout.parts) <= PART_BYTES
    assert sum(file.stat().st_size for file in folder.iterdir()) == drafted.bytes
    written = Written(folder)
    stored = check_weights(exported, drafted, recipe, written)
    check_kernels(written)
    check_model(exported, stored, folder, tmp_path / "float")


@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("case", [*DENSE, "half"])
def test_written_weights_are_the_quantizers(
    case: str, variant: str, exports: dict[str, Exported], tmp_path: Path
) -> None:
    check_all(exports[case], RECIPES[variant], tmp_path)


# SHA-256 of all files of the tiny tied model, the first 16 digits, with even moments: no library decides a sum there.
PINNED = {
    "q4": "82aa81f5bf0b4dee",
    "q4_k_m": "f470148b0a726ab8",
    "q3": "baa20fb47e05209c",
    "nearest": "82d587fb9aadd996",
    "w4 tables": "7d98a2313dd78716",
    "w2 tables": "d6985e4314be8837",
    "w8 tables": "ca3582f739d9e4e7",
    "w6 tables": "4828be34cb160c36",
    "w6 split": "8d840cad8f3fc18b",
    "w4s": "3afd337d9930ba75",
}


@pytest.mark.parametrize("name", PINNED)
def test_bytes_change_on_purpose_only(name: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    """What was released can be made again. A change of these digests is one of every artifact: say why."""
    even = {key: np.ones_like(moments) for key, moments in exports["llama-tied"].moments.items()}
    replace(exports["llama-tied"], moments=even).write({**RECIPES, **TABLES}[name], tmp_path / "artifact")
    files = sorted((tmp_path / "artifact").iterdir())
    assert hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] == PINNED[name]


@pytest.mark.parametrize("recipe", TABLES)
@pytest.mark.parametrize("case", ["llama-tied", "phi3"])
def test_every_format_of_table_and_body(case: str, recipe: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    check_all(exports[case], TABLES[recipe], tmp_path)


@pytest.mark.parametrize("variant", ["q4_k_m", "q3"])
def test_threads_and_units_of_rows_give_the_same_bytes(
    variant: str, exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, recipe = exports["qwen2"], RECIPES[variant]
    exported.write(recipe, tmp_path / "whole", threads=1)
    monkeypatch.setattr(write, "units", partial(units, unit_bytes=37 * 4 * 128))  # 37 rows of 128 channels, 14 of 320
    for threads in (1, 2, 5, 5, None):
        exported.write(recipe, tmp_path / "units", threads)
        for file in (tmp_path / "whole").iterdir():
            assert file.read_bytes() == (tmp_path / "units" / file.name).read_bytes()


@pytest.mark.parametrize("case", ["llama-tied", "phi3-partial-tied"])
def test_a_tied_table_is_stored_once(case: str, exports: dict[str, Exported]) -> None:
    drafted = exports[case].draft(RECIPES["q4"])
    assert [name for name in drafted.layout.places if name.endswith("embed_tokens.codes")] == [
        "model.embed_tokens.codes"
    ]
    assert not any("lm_head" in name for name in drafted.layout.places)
    places = [
        tuple(item.value for item in tensor.external_data)
        for tensor in drafted.model.graph.initializer
        if tensor.name.startswith("model.embed_tokens.codes")
    ]
    assert len(places) == 2  # the same bytes under the shapes of the look-up and of the product
    assert len(set(places)) == 1


def test_order_follows_execution_and_never_changes(exports: dict[str, Exported]) -> None:
    exported = exports["mimo"]
    first, again = exported.draft(RECIPES["q4"]), exported.draft(RECIPES["q4"])
    assert first.model.SerializeToString(deterministic=True) == again.model.SerializeToString(deterministic=True)
    names = list(first.layout.places)
    assert names[0] == "model.embed_tokens.codes"
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert [name for name in names if name.startswith("lm_head")] == names[-2:]
    assert names == list(exported.draft(RECIPES["nearest"]).layout.places)


@pytest.mark.parametrize("case", ["qwen2", "phi3-longrope"])
def test_what_is_not_quantized_is_copied_exactly(case: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    exported = exports[case]
    drafted = exported.write(RECIPES["q4"], tmp_path / "artifact")
    written = Written(tmp_path / "artifact")
    kept = [name for name in drafted.layout.places if name in exported.checkpoint]
    assert len(kept) == sum(len(shape) == 1 for shape in exported.architecture.expected_tensors().values())
    for name in kept:
        np.testing.assert_array_equal(written.value(name), exported.checkpoint.rows(name))
    source = {tensor.name: tensor for tensor in exported.model.graph.initializer}
    rope = [name for name in drafted.layout.places if name.endswith(("cos_cache", "sin_cache"))]
    assert len(rope) == (4 if case == "phi3-longrope" else 2)
    for name in rope:
        place = {item.key: item.value for item in source[name].external_data}
        data = (exported.folder / place["location"]).read_bytes()
        start = int(place["offset"])
        assert written.value(name).tobytes() == data[start : start + int(place["length"])]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(error: type[Exception], exported: Exported, recipe: RecipeConfig, folder: Path) -> str:
    """The message; there is no artifact, and no graph that would make the unfinished one look like one."""
    with pytest.raises(error) as caught:
        exported.write(recipe, folder)
    assert not folder.exists()
    assert not (folder.parent / "partial" / folder.name / "tiny.onnx").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def damaged(tmp_path: Path, name: str, value: float) -> Exported:
    folder = make_checkpoint(tmp_path / "damaged", CASES["llama-untied"])
    before = Checkpoint(folder)
    tensors = {key: before.rows(key) for key in before}
    tensors[name].reshape(-1)[130] = value
    save_file(tensors, folder / "model.safetensors")
    return export(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(name: str, value: float, tmp_path: Path) -> None:
    message = refusal(CheckpointError, damaged(tmp_path, name, value), RECIPES["q3"], tmp_path / "artifact")
    assert repr(name) in message
    assert "model.safetensors" in message
    assert "1 of" in message


@pytest.mark.parametrize("variant", RECIPES)
def test_weights_too_large_for_float16_scales(variant: str, tmp_path: Path) -> None:
    exported = damaged(tmp_path, "model.layers.1.mlp.up_proj.weight", 3e38)
    message = refusal(CheckpointError, exported, RECIPES[variant], tmp_path / "artifact")
    assert "'model.layers.1.mlp.up_proj.weight'" in message
    assert "3e+38" in message


@pytest.mark.parametrize(
    ("moments", "part"),
    [
        (None, "there are none"),
        (np.ones(64, np.float32), "[64]"),
        (np.full(128, np.nan, np.float32), "channel 0 has nan"),
        (np.arange(3, -125, -1, dtype=np.float32), "channel 4 has -1.0"),
    ],
)
def test_moments_must_fit(moments: np.ndarray | None, part: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    exported = exports["llama-tied"]
    wrong = {name: value for name, value in exported.moments.items() if name != "layers.1.mlp"}
    wrong |= {} if moments is None else {"layers.1.mlp": moments}
    changed_export = Exported(exported.folder, exported.architecture, exported.checkpoint, exported.model, wrong)
    message = refusal(PlanError, changed_export, RECIPES["q4"], tmp_path / "artifact")
    assert "'model.layers.1.mlp.gate_proj.weight'" in message
    assert "'layers.1.mlp'" in message
    assert part in message


def test_a_split_needs_moments(exports: dict[str, Exported], tmp_path: Path) -> None:
    message = refusal(PlanError, exports["phi3"], changed("q3", search="nearest"), tmp_path / "artifact")
    assert "search: weighted" in message


def test_a_plan_for_another_model(exports: dict[str, Exported], tmp_path: Path) -> None:
    plan = make_plan(exports["phi3"].architecture, RECIPES["q4"])
    with pytest.raises(
        GraphError, match=r"'model.layers.0.self_attn.q_proj.weight': \[128, 128\] in the graph, absent"
    ):
        QuantizedGraph(exports["llama-untied"].model, plan)
    case = CASES["llama-untied"]
    wide = make_checkpoint(tmp_path, replace(case, config=case.config | {"intermediate_size": 384}))
    plan = make_plan(read_architecture(wide / "config.json"), RECIPES["q4"])
    with pytest.raises(GraphError, match=r"gate_proj.weight': \[320, 128\] in the graph, \[384, 128\] in the plan"):
        QuantizedGraph(exports["llama-untied"].model, plan)


def test_the_disk_fills_up_while_writing(
    exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(fd)
        if len(calls) > 200:  # several units are whole by then
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[: len(data) // 2 + 1], offset)  # short writes are completed

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(
        engine_units, "cores", lambda: 1
    )  # units are recorded in order: a slow thread would hold them back
    message = refusal(ResourceError, exports["llama-tied"], RECIPES["q4"], tmp_path / "artifact")
    assert "the disk filled up while trying to write tiny.onnx: No space left" in message
    assert "what was finished before is reused" in message
    calls.clear()
    monkeypatch.setattr(os, "pwrite", real)
    redone: list[str] = []

    def spy(unit: Unit, *rest: Any) -> list[Quantized]:
        redone.append(unit.name)
        return quantize_unit(unit, *rest)

    monkeypatch.setattr(write, "quantize_unit", spy)
    drafted = exports["llama-tied"].write(RECIPES["q4"], tmp_path / "artifact")
    assert 0 < len(redone) < len(drafted.plan.tables)
    exports["llama-tied"].write(RECIPES["q4"], tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "artifact" / file.name).read_bytes()


def test_a_write_that_fails_late_is_not_lost(
    exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up when the system writes its cache back. It says so once: to a flush while work goes on."""
    real, calls = os.fsync, []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(write, "_FLUSH_BYTES", 0)
    monkeypatch.setattr(os, "fsync", fsync)
    message = refusal(ResourceError, exports["llama-tied"], RECIPES["q4"], tmp_path / "artifact")
    assert "No space left" in message
    assert len(calls) > 1


def test_the_system_refuses_larger_files(exports: dict[str, Exported], tmp_path: Path) -> None:
    """A real refusal by the kernel: files of this process may not grow past 50,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        message = refusal(ResourceError, exports["llama-tied"], RECIPES["q4"], tmp_path / "artifact")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in message


def test_an_old_artifact_survives_a_failed_one(
    exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports["llama-tied"].write(RECIPES["q4"], tmp_path / "artifact")
    before = {file.name: file.read_bytes() for file in (tmp_path / "artifact").iterdir()}
    monkeypatch.setattr(write, "_write_copies", lambda *_: None)
    with pytest.raises(
        PlanError, match=r"are not fully written, the first is 'model.layers.0.input_layernorm\.weight'"
    ):
        exports["llama-tied"].write(RECIPES["q4_k_m"], tmp_path / "artifact")
    assert {file.name: file.read_bytes() for file in (tmp_path / "artifact").iterdir()} == before


def test_bytes_outside_their_place_are_refused(
    exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantizer that disagrees with the plan stops; it does not overwrite the neighbour."""

    def longer(unit: Unit, *rest: Any) -> list[Quantized]:
        return [replace(item, codes=np.pad(item.codes, ((0, 0), (0, 1)))) for item in quantize_unit(unit, *rest)]

    monkeypatch.setattr(write, "quantize_unit", longer)
    message = refusal(PlanError, exports["llama-tied"], RECIPES["q4"], tmp_path / "artifact")
    assert "'model.embed_tokens.codes': 41,280 bytes computed, 40,960 planned" in message
    drafted = exports["llama-tied"].draft(RECIPES["q4"])
    with ExitStack() as stack:
        writer = PartWriter(tmp_path, drafted, stack)
        with pytest.raises(PlanError, match=r"'model.embed_tokens.codes': 40,961 bytes to write, 40,960 planned"):
            writer.put(Range("model.embed_tokens.codes", 40_000, 961), np.zeros(961, np.uint8))
