"""The simulated release: DVC's own graph, and laws of a schedule."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import simulation
from benchmarks.simulation import Graph, Jobs, graph, jobs, measured_seconds, one_by_one, simulate
from pipeline.files import read_json
from pipeline.preflight.machine import stage_needs
from pipeline.preflight.needs import Rates
from pipeline.preflight.rounds import Phase, Workers

RATES = Rates(1e12, 16)
DIAMOND: Graph = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def units(*sizes: float, alone: float = 0.0, link: float = 0.0) -> Phase:
    return Phase(alone, list(sizes), link)


def drawn(seed: int) -> tuple[Jobs, Graph]:
    """Eight stages of up to three rounds, each waiting for some of those before it."""
    chance = random.Random(seed)
    after = {str(place): [str(other) for other in range(place) if chance.random() < 0.3] for place in range(8)}
    work = {
        name: [
            units(*(chance.random() for _ in range(chance.randrange(9))), alone=chance.choice((0.0, chance.random())))
            for _ in range(1 + chance.randrange(3))
        ]
        for name in after
    }
    return work, after


def test_stages_run_side_by_side_where_the_graph_allows_and_units_fill_the_workers() -> None:
    work = {"a": [units(1, 1)], "b": [units(2, 2)], "c": [units(2, 2)], "d": [units(alone=1)]}
    assert simulate(work, DIAMOND, 2).seconds == 1 + 4 + 1
    assert simulate(work, DIAMOND, 4).seconds == 1 + 2 + 1
    assert simulate(work, one_by_one(DIAMOND), 4).seconds == 1 + 2 + 2 + 1


def test_the_head_node_does_one_thing_at_a_time_while_workers_work() -> None:
    work = {"a": [], "b": [units(alone=3)], "c": [units(alone=2), units(4)], "d": []}
    assert simulate(work, DIAMOND, 1).ended["c"] == 3 + 2 + 4
    assert simulate({**work, "b": [units(3)]}, DIAMOND, 1).ended["c"] == 3 + 4


def test_the_critical_path_is_what_the_end_waited_for() -> None:
    work = {"a": [units(1)], "b": [units(1)], "c": [units(5)], "d": [units(1)]}
    found = simulate(work, DIAMOND, 2)
    assert found.critical(DIAMOND) == ["a", "c", "d"]
    assert found.seconds == sum(found.took(name) for name in found.critical(DIAMOND)) == 7


def test_a_round_waits_for_what_moves() -> None:
    assert simulate({"a": [units(1, link=3)]}, {"a": []}, 1).seconds == 3


@pytest.mark.parametrize("seed", range(20))
def test_no_schedule_beats_its_bounds(seed: int) -> None:
    work, after = drawn(seed)
    chains = []
    for workers in (1, 2, 5, 100):
        for order in (after, one_by_one(after)):
            found = simulate(work, order, workers)
            assert found.ended.keys() == work.keys()
            assert all(found.begun[name] >= max((found.ended[one] for one in order[name]), default=0) for name in order)
            assert found.seconds >= sum(sum(phase.sizes) for own in work.values() for phase in own) / workers - 1e-9
            assert found.seconds >= sum(phase.alone for own in work.values() for phase in own) - 1e-9
            longest = dict[str, float]()
            for name in order:
                alone = sum(phase.alone + max(phase.sizes, default=0) for phase in work[name])
                longest[name] = alone + max((longest[one] for one in order[name]), default=0)
            assert found.seconds >= max(longest.values()) - 1e-9
        chains.append(found.seconds)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(chains)), "one by one"


def test_a_release_of_mimo_on_dvc_s_graph() -> None:
    after = graph(["mimo-8b"], ["q4", "q3"])
    names = list(after)
    assert all(names.index(one) < names.index(name) for name in names for one in after[name])
    assert set(after["quantize@mimo-8b-q3"]) == {
        "export@mimo-8b", "calibrate@mimo-8b", "sensitivity@mimo-8b", "learn@mimo-8b-q3",
    }  # fmt: skip
    assert {"bundle@mimo-8b-q4", "bundle@mimo-8b-q3"} <= set(after["tiers@mimo-8b"])
    assert names[-1] == "report"
    found = list(stage_needs("mimo-8b", ("q4", "q3"), 128 * 10**9, RATES, "release"))
    rows = list(simulation.release("mimo-8b", after, found, 16, measured_seconds(), 1.25e9))
    for key in ("one_by_one_seconds", "side_by_side_seconds"):
        spent = [row[key] for row in rows]
        assert spent == sorted(spent, reverse=True)
        assert spent[0] > 10 * spent[-1]
    assert rows[0]["one_by_one_seconds"] == pytest.approx(rows[0]["side_by_side_seconds"]), "one machine"
    result = {
        "rate": 1e12 / 16,
        "given": True,
        "network": 1.25e9,
        "variants": ["q4", "q3"],
        "rows": rows,
        "compared": [],
    }
    assert "mimo-8b, 64 × 16 cores" in simulation.hours(result)
    assert simulation.render(result)[:8] == b"\x89PNG\r\n\x1a\n"


def test_one_worker_is_this_machine() -> None:
    after: Graph = {"validate@m-q4": []}
    assert [*jobs(after, "m", [], {"validate": 7}, Workers(1, 2)).values()] == [[Phase(7, [], 0)]]


def test_what_was_measured_is_within_reach_of_the_model() -> None:
    """Stages at full width on 2 cores: CPU seconds of both, where neither start nor short text rules."""
    rows = simulation.compared(65e9)
    long = [row for row in rows if row["model_seconds"] > 100 and "short" not in row["what"]]
    assert long
    for row in long:
        assert 2 / 3 < row["cpu_seconds"] / 2 / row["model_seconds"] < 1.5, row


def test_the_page_shows_the_results() -> None:
    page = Path("docs/scale.md").read_text(encoding="utf-8")
    for text in simulation.tables(read_json(simulation.RESULT)).values():
        assert text in page
