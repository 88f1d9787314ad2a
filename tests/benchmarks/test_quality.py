"""The comparison of quality: what is counted, interpolated, compared and claimed, on numbers small enough to check."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from benchmarks.quality import ours, peers_llama, plot, subjects
from benchmarks.quality.cache import Cache
from benchmarks.quality.compare import excess
from benchmarks.quality.gguf_file import rotary_order, tokenizer_bytes
from benchmarks.quality.measure import Measured
from benchmarks.quality.ours import Written, budgets
from benchmarks.quality.peers_onnx import with_plain_products
from benchmarks.quality.sizes import gguf_size, onnx_bytes, onnx_memory
from benchmarks.quality.tables import TABLES, claim
from benchmarks.quality.targets import evaluate
from pipeline.config.recipes import BudgetRecipe, RecipeConfig
from pipeline.config.typed_yaml import check
from pipeline.files import write_json

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


def test_memory_of_a_graph_is_that_of_its_plan(tmp_path: Path) -> None:
    """Products in 4 and 2 bits, a matrix of floats, a table that is looked up, a vector."""
    tensors = {"float": (64, 8), "table": (1000, 64), "norm": (64,)}
    graph = helper.make_graph(
        [
            _product("a", bits=4, block_size=64, N=10, K=128),
            _product("b", bits=2, block_size=128, N=10, K=256),
            helper.make_node("MatMul", ["x", "float"], ["y"]),
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Mul", ["x", "norm"], ["scaled"]),
        ],
        "one", [], [],
        [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in tensors.items()],
    )  # fmt: skip
    assert onnx_memory(graph) == 10 * 128 * 5 // 8 + 10 * 256 * 5 // 16 + 4 * 64 * 8


def _product(name: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node("MatMulNBits", ["x", f"{name}.codes"], [name], name, domain="com.microsoft", **attributes)


def test_a_file_tells_which_tensors_fell_back(tmp_path: Path) -> None:
    """Q4_K_M promises Q4_K; a matrix of 576 channels can only be Q5_0."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    for name, columns, kind in (
        ("blk.0.ffn_down.weight", 1536, gguf.GGMLQuantizationType.Q4_K),
        ("blk.0.attn_q.weight", 576, gguf.GGMLQuantizationType.Q5_0),
        ("token_embd.weight", 512, gguf.GGMLQuantizationType.Q6_K),
    ):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((8, columns // block * size), np.uint8), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(576, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_size(tmp_path / "tiny.gguf")
    assert found["types"] == pytest.approx({"Q4_K": 1536 / 2624, "Q5_0": 576 / 2624, "Q6_K": 512 / 2624})
    assert found["promised"] == pytest.approx(1536 / 2112)
    assert found["fallback"] == pytest.approx(576 / 2624)
    assert found["body_bits"] == pytest.approx((4.5 * 1536 + 5.5 * 576) / 2112)
    assert found["memory"] == found["bytes"] == found["file_bytes"]


# --- models -----------------------------------------------------------------------------------------------------------


def test_rotary_order_puts_halves_of_a_head_side_by_side() -> None:
    rows = np.arange(8)[:, None]  # two heads of four: 0 1 | 2 3 and 4 5 | 6 7
    assert rotary_order(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "widened"])
def test_plain_products_compute_the_same(half: bool) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 4), np.float32).astype(np.float16 if half else np.float32)
    widen = [helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT)] if half else []
    product = helper.make_node(
        "FusedMatMul", ["x", "wide" if half else "w"], ["y"], "product", domain="com.microsoft", transB=1
    )
    graph = helper.make_graph(
        [*widen, product],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = with_plain_products(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert [tensor.name for tensor in model.graph.initializer] == ["wide.T" if half else "w.T"]
    x = rng.standard_normal((2, 4), np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], x @ weights.T, atol=1e-6)


def test_products_that_are_no_plain_product_are_refused() -> None:
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1, alpha=2.0)
    graph = helper.make_graph([node], "one", [], [], [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")])
    with pytest.raises(ValueError, match="not x · Wᵀ"):
        with_plain_products(helper.make_model(graph))


# --- comparing --------------------------------------------------------------------------------------------------------


def test_excess_is_paired_in_all_and_by_kind() -> None:
    theirs = np.array([0.1, 5.0, 0.3, 2.0, 0.2, 0.7, 0.1, 0.4])
    mine, kinds = theirs + np.repeat([-0.05, 0.2], 4), ("prose", "prose", "code", "code")
    found = excess(theirs - 0.05, theirs, kinds=kinds)
    assert found == pytest.approx({"excess": -0.05, "excess_low": -0.05, "excess_high": -0.05})
    assert excess(theirs, theirs, factor=0.5, kinds=kinds)["excess"] == pytest.approx(0.5 * theirs.mean())
    assert excess(mine, theirs, kind="code", kinds=kinds)["excess"] == pytest.approx(0.2)


def row(tool: str, name: str, kl: float, size: int = 100, **more: Any) -> dict[str, Any]:
    figures = {"kl_mean_low": kl / 2, "kl_mean_high": kl * 2, "kl_p99": 9 * kl, "top1": 0.8, "perplexity_ratio": 1.1}
    kinds = {f"{kind}_kl_mean": kl for kind in ("prose", "chat", "code", "languages")}
    sizes = {"bytes": size, "memory": size, "bits_per_weight": 4.5, "body_bits": 4.5, "windows": 32}
    return {"tool": tool, "name": name, **sizes, "kl_mean": kl, **figures, **kinds, **more}


def certain(ours: float, theirs: float, factor: float = 1.0) -> dict[str, float]:
    gap = ours - factor * theirs
    return {"excess": gap, "excess_low": gap - 0.01, "excess_high": gap + 0.01}


def judged(*rows: dict[str, Any]) -> list[tuple[str | None, bool]]:
    kl = {row["name"]: row["kl_mean"] for row in rows}
    found = evaluate(rows, lambda ours, peer, factor: certain(kl[ours], kl[peer], factor))
    return [(target["ours"], target["met"]) for target in found]


def test_a_target_is_met_where_the_interval_lies_below_zero() -> None:
    peer = row("llama.cpp", "Q4_K_M, imatrix", 0.2, body_bits=6.0)
    assert judged(peer, row("ours", "budget", 0.155)) == [("budget", True)]
    assert judged(peer, row("ours", "budget", 0.165)) == [("budget", False)]  # 0.005 below 0.85 × 0.2, ± 0.01


def test_the_best_of_ours_that_is_no_larger_is_judged() -> None:
    peer = row("llama.cpp", "IQ3_S, imatrix", 0.2, size=100, body_bits=6.0)
    larger, smaller, best = (
        row("ours", name, kl, size) for name, kl, size in (("a", 0, 101), ("b", 1, 90), ("c", 0.1, 99))
    )
    assert judged(peer, larger, smaller, best) == [("c", True)]
    assert judged(peer, larger) == [(None, False)]


def test_memory_has_targets_by_the_bits_of_the_layers() -> None:
    ours = row("ours", "m", 0.28, memory=90)
    assert judged(row("llama.cpp", "Q5_K_S", 0.3, body_bits=5.4), ours) == [("m", True)]
    assert judged(row("llama.cpp", "Q3_K_M", 0.3, body_bits=3.9), ours) == []  # no IQ-quant
    assert judged(row("llama.cpp", "IQ3_M", 0.2, body_bits=3.7), ours) == [("m", True)]  # at most 1.5 times
    assert judged(row("onnxruntime", "IQ3_M", 0.2, body_bits=3.7), ours) == []


def test_q4_may_lose_a_third_of_its_control() -> None:
    control = row("ours", "q4_nearest", 0.5)
    assert judged(control, row("ours", "q4", 0.16)) == [("q4", True)]
    assert judged(control, row("ours", "q4", 0.18)) == [("q4", False)]


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "limit"), [("bytes", "bytes"), ("memory", "packed")])
def test_budgets_are_solved_once_where_one_plan_answers_both(
    monkeypatch: pytest.MonkeyPatch, by: ours.By, limit: str
) -> None:
    asked = []

    def write(prepared: Any, variant: str, recipe: dict[str, Any]) -> Written:
        size = recipe["budget"][limit]
        asked.append((size, recipe["search"]))
        assert ("learn" in recipe) == (by == "memory")
        return Written(variant, Path(), *[min(size, 140) - 1] * 2, 4.5, {})

    monkeypatch.setattr(ours, "write", write)
    prepared: Any = SimpleNamespace(project=SimpleNamespace(read=lambda name: {"search": "weighted", "head": "w6b64a"}))
    found = [written.variant for written in budgets(prepared, by, [150, 200, 100, 139, 138, 200, 101])]
    # 150 has the plan of 200; 139 and 101 are too near to 138 and 100
    assert asked == [(200, "weighted"), (138, "weighted"), (100, "weighted")]
    assert found == [f"{by}_200", f"{by}_138", f"{by}_100"]


