"""The matrix bench: errors, orders, formats and llama.cpp's file, on matrices small enough to check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import matrices
from benchmarks.quality.matrices import Sample, our_rows, pieces_of, searched
from pipeline.quantize.formats import TensorFormat
from pipeline.quantize.search import nearest


def drawn(columns: int = 256, rows: int = 32, role: str = "down_proj") -> Sample:
    """Correlated inputs of uneven channels."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((columns, columns)) / columns**0.5 + np.eye(columns)
    text = (rng.standard_normal((2000, columns)) @ mix * np.exp(rng.standard_normal(columns))).astype(np.float32)
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    halves = text[::2], text[1::2]
    return Sample(role, 0, weights, halves[0].T @ halves[0] / 1000, 0.1, halves[1].T @ halves[1])


def test_the_error_is_that_of_outputs() -> None:
    rng = np.random.default_rng(1)
    inputs, weights, rounded = (rng.standard_normal(shape).astype(np.float32) for shape in ((50, 8), (4, 8), (4, 8)))
    held = inputs.T @ inputs
    expected = np.linalg.norm((weights - rounded) @ inputs.T) / np.linalg.norm(weights @ inputs.T)
    assert Sample("down_proj", 0, weights, held, 0.1, held).error(rounded) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_another_basis_changes_no_product(split: bool) -> None:
    sample = drawn()
    turned = matrices.ordered(sample, split, rotated=True)
    before, after = (each.error(np.zeros_like(each.weights) + 0.5 * each.weights) for each in (sample, turned))
    assert before == pytest.approx(after, rel=1e-5) == 0.5
    assert np.trace(turned.held) == pytest.approx(np.trace(sample.held), rel=1e-4)
    if split:  # the most important half lies in front
        moments = turned.products.diagonal().reshape(2, -1).sum(axis=1)
        assert moments[0] > 2 * moments[1]


def test_each_search_leaves_less() -> None:
    sample, pieces = drawn(), pieces_of([("w4b64a", 0.5), ("w2b64a", 0.5)], 256)
    assert [piece.columns for piece in pieces] == [128, 128]
    errors = [
        sample.error(np.hstack([piece.dequantize() for piece in searched(sample, pieces, search)]))
        for search in ("nearest", "weighted", "gptq")
    ]
    assert errors == sorted(errors, reverse=True)
    fmt = TensorFormat.parse("w4b64a")
    (row,) = our_rows([sample], "nearest", False, [(("w4b64a", 1),)])
    assert row["error"] == {"down_proj": pytest.approx(sample.error(nearest(sample.weights, fmt).dequantize()))}
    assert row["bits"] == 4 + 20 / 64 and row["packed_bits"] == 5


def test_llama_cpp_rounds_the_same_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cyllama")
    monkeypatch.setattr(matrices, "LLAMA", {"Q6_K": 18, "Q4_K": 15})
    rows = list(matrices.llama_rows([drawn(role="gate_proj"), drawn()], tmp_path))
    assert [(row["format"], row["bits"]) for row in rows] == [("Q6_K", 6.5625), ("Q4_K", 4.5)]
    assert all(0.001 < error < 0.15 for row in rows for error in row["error"].values())
    assert rows[0]["error"]["down_proj"] < rows[1]["error"]["down_proj"] / 2
    assert matrices.markdown({"subject": "s", "matrices": 2, "tokens": 2000, "rows": rows}).count("\n") == 5
