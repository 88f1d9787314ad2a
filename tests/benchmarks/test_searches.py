"""The comparison of quantizers: that what it reports is right, not how fast anything is."""

from __future__ import annotations

import importlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import searches
from benchmarks.searches import LAYER, SLICES, attempt, decode, errors, llama_cpp, onnx_runtime, ours, slices, synthetic


def saved(folder: Path, rows: int, columns: int) -> Path:
    path = folder / f"{columns}.npy"
    bits, moments = synthetic(rows, columns)
    np.save(path, bits)
    np.save(path.with_suffix(".moments.npy"), moments)
    return path


def test_weights_are_seeded_and_heavy_tailed() -> None:
    bits, moments = synthetic(64, 512)
    assert np.array_equal(bits, synthetic(64, 512)[0])
    assert not np.array_equal(bits, synthetic(64, 512, seed=1)[0])
    values = decode(bits).astype(np.float64)
    assert (values**4).mean() / (values**2).mean() ** 2 > 5  # a Gaussian has 3
    assert moments.shape == (512,)
    assert (moments > 0).all()


def test_decode_reads_bfloat16() -> None:
    assert decode(np.array([[0x3F80, 0xC000], [0x0000, 0x3E20]], np.uint16)).tolist() == [[1.0, -2.0], [0.0, 0.15625]]


def test_errors_by_hand() -> None:
    weights, restored = np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 3.0]], np.float32)
    plain, by_channel = errors(weights, restored, np.array([7.0, 0.25]))
    assert plain == pytest.approx(1 / 5)
    assert by_channel == pytest.approx((0.25 / (7 * 9 + 0.25 * 16)) ** 0.5)


def test_ours_and_onnx_runtime_agree_where_they_do_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path, 16, 256)
    mine = {(each.what, each.format): each for each in ours(path, ("w4b32s", "w4b32a"))}
    for name in ("w4b32s", "w4b32a"):
        (peer,) = onnx_runtime(path, False, name)
        # The same rounding; its scales are float32, so they take 16 bits more per block.
        assert peer.rel_error == pytest.approx(mine["ours, nearest", name].rel_error, rel=0.02)
        assert peer.bits_per_weight == mine["ours, nearest", name].bits_per_weight + 0.5
        assert mine["ours, unweighted", name].rel_error < mine["ours, nearest", name].rel_error
        assert mine["ours, weighted", name].weighted_error < mine["ours, unweighted", name].weighted_error
    (kquant,) = onnx_runtime(path, True, "w4b32a")
    assert kquant.rel_error == pytest.approx(mine["ours, nearest", "w4b32a"].rel_error, rel=0.1)


@pytest.mark.parametrize("square", [128, 256, 4096])
def test_slices_are_disjoint_rows_of_the_weights_in_a_layers_proportions(square: int) -> None:
    used: dict[int, list[int]] = {4096: [], 11008: []}
    for _, width, rows in slices(square):
        used[width].extend(range(square)[rows])
    assert all(len(set(rows)) == len(rows) for rows in used.values())
    expected = {width: sum(rows for rows, columns in LAYER.values() if columns == width) for width in used}
    for width, rows in used.items():
        assert len(rows) == pytest.approx(expected[width] * square / 4096 / 8, rel=0.05)
    assert len(list(slices(square))) == SLICES * len(LAYER)


@pytest.mark.parametrize(
    ("function", "argument", "why"),
    [(importlib.import_module, "no_such_peer", "ModuleNotFoundError"), (os._exit, 3, "BrokenProcessPool")],
)
def test_a_peer_that_is_absent_or_dies_is_missing(function, argument, why: str) -> None:
    result = {"records": [], "missing": {}}
    attempt(result, "peer", function, argument)
    assert result["missing"]["peer"].startswith(why)
    assert not result["records"]


def test_ratios_follow_the_formats_that_our_recipe_mixes() -> None:
    rates = {"w4b64a": 100.0, "w2b64a": 50.0}
    table = {("ours, weighted from bf16", name, 1): {"per_core": rate} for name, rate in rates.items()}
    table["llama.cpp", "Q3_K_M", 2] = {"per_core": 10.0}
    assert searches.ratio(table, "weighted", ("llama.cpp", "Q3_K_M", 2)) == pytest.approx(
        1 / (0.6 / 100 + 0.4 / 50) / 10
    )


def test_the_table_pools_shapes_and_names_what_is_missing(tmp_path: Path) -> None:
    records = [vars(each) for columns in (64, 256) for each in ours(saved(tmp_path, 8, columns), ("w4b32s",))]
    pooled = searches.pooled(records)["ours, nearest", "w4b32s", 1]
    first, second = (each for each in records if each["what"] == "ours, nearest")
    seconds = first["cpu_s"] + second["cpu_s"]
    assert pooled["per_core"] == pytest.approx((first["weights"] + second["weights"]) / seconds)
    assert min(first["rel_error"], second["rel_error"]) < pooled["rel_error"]
    text = io.StringIO()
    searches.show({"records": records, "missing": {"llama.cpp": "not here"}}, Console(file=text, width=150))
    assert "ours, nearest" in text.getvalue()
    assert "missing: llama.cpp (not here)" in text.getvalue()


def test_llama_cpp_quantizes_our_file_and_takes_the_importance_matrix(tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason="requirements-bench.txt is not installed")
    paths = {width: saved(tmp_path, 128, width) for width in (4096, 11008)}
    gguf = tmp_path / "source.gguf"
    searches.write_gguf(gguf, {width: np.load(path) for width, path in paths.items()})
    (without,), (with_one,) = (llama_cpp(gguf, paths, "Q4_0", 1, imatrix) for imatrix in (False, True))
    assert without.bits_per_weight == with_one.bits_per_weight == 4.5
    assert with_one.weighted_error < without.weighted_error < 0.13
    assert without.weights == sum((rows.stop - rows.start) * width for _, width, rows in slices(128))
