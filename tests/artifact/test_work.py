"""Units of work: they are all of a matrix, once, and what they become does not depend on how it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact.graph import channel_names
from pipeline.artifact.quantizers import Search
from pipeline.artifact.work import Unit, quantize_unit, sharers, units
from pipeline.checkpoint.architecture import Matrix
from pipeline.planning.recipes import Piece, PlannedMatrix
from pipeline.quantize.formats import TensorFormat
from tests.artifact.exported import Exported, export
from tests.families import CASES, make_checkpoint
from tests.quantize.test_formats import NAMES
from tests.recipes import load_recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny model with fused and split matrices."""
    return export(make_checkpoint(tmp_path_factory.mktemp("work") / "checkpoint", CASES["phi3"]))


@st.composite
def planned_matrices(draw: st.DrawFn) -> PlannedMatrix:
    """A matrix of any size in one or two formats."""
    pieces = tuple(
        Piece(fmt, fmt.block * draw(st.integers(1, 9)))
        for fmt in map(TensorFormat.parse, draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)))
    )
    columns = sum(piece.columns for piece in pieces)
    matrix = Matrix("model.layers.0.mlp.up_proj.weight", "up_proj", 0, draw(st.integers(1, 300)), columns, "layers.0.x")
    return PlannedMatrix(matrix, pieces)


@given(planned_matrices(), st.integers(1, 1 << 18))
def test_units_are_all_rows_once(planned: PlannedMatrix, unit_bytes: int) -> None:
    found = units(planned, unit_bytes)
    rows = [row for unit in found for row in range(unit.start, unit.stop)]
    assert rows == [*range(planned.matrix.rows)]
    assert len({unit.name for unit in found}) == len(found)
    assert sum(unit.weights for unit in found) == planned.matrix.rows * planned.matrix.columns
    assert all(4 * unit.weights <= unit_bytes or unit.stop - unit.start == 1 for unit in found)


@given(planned_matrices(), st.integers(1, 1 << 18))
def test_their_ranges_are_all_bytes_once(planned: PlannedMatrix, unit_bytes: int) -> None:
    ends: dict[str, int] = {}
    for unit in units(planned, unit_bytes):
        for at in unit.ranges():
            assert at.offset == ends.get(at.name, 0)
            ends[at.name] = at.offset + at.length
    sizes = [piece.format.bytes(planned.matrix.rows, piece.columns) for piece in planned.pieces]
    assert sum(ends.values()) == sum(sizes) == planned.bytes


def test_memory_is_that_of_a_unit() -> None:
    """MiMo's head has 622 million weights, 2.5 GB of float32, of which a unit is a hundredth at most."""
    matrix = Matrix("lm_head.weight", "head", 36, 151_680, 4096, "head")
    found = units(PlannedMatrix(matrix, (Piece(TensorFormat.parse("w8b32s"), 4096),)))
    assert len(found) >= 75
    assert max(4 * unit.weights for unit in found) <= 32 << 20


@pytest.mark.parametrize("variant", ["q4_k_m", "q3"])
def test_any_cut_gives_the_same_rows(variant: str, exported: Exported) -> None:
    for planned in exported.draft(load_recipe(variant)).plan.tables:
        columns = np.random.default_rng(0).permutation(planned.matrix.columns).astype(np.int32)
        halves = np.split(columns, [planned.pieces[0].columns])
        channels = dict(zip(channel_names(planned), halves, strict=False)) if planned.split else {}
        (whole,) = units(planned)
        quantizer = Search(exported.moments).of(planned, channels)
        expected = quantize_unit(whole, exported.checkpoint, quantizer)
        assert len(expected) == len(planned.pieces)
        for start, stop in ((0, 1), (5, 42), (planned.matrix.rows - 3, planned.matrix.rows)):
            unit = Unit(planned, start, stop)
            for part, all_rows in zip(quantize_unit(unit, exported.checkpoint, quantizer), expected, strict=True):
                for array in ("codes", "scales", "zeros"):
                    np.testing.assert_array_equal(getattr(part, array), getattr(all_rows, array)[start:stop])


def test_matrices_that_share_an_input_share_its_order(exported: Exported) -> None:
    groups = sharers(exported.draft(load_recipe("q3")).plan)
    names = {key: [item.matrix.role for item in group] for key, group in groups.items()}
    assert names["layers.1.mlp"] == ["gate_up_proj"]
    assert len(groups) == 3 * 4
    assert sharers(exported.draft(load_recipe("q4")).plan) == {}
