"""What a token reads is what the plan stores of body and head; a rate that memory cannot feed is an error."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from onnx import TensorProto, helper

from pipeline.errors import EvaluationError
from pipeline.planning.recipes import Plan
from pipeline.runtime.roofline import TOLERANCE, Traffic, require_possible, traffic
from tests.artifact.exported import Exported, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(make_checkpoint(folder / name, case)) for name, case in CASES.items()}


def matrix_bytes(plan: Plan) -> int:
    """Body and head whole, two of six experts; of an embedding of its own one row of codes, scales and zero points."""
    row = 0 if plan.tied else plan.embedding.bytes // plan.embedding.matrix.rows
    dense = sum(item.bytes for item in plan.body if item.matrix.expert is None)
    experts = sum(item.bytes for item in plan.body if item.matrix.expert is not None)
    return dense + experts // 3 + plan.head.bytes + row


def other_bytes(exported: Exported, plan: Plan) -> int:
    """Norms and biases, a rotated head's gain, the channel orders of split inputs, scales of an int8 cache: read whole.
    Of rotary tables, cosines and sines of one position (and LongRoPE has two)."""
    model = exported.architecture
    expected = model.expected_tensors()
    routers = [model.router(layer) for layer in range(model.layers * bool(model.experts))]
    vectors = 4 * sum(prod(shape) for name, shape in expected.items() if len(shape) == 1 or name in routers)
    orders = 4 * sum({item.matrix.input: item.matrix.columns for item in plan.body if item.split}.values())
    gain = 4 * model.hidden if plan.tied and plan.rotation.residual else 0
    scales = 4 * len(plan.cache.names) * plan.cache.channels if plan.cache.type == "int8" else 0
    return vectors + orders + gain + scales + 4 * model.rope.dims * (2 if model.rope.long_factor else 1)


RECIPES = ["q4", "q4_k_m", "q3", "q4_kv8", "q4_rotated"]
MIXTURES = [
    name for name, case in CASES.items() if "num_local_experts" in case.config
]  # neither split nor turned whole


@pytest.mark.parametrize(
    ("name", "recipe"), [(n, r) for n in CASES for r in (RECIPES[:2] + RECIPES[3:4] if n in MIXTURES else RECIPES)]
)
def test_a_token_reads_what_the_plan_says(name: str, recipe: str, exports: dict[str, Exported]) -> None:
    drafted = exports[name].draft(load_recipe(recipe))
    reads, plan = traffic(drafted.model), drafted.plan
    inline = sum(len(tensor.raw_data) for tensor in drafted.model.graph.initializer)
    assert reads.weight_bytes - inline == matrix_bytes(plan) + other_bytes(exports[name], plan)
    assert reads.cache_bytes == plan.cache.bytes
    assert reads.per_token(100.5) == reads.weight_bytes + 100.5 * plan.cache.bytes


def test_the_full_precision_graph_reads_every_weight_but_the_embedding(exports: dict[str, Exported]) -> None:
    exported = exports["llama-untied"]
    model = exported.architecture
    reads = traffic(exported.model)
    inline = sum(len(tensor.raw_data) for tensor in exported.model.graph.initializer)
    table = 4 * model.vocab * model.hidden
    row = 4 * (model.hidden + model.rope.dims)
    assert reads.weight_bytes - inline == 4 * model.parameters - table + row


def test_of_a_table_that_is_only_looked_up_one_row_is_read() -> None:
    def stored(name: str, kind: int, *dims: int) -> TensorProto:
        tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        size = int(np.prod(dims)) * helper.tensor_dtype_to_np_dtype(kind).itemsize
        for key, value in (("location", "data"), ("offset", str(1000 * len(tensors))), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
        return tensor

    tensors: list[TensorProto] = []
    stored("table", TensorProto.UINT8, 50, 16)  # a row of 16 bytes
    stored("scales", TensorProto.FLOAT16, 50, 2)  # a row of 4, behind a Cast
    stored("weight", TensorProto.FLOAT, 4, 5)  # 80
    stored("channels", TensorProto.INT64, 3)  # 24: indices are read whole
    stored("branch", TensorProto.FLOAT, 10, 2)  # a row of 8: only a branch names it
    nodes = [
        helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("GatherBlockQuantized", ["table", "ids", "wide"], ["x"], domain="com.microsoft"),
        helper.make_node("Gather", ["x", "channels"], ["chosen"]),
        helper.make_node("MatMul", ["chosen", "weight"], ["y"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    assert traffic(model) == Traffic(16 + 4 + 80 + 24 + 8, 800 + 200 + 80, 0)


@pytest.mark.parametrize(("rate", "possible"), [(0.6, True), (1.0, True), (1.09, True), (1.11, False), (40.0, False)])
def test_a_rate_above_the_roofline_is_an_error(rate: float, possible: bool) -> None:
    assert 1.09 < TOLERANCE < 1.11
    ceiling = 5e10 / Traffic(weight_bytes=900, table_bytes=10**9, cache_bytes=2).per_token(50)  # 1,000 bytes
    assert ceiling == 5e7
    if possible:
        require_possible(rate * ceiling, ceiling, "tiny q4")
    else:
        with pytest.raises(EvaluationError, match=r"tiny q4: .* tokens/s is above the roofline of 50,000,000\.00"):
            require_possible(rate * ceiling, ceiling, "tiny q4")
