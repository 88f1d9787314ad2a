"""One model of time: laws of units on workers, and the measurements that it must meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.config.calibration import load_calibration, load_sensitivity
from pipeline.config.models import load_model
from pipeline.engine import Here
from pipeline.journal import Journal
from pipeline.preflight import needs
from pipeline.preflight.needs import Needs, Rates
from pipeline.preflight.rounds import Round, Units, Workers, here, makespan, on, phases
from pipeline.tasks.registry import load_suite
from pipeline.tasks.subject import fill
from tests.real_configs import architecture_of

ONE = Rates(65e9, 1)
FREE = {"unit": 0.0, "network": math.inf}
COUNTS = (1, 2, 3, 4, 7, 8, 16, 64, 256)


def stages(model: str, folder: Path, rates: Rates = ONE, suite: str = "release") -> dict[str, Needs]:
    """Those whose units are spread."""
    architecture, entry, asked = architecture_of(model, folder), load_model(model), load_suite(suite)
    found = [
        needs.calibrate(architecture, load_calibration(), rates),
        needs.sensitivity(architecture, load_sensitivity(), rates),
        needs.quantize("q4", 10**9, architecture, "gptq", rates),
        replace(needs.quantize("q4", 10**9, architecture, "weighted", rates), stage="weighted"),
        needs.reference(architecture, 2 * architecture.parameters, asked, entry, rates),
        needs.validate(architecture, "q4", 10**9, 1000, asked, entry, rates),
        replace(
            needs.layered_reference(architecture, 2 * architecture.parameters, asked, entry, 24 * 10**9, rates),
            stage="layered",
        ),
    ]
    return {one.stage: one for one in found}


@pytest.mark.parametrize("model", ["smollm2-135m", "mimo-8b", "phi-4"])
def test_one_worker_of_one_core_takes_what_one_core_takes_here(model: str, tmp_path: Path) -> None:
    entry = load_model(model)
    for stage, found in stages(model, tmp_path).items():
        seconds = on(found.work, Workers(1, 1, **FREE))
        assert found.seconds == here(found.work, 1)
        if stage in ("reference", "validate") and entry.mmlu_mode == "five-shot":  # batches read their examples again
            assert found.seconds < seconds < 1.3 * found.seconds
        else:
            assert seconds == pytest.approx(found.seconds)


@pytest.mark.parametrize("cores", [1, 16])
@pytest.mark.parametrize("model", ["smollm2-135m", "mimo-8b", "phi-4"])
def test_more_workers_are_never_slower_and_none_beat_what_cannot_be_shared(
    model: str, cores: int, tmp_path: Path
) -> None:
    for found in stages(model, tmp_path).values():
        spent = [on(found.work, Workers(count, cores)) for count in COUNTS]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(spent))
        for count, seconds in zip(COUNTS, spent, strict=True):
            rounds = list(phases(found.work, Workers(count, cores)))
            assert seconds >= sum(one.times * (one.alone + max(one.sizes, default=0)) for one in rounds)
            assert seconds >= sum(one.times * (one.alone + sum(one.sizes) / count) for one in rounds) * (1 - 1e-9)
        assert spent[0] >= spent[-1] > sum(one.times * one.alone for one in found.work)


def test_units_that_use_one_core_gain_nothing_from_a_worker_s_others() -> None:
    one, many = ([Round((Units(8, narrow=2.0),))], [Round((Units(8, wide=2.0),))])
    assert on(one, Workers(2, 16, **FREE)) == on(one, Workers(2, 1, **FREE)) == 8
    assert on(many, Workers(2, 16, **FREE)) == 0.5


def test_a_round_ends_with_its_last_unit_and_the_head_node_does_its_part_of_each() -> None:
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 1, 3], 2) == 4
    assert makespan([], 4) == 0
    assert on([Round((Units(3, 1.0),), alone=5, times=2)], Workers(2, 1, **FREE)) == 2 * (5 + 2)


def test_what_moves_counts_where_it_takes_longer_than_the_work() -> None:
    work = [Round((Units(10, 1.0, moved=1e9),), read=2e9)]
    assert on(work, Workers(10, 1, 0.0, math.inf)) == 1
    assert on(work, Workers(10, 1, 0.0, 1e9)) == 2 + 10
    assert on(work, Workers(1, 1, 0.0, 1e9)) == 2 + 10


class Elsewhere(Here):
    """An engine whose workers are elsewhere, as far as `fill` can tell."""

    shared = False

    def __init__(self, workers: int):
        self.workers = workers


@pytest.mark.parametrize(("items", "workers"), [(570, 1), (570, 3), (164, 64), (64, 4), (3, 16), (2850, 64)])
def test_batches_are_those_that_tasks_make(items: int, workers: int, tmp_path: Path) -> None:
    made: list[int] = []

    def make(names: Sequence[str]) -> Iterable[int]:
        made.append(len(names))
        return [0] * len(names)

    fill(Journal(tmp_path / "items.jsonl"), [str(name) for name in range(items)], "", "", make, Elsewhere(workers))
    (phase,) = phases([Round((Units(items, 1.0, batched=True),))], Workers(workers, 1, **FREE))
    assert phase.sizes == made


def test_what_a_cluster_brought_smollm2_is_foretold(tmp_path: Path) -> None:
    """q4 on one and two nodes of one core: docs/scale.md."""
    quantize = stages("smollm2-135m", tmp_path)["quantize"]
    for count, measured in ((1, 46.1), (2, 24.0)):
        assert on(quantize.work, Workers(count, 1)) == pytest.approx(measured, rel=0.15)


def test_an_input_s_factors_end_what_workers_bring_calibration(tmp_path: Path) -> None:
    """The widest one's are tried on a core each, and the next layer's are not begun before."""
    found = stages("mimo-8b", tmp_path, Rates(130e9, 2))["calibrate"]
    (layer,) = found.work
    widest, *others = layer.units
    assert widest.count == 1 and all(widest.first > one.first for one in others)
    assert on(found.work, Workers(1000, 16, **FREE)) == pytest.approx(36 * (layer.alone + widest.first))
    assert on(found.work, Workers(1, 2)) > 10 * on(found.work, Workers(1000, 2))


def test_expected_seconds_have_a_start_and_stages_that_are_not_spread_do_not_wait_for_workers(tmp_path: Path) -> None:
    found = stages("smollm2-135m", tmp_path, suite="smoke")["validate"]
    assert found.expected() == found.fixed + found.seconds
    assert found.expected(Workers(2, 1)) == found.fixed + needs.ENGINE_SECONDS + on(found.work, Workers(2, 1))
    alone = replace(found, work=(Round(alone=found.seconds),))
    assert not alone.spread
    assert alone.expected(Workers(64, 16)) == alone.expected()
    assert math.isnan(needs.bundle("q4").expected(Workers(2, 1)))


def test_the_demo_takes_what_it_took(tmp_path: Path) -> None:
    """Seconds of SmolLM2's stages on 2 idle cores, at the rate that such cores have (docs/full-size.md)."""
    found = stages("smollm2-135m", tmp_path, Rates(2 * 147e9, 2), "smoke")
    for stage, took in {"calibrate": 45, "sensitivity": 55, "quantize": 34, "reference": 62, "validate": 49}.items():
        assert 1 / 1.5 < found[stage].expected() / took < 1.5, stage


def test_unmeasured_rates_give_no_times(tmp_path: Path) -> None:
    def seconds() -> Iterator[float]:
        for found in stages("mimo-8b", tmp_path, needs.UNMEASURED).values():
            yield found.seconds
            yield found.expected(Workers(4, 2))

    assert all(map(math.isnan, seconds()))