def test_budgets_choose_among_formats_whose_error_is_measured() -> None:
    shipped = yaml.safe_load(Path("configs/sensitivity.yaml").read_text("utf-8"))["formats"]
    assert not set(subjects.LARGER_BLOCKS) & set(shipped)
    for names in ours._BY_MEMORY.values():
        assert set(subjects.LARGER_BLOCKS) <= set(names) <= {*shipped, *subjects.LARGER_BLOCKS}


def test_every_recipe_of_the_benchmark_can_be_read() -> None:
    prepared: Any = SimpleNamespace(
        project=SimpleNamespace(read=lambda name: yaml.safe_load((Path("configs") / name).read_text("utf-8")))
    )
    for name, recipe in ours.recipes(prepared).items():
        assert check(RecipeConfig if "body" in recipe else BudgetRecipe, recipe, name)


@pytest.mark.parametrize(("recipe", "ran"), [({}, ["quantize"]), ({"learn": {}}, ["learn", "quantize"])])
def test_an_artifact_is_learned_before_it_is_written_where_its_recipe_learns(
    tmp_path: Path, recipe: dict[str, Any], ran: list[str]
) -> None:
    stages = []

    class Recorded:
        def write(self, name: str, values: dict[str, Any]) -> None:
            assert (name, values) == ("recipes/v.yaml", recipe)

        def run(self, *arguments: str) -> None:
            assert arguments[1:] == ("m", "v")
            stages.append(arguments[0])

        def artifact(self, model: str, variant: str) -> Path:
            return tmp_path

    write_json(tmp_path / "plan.json", {"bytes": 1, "packed_bytes": 2, "body_bits_per_weight": 3, "sha256": {}})
    prepared: Any = SimpleNamespace(project=Recorded(), subject=SimpleNamespace(model="m"))
    assert ours.write(prepared, "v", recipe) == Written("v", tmp_path, 1, 2, 3, {})
    assert stages == ran


