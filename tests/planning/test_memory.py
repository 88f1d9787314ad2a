"""Memory in use, from shapes alone: held against figures that others published or that were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.recipes import RecipeConfig
from pipeline.config.recipes import load_recipe as shipped
from pipeline.planning.memory import packed_memory, plan_memory, use_memory, weight_memory
from pipeline.planning.recipes import Piece, PlannedMatrix, make_plan
from pipeline.quantize.formats import TensorFormat
from tests.real_configs import architecture_of
from tests.recipes import load_recipe

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "context", "mib"), [("mimo-8b", 2048, 288), ("mimo-8b", 4096, 576), ("phi-4", 2048, 400)]
)
def test_the_cache_is_twice_the_known_one_of_half_precision_and_half_of_it_in_int8(
    name: str, context: int, mib: int, tmp_path: Path
) -> None:
    architecture = architecture_of(name, tmp_path)
    assert use_memory(architecture, context)[0] == 2 * mib * MIB
    assert 2 * use_memory(architecture, context, "int8")[0] == mib * MIB


def test_activations_are_those_of_a_chunk(tmp_path: Path) -> None:
    """Longer text is read in chunks: it takes cache, not activations. Of a chunk, only the last token has logits."""
    architecture = architecture_of("phi-4", tmp_path)
    short, chunk, long = (use_memory(architecture, context)[1] for context in (16, 64, 4096))
    assert chunk == long
    assert chunk - short == 48 * use_memory(architecture, 64)[2]
    wider = use_memory(replace(architecture, vocab=architecture.vocab + 1000), 256)[1]
    assert wider - chunk == 3 * 4 * 1000  # a head of two planes: both products and their sum
    single = [use_memory(item, 256, results=1)[1] for item in (architecture, replace(architecture, vocab=101_352))]
    assert single[1] - single[0] == 4 * 1000


def bits_per_weight(name: str, tmp_path: Path, role: str = "q_proj") -> float:
    architecture = architecture_of("mimo-8b", tmp_path)
    matrix = next(matrix for matrix in architecture.body(0) if matrix.role == role)
    planned = PlannedMatrix(matrix, (Piece(TensorFormat.parse(name), matrix.columns),))
    return 8 * packed_memory(planned) / (matrix.rows * matrix.columns)


@pytest.mark.parametrize(
    ("name", "bits"), [("w2b32a", 4.0), ("w2b64a", 3.0), ("w4b32a", 6.0), ("w4b64s", 5.0), ("w8b32s", 11.0)]
)
def test_packed_weights_take_what_was_measured(name: str, bits: float, tmp_path: Path) -> None:
    """The larger of x86-64 and arm64; 2 bits in blocks of 32 take as much as 4 would without scales."""
    assert bits_per_weight(name, tmp_path) == pytest.approx(bits)


def test_a_split_is_the_sum_of_its_pieces(tmp_path: Path) -> None:
    matrix = architecture_of("mimo-8b", tmp_path).body(0)[0]
    high, low = TensorFormat.parse("w4b64a"), TensorFormat.parse("w2b64a")
    split = PlannedMatrix(matrix, (Piece(high, 1024), Piece(low, 3072)))
    assert 8 * packed_memory(split) == matrix.rows * (1024 * 5 + 3072 * 3)
    assert weight_memory(split) - packed_memory(split) == 4 * matrix.rows * (1024 + 3072) // 64


def test_a_table_stays_in_its_file_but_for_its_scales(tmp_path: Path) -> None:
    """Tied: packed for the head's product, its scales widened for both. Untied: the embedding's scales only. Two planes
    of six bits have a copy of the scales each."""
    recipe = load_recipe("q4")
    for name, tables in (("phi-4-mini", ["head"]), ("phi-4", ["head", "embedding"])):
        architecture = architecture_of(name, tmp_path)
        plan = make_plan(architecture, recipe)
        weights = architecture.vocab * architecture.hidden
        own = {"head": weights * 11 // 8 + 4 * weights // 32, "embedding": 4 * weights // 32}
        body = sum(map(weight_memory, plan.body))
        assert plan_memory(plan, architecture, 2048).weights == body + sum(own[table] for table in tables)
    head = architecture.head
    six = PlannedMatrix(head, (Piece(TensorFormat.parse("w6b64a"), head.columns),))
    assert weight_memory(six) - packed_memory(six) == 2 * 4 * head.rows * head.columns // 64


def test_the_peak_is_in_loading_or_in_use(tmp_path: Path) -> None:
    """A long context weighs more than packing the largest matrix; a short one of a model with a large table less."""
    architecture = architecture_of("phi-4-mini", tmp_path)
    plan = make_plan(architecture, load_recipe("q4"))
    long, short = plan_memory(plan, architecture, 4096), plan_memory(plan, architecture, 16)
    assert long.loading == short.loading == max(item.bytes for item in plan.tables) == plan.head.bytes
    assert long.peak == long.weights + long.cache + long.activations
    assert short.cache + short.activations < short.loading
    assert short.peak == short.weights + short.loading
    assert long.record() == {
        "weights": long.weights, "cache": long.cache, "activations": long.activations,
        "prompt_token": long.prompt_token, "loading": long.loading, "peak": long.peak,
    }  # fmt: skip


@pytest.mark.parametrize(("variant", "measured"), [("q4", 5_163_351_892), ("q4_k_m", 6_628_000_000)])
def test_mimo_takes_what_was_measured(variant: str, measured: int, tmp_path: Path) -> None:
    """Of q4 the file that ONNX Runtime packed and widened; of q4_k_m its process, less 20 MB of its own."""
    architecture, recipe = architecture_of("mimo-8b", tmp_path), shipped(variant)
    assert isinstance(recipe, RecipeConfig)
    assert plan_memory(make_plan(architecture, recipe), architecture, 16).weights == pytest.approx(measured, rel=0.01)
