"""The estimate of a run: the arithmetic under a clock of ours, and that it leaves nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import estimate as module
from pipeline.artifact.estimate import Estimate, estimate
from pipeline.artifact.work import Unit, quantize_unit
from pipeline.planning.recipes import PlannedMatrix
from tests.artifact.exported import Exported, changed, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny exported model."""
    return export(make_checkpoint(tmp_path_factory.mktemp("estimate") / "checkpoint", CASES["llama-untied"]))


RECIPES = {name: load_recipe(name) for name in ("q4", "q4_k_m", "q3")} | {"nearest": changed("q4", search="nearest")}


def formats(planned: PlannedMatrix) -> list[str]:
    """Of its pieces, however wide they are."""
    return [str(piece.format) for piece in planned.pieces]


@pytest.mark.parametrize("variant", RECIPES)
def test_each_format_is_timed_and_stands_for_its_weights(
    variant: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every timed stretch lasts two seconds of our clock: so many seconds per sample, of computing and of the disk."""
    recipe, sampled, clock = RECIPES[variant], {}, itertools.count(0, 2)

    def spied(unit: Unit, *rest: Any) -> Any:
        sampled[unit] = formats(unit.planned)
        return quantize_unit(unit, *rest)

    monkeypatch.setattr(module, "quantize_unit", spied)
    monkeypatch.setattr(module, "cores", lambda: 4)
    monkeypatch.setattr(module, "_SAMPLE_WEIGHTS", 1 << 13)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    drafted = exported.draft(recipe)
    got = estimate(drafted.plan, exported.checkpoint, tmp_path, recipe.search, drafted.bytes)
    kinds = [[*kind] for kind in {(*formats(item),) for item in drafted.plan.tables}]
    assert sorted(sampled.values()) == sorted(kinds)
    seconds = 0.0
    for unit, name in sampled.items():
        alike = [item.matrix for item in drafted.plan.tables if formats(item) == name]
        seconds += 2 * sum(matrix.rows * matrix.columns for matrix in alike) / unit.weights
    assert got.compute == pytest.approx(seconds / (4 * 4))  # four units on each of four cores at a time
    # float32 weights: read at what follows the largest matrix in the file per two seconds, written at 64 MB/s.
    weights = 4 * sum(item.matrix.rows * item.matrix.columns for item in drafted.plan.tables)
    largest = max((exported.checkpoint[item.matrix.name] for item in drafted.plan.tables), key=lambda ref: ref.length)
    read = (exported.checkpoint.folder / largest.file).stat().st_size - largest.offset
    assert got.disk == pytest.approx(2 * weights / read + 2 * drafted.bytes / (128 << 20))
    assert [*tmp_path.iterdir()] == []


def test_the_longer_of_computing_and_disk_counts() -> None:
    assert "about 90 s (90 s of computing on 2 cores beside 7 s" in Estimate(90.4, 7.0, 2).describe()
    assert "about 1,234 s (90 s of computing on 2 cores beside 1,234 s" in Estimate(90.4, 1234.0, 2).describe()