# --- keeping and showing ----------------------------------------------------------------------------------------------


def test_llama_cpp_decodes_once_to_warm_up_and_then_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = iter((1.0, 5.0, 3.0, 4.0))

    def decode_rate(prompt: list[int], new: int) -> float:
        assert (len(prompt), new) == (128, 32)
        return next(rates)

    monkeypatch.setattr(peers_llama, "_Context", lambda *_: SimpleNamespace(decode_rate=decode_rate))
    assert peers_llama.GgufFile().speed(tmp_path) == {
        "tokens_per_second": 4.0, "tokens_per_second_low": 3.0, "tokens_per_second_high": 5.0
    }  # fmt: skip


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


def compared(**more: Any) -> dict[str, Any]:
    """A subject with a win at Q4_K_M and a loss at IQ3_S."""
    rows = [row("ours", "bytes_100", 0.2), row("ours", "bytes_80", 0.5, 80)]
    for name, kl, size, mine in (("Q4_K_M, imatrix", 0.4, 100, rows[0]), ("IQ3_S, imatrix", 0.25, 80, rows[1])):
        gap = certain(mine["kl_mean"], kl)
        beside = {"name": mine["name"], **gap, "kinds": dict.fromkeys(("prose", "chat", "code", "languages"), gap)}
        types = {"types": {"Q4_K": 1.0}, "promised": 1.0, "fallback": 0.0}
        rows.append(row("llama.cpp", name, kl, size, ours={"bytes": beside, "memory": beside}, **types))
    return {
        "title": "A", "note": "B.", "rows": rows,
        "reference_perplexity": {"prose": 11.0, "chat": 6.5, "code": 12.0, "languages": 20.0}, "brief": False,
        "missing": {"X y": "ImportError: z"}, "targets": [], **more,
    }  # fmt: skip


def test_the_claim_tells_wins_and_losses() -> None:
    found = "our files have less KL than Q4_K_M (0.50 ×); more KL than IQ3_S (2.00 ×)."
    assert claim({"subjects": [compared()]}) == (
        f"On A, whose widths llama.cpp's formats fit, at the same download, {found} There, at the same memory, {found}"
        " In brackets: our KL over theirs."
    )
    fell = compared(brief=True, title="C")
    fell["rows"][2]["fallback"] = 0.8
    text = TABLES["quality-summary"]({"subjects": [compared(), fell]})
    assert "C has widths" in text
    assert "Q4_K_M 80%" in text
    assert "prose 1, chat 1, code 1, other languages 1." in text


def test_tables_show_ours_beside_its_peer_and_what_is_missing() -> None:
    subject = compared()
    subject["targets"] = evaluate(subject["rows"], lambda ours, peer, factor: certain(0.2, 0.4, factor))
    result = {"subjects": [subject]}
    lines = [line for line in TABLES["quality-pairs"](result).splitlines() if "Q4_K_M" in line]
    assert len(lines) == 2
    assert "| bytes_100 | 0.0 | 0.2000 | 0.50 | -0.2000 (-0.2100 to -0.1900) |" in lines[0]
    assert "not there: X y (ImportError: z)" in TABLES["quality"](result)
    assert "| met |" in TABLES["quality-targets"](result)
    assert "Q4_K 100%" in TABLES["quality-types"](result)


def test_equal_results_give_equal_plots() -> None:
    result = {"subjects": [compared()]}
    for by in ours.SIZES:
        drawn = plot.render(result, by)
        assert drawn.startswith(b"\x89PNG")
        assert drawn == plot.render(result, by)
