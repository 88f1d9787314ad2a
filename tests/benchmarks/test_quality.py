"""The comparison of quality: what is counted, interpolated, compared and claimed, on numbers small enough to check."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.quality import ours, simulated
from benchmarks.quality.cache import Cache
from benchmarks.quality.gguf_file import rotary_order, tokenizer_bytes
from benchmarks.quality.measure import Measured, excess, onnx_bytes
from benchmarks.quality.ours import Written, budgets
from benchmarks.quality.peers_onnx import with_plain_products
from benchmarks.quality.subjects import grid_steps
from benchmarks.quality.tables import files, targets
from benchmarks.quality.targets import evaluate, interpolated
from pipeline.quantize.factor import factor

# --- bytes ------------------------------------------------------------------------------------------------------------


def test_onnx_bytes_are_the_graph_and_its_data(tmp_path: Path) -> None:
    sizes = {"model.onnx": 10, "model.onnx.data": 200, "m_q4.data.0": 3000, "m_q4.data.12": 40000}
    other = {"tokenizer.json": 7, "genai_config.json": 7, "plan.json": 7, "chat_template.jinja": 7}
    for name, size in (sizes | other).items():
        (tmp_path / name).write_bytes(bytes(size))
    assert onnx_bytes(tmp_path) == 43210


def test_tokenizer_bytes_by_hand(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "bcd"])
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    key = {name: 8 + len(f"tokenizer.ggml.{name}") + 4 for name in ("model", "tokens", "bos_token_id")}
    model = key["model"] + 8 + 4
    tokens = key["tokens"] + 4 + 8 + (8 + 1) + (8 + 3)
    assert tokenizer_bytes(tmp_path / "tiny.gguf") == model + tokens + key["bos_token_id"] + 4


def test_bits_of_a_real_3_bit_format() -> None:
    assert simulated.bits_per_weight(64) == 3 + (16 + 3) / 64
    assert simulated.bits_per_weight(32) == 3.59375


# --- models -----------------------------------------------------------------------------------------------------------


def test_grid_steps_find_the_grids_that_made_the_weights() -> None:
    rng = np.random.default_rng(0)
    steps = np.array([[0.5, 0.25], [2.0, 1.0]], np.float32)
    codes = rng.integers(0, 16, (2, 2, 32))
    codes[..., :2] = 0, 15  # a block's extremes lie on the ends of its grid
    weights = (codes * steps[..., None] - 3).astype(np.float32).reshape(2, 64)
    assert np.array_equal(grid_steps(weights, symmetric=False), np.repeat(steps, 32, axis=1))
    codes = rng.integers(-126, 127, (2, 2, 32))
    codes[..., 0] = -127
    weights = (codes * steps[..., None]).astype(np.float32).reshape(2, 64)
    assert np.array_equal(grid_steps(weights, symmetric=True), np.repeat(steps, 32, axis=1))


def test_rotary_order_puts_halves_of_a_head_side_by_side() -> None:
    rows = np.arange(8)[:, None]  # two heads of four: 0 1 | 2 3 and 4 5 | 6 7
    assert rotary_order(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_plain_products_compute_the_same() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 4), np.float32)
    graph = helper.make_graph(
        [helper.make_node("FusedMatMul", ["x", "w"], ["y"], "product", domain="com.microsoft", transB=1)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = with_plain_products(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w.T"]
    x = rng.standard_normal((2, 4), np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], x @ weights.T, atol=1e-6)


def test_products_that_are_no_plain_product_are_refused() -> None:
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1, alpha=2.0)
    graph = helper.make_graph([node], "one", [], [], [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")])
    with pytest.raises(ValueError, match="not x · Wᵀ"):
        with_plain_products(helper.make_model(graph))


def test_the_simulated_grid_has_eight_levels_per_block() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 128), np.float32)
    for block in simulated.BLOCKS:
        restored = simulated.compensated_3_bit(weights, factor(np.eye(128, dtype=np.float32), 0.3), block)
        levels = [len(np.unique(part)) for row in restored for part in row.reshape(-1, block)]
        assert max(levels) == 8
        assert np.linalg.norm(weights - restored) / np.linalg.norm(weights) < 0.25  # 2 bits leave .4


# --- comparing --------------------------------------------------------------------------------------------------------


def test_excess_is_paired() -> None:
    windows = [np.zeros(4, np.int64), np.zeros(3, np.int64)]  # three and two scored tokens
    theirs = np.array([0.1, 5.0, 0.3, 2.0, 0.2])
    found = excess(theirs - 0.05, theirs, windows)
    assert found == pytest.approx({"excess": -0.05, "excess_low": -0.05, "excess_high": -0.05})
    assert excess(theirs, theirs, windows, factor=0.5)["excess"] == pytest.approx(0.5 * theirs.mean())


def test_interpolation_is_straight_in_the_logarithm() -> None:
    points = [(3.0, 0.8), (4.0, 0.2)]
    assert interpolated(points, 3.0) == pytest.approx(0.8)
    assert interpolated(points, 3.5) == pytest.approx(0.4)
    assert interpolated(points[::-1], 5.0) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="no line"):
        interpolated([(3.0, 0.8), (3.0, 0.2)], 3.0)
    with pytest.raises(ValueError, match="no line"):
        interpolated([(3.0, 0.8), (4.0, 0.0)], 3.0)


GAP = {"excess": -0.1, "excess_low": -0.2, "excess_high": 0.0}


def row(tool: str, name: str, kl: float, size: int = 100, **more: Any) -> dict[str, Any]:
    figures = {"kl_mean_low": kl / 2, "kl_mean_high": kl * 2, "kl_p99": 9 * kl, "top1": 0.8, "perplexity_ratio": 1.1}
    return {"tool": tool, "name": name, "bytes": size, "bits_per_weight": 4.5, "kl_mean": kl, **figures, **more}


def verdicts(*rows: dict[str, Any]) -> list[bool]:
    return [found["met"] for found in evaluate(rows)]


def test_a_budget_must_lose_less_at_no_more_bytes() -> None:
    peer = row("llama.cpp", "Q4_0", 0.3)
    assert verdicts(peer, row("ours", "budget_100", 0.29, beside={"Q4_0": GAP})) == [True]
    assert verdicts(peer, row("ours", "budget_100", 0.30, beside={"Q4_0": GAP})) == [False]
    assert verdicts(peer, row("ours", "budget_100", 0.29, size=101, beside={"Q4_0": GAP})) == [False]


def test_q4_may_lose_three_fifths_of_its_control() -> None:
    control = row("ours", "q4_nearest", 0.5)
    assert verdicts(control, row("ours", "q4", 0.3, control={"name": "q4_nearest", "gap": GAP})) == [True]
    assert verdicts(control, row("ours", "q4", 0.31, control={"name": "q4_nearest", "gap": GAP})) == [False]


def test_q3_is_judged_on_the_frontier_at_its_own_bits() -> None:
    frontier = [row("simulated", "a", 0.8, body_bits=3.0), row("simulated", "b", 0.2, body_bits=4.0)]
    assert verdicts(*frontier, row("ours", "q3", 0.39, body_bits=3.5)) == [True]
    assert verdicts(*frontier, row("ours", "q3", 0.41, body_bits=3.5)) == [False]
    assert verdicts(*frontier, row("ours", "q3", 0.10, body_bits=3.51)) == [False]
    assert verdicts(frontier[0], row("ours", "q3", 0.39, body_bits=3.5)) == []


# --- ours -------------------------------------------------------------------------------------------------------------


def test_budgets_are_solved_once_where_one_plan_answers_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(prepared: Any, variant: str, recipe: dict[str, Any]) -> Written:
        size = recipe["budget"]["bytes"]
        asked.append((size, recipe["search"]))
        return Written(variant, Path(), min(size, 140) - 1, 4.5, {})

    monkeypatch.setattr(ours, "write", write)
    prepared: Any = SimpleNamespace(project=SimpleNamespace(read=lambda name: {"search": "weighted"}))
    found = [(size, written.variant) for size, written in budgets(prepared, [150, 200, 100, 139, 138, 200])]
    assert asked == [(200, "weighted"), (138, "weighted"), (100, "weighted")]
    assert found == [
        (200, "budget_200"),
        (150, "budget_200"),
        (139, "budget_200"),
        (138, "budget_138"),
        (100, "budget_100"),
    ]


# --- keeping and showing ----------------------------------------------------------------------------------------------


def test_a_measurement_is_made_once_for_the_same_inputs(tmp_path: Path) -> None:
    made = []

    def make() -> Measured:
        made.append(1)
        return Measured({"bytes": 7}, np.array([0.25, 0.5]))

    for inputs in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        found = Cache(tmp_path).get(inputs, make)
        assert found.figures == {"bytes": 7}
        assert found.kl.tolist() == [0.25, 0.5]
    assert len(made) == 2


def test_tables_show_ours_beside_its_peer_and_what_is_missing() -> None:
    rows = [
        row("llama.cpp", "Q4_0", 0.3, tokens_per_second=123.4),
        row("ours", "budget_100", 0.2, size=99, beside={"Q4_0": GAP}),
    ]
    subject = {
        "title": "A", "note": "B.", "reference_perplexity": 11.0, "rows": rows, "missing": {"X y": "ImportError: z"},
        "targets": evaluate(rows),
    }  # fmt: skip
    text = files({"subjects": [subject]})
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in lines] == ["| ours: budget_100", "| llama.cpp: Q4_0"]
    assert "| 123 | 0.2000 | -0.1000 (-0.2000 to +0.0000) |" in lines[1]
    assert "not there: X y (ImportError: z)" in text
    assert "| met |" in targets({"subjects": [subject]})
