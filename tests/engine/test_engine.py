"""Engines in this process, and what a cluster refuses before it has a worker."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline.config.engine import VARIABLE, EngineConfig, load_engine
from pipeline.engine import Bundles, Engine, Here, Threads, chosen, cluster, narrow
from pipeline.errors import ConfigError, PlanError, ResourceError
from pipeline.machine import CORES, cores


def slow_first(unit: int) -> int:
    time.sleep(0.02 if unit == 0 else 0)
    return unit * unit


@pytest.mark.parametrize(
    "engine", [Here(), Threads(1), Threads(5), Bundles(Here(), 7)], ids=["here", "one", "five", "bundles"]
)
def test_results_come_in_the_order_of_units_on_the_callers_thread(engine: Engine) -> None:
    seen: list[tuple[int, int, bool]] = []
    here = threading.get_ident()
    engine.run(slow_first, range(60), lambda unit, made: seen.append((unit, made, threading.get_ident() == here)))
    assert seen == [(unit, unit * unit, True) for unit in range(60)]


def test_a_bundles_units_are_done_by_threads_without_barriers() -> None:
    seen, bundles = list[int](), list[tuple[int, ...]]()

    class Counting(Here):
        workers = 4

        def run(self, job: Any, units: Any, reduce: Any) -> None:
            super().run(job, units, lambda unit, made: (bundles.append(unit), reduce(unit, made)))

    engine = Bundles(Counting(), 3)
    engine.run(slow_first, [0, 1, None, 2, 3, None], lambda _, made: seen.append(made))
    assert (engine.workers, engine.shared) == (12, False)
    assert (bundles, seen) == ([(0, 1, 2), (3,)], [0, 1, 4, 9])


def test_products_of_a_unit_have_one_thread_until_the_last_has_ended() -> None:
    """A unit that ends must not lift the limit of the others."""

    def threads(unit: int) -> set[int]:
        time.sleep(0.05 * unit)
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    found: list[set[int]] = []
    with threadpool_limits(2, "blas"):
        Threads(3).run(threads, range(4), lambda _, seen: found.append(seen))
        assert threads(0) == {2}
    assert found == [{1}] * 4


def test_units_before_a_barrier_are_finished_before_those_after_it_are_asked_for() -> None:
    done: list[int] = []

    def units() -> Iterator[int | None]:
        yield from range(4)
        yield None
        assert done == [0, 1, 2, 3]
        yield 4

    Threads(3).run(slow_first, units(), lambda unit, _: done.append(unit))
    assert done == [0, 1, 2, 3, 4]


def test_the_first_unit_that_fails_ends_the_run_with_its_own_error() -> None:
    done: list[int] = []

    def job(unit: int) -> None:
        if unit >= 3:
            raise PlanError(f"unit {unit}")

    with pytest.raises(PlanError, match="unit 3"):
        Threads(4).run(job, range(100), lambda unit, _: done.append(unit))
    assert done == [0, 1, 2]


def test_the_environment_chooses_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert (load_engine().engine, type(chosen()), type(chosen(wide=True))) == ("threads", Threads, Here)
    assert isinstance(narrow(), Threads)
    monkeypatch.setenv(VARIABLE, "ray")
    assert load_engine().engine == "ray"
    monkeypatch.setenv(VARIABLE, "rays")
    with pytest.raises(ConfigError, match="PIPELINE_ENGINE: engine: Input should be 'threads' or 'ray'"):
        load_engine()


def test_without_ray_the_error_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-ray.txt -c constraints.txt"):
        cluster.Cluster(EngineConfig(engine="ray"))
    assert Path("requirements-ray.txt").is_file()


def node(address: str) -> dict[str, str]:
    return {"NodeManagerAddress": address}


def test_nodes_that_others_reach_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    cluster._require_closed([node("127.0.0.1"), node("127.0.0.2")])
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.7 is reached from other machines.*RAY_AUTH_MODE=token"):
        cluster._require_closed([node("127.0.0.1"), node("10.0.0.7")])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    cluster._require_closed([node("10.0.0.7")])


def test_a_worker_that_sees_a_signing_key_or_not_the_project_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    enter = cluster._enter.__wrapped__
    for name in (CORES, "NUMBA_NUM_THREADS"):  # as they were, when this test is over
        monkeypatch.setenv(name, "1")
    with pytest.raises(ResourceError, match="has no /nowhere: share that folder, or clone the project"):
        enter(cluster.Terms("/nowhere", None, 1, (), ()))
    monkeypatch.setenv("PIPELINE_ROOT", "/elsewhere")
    with pytest.raises(ResourceError, match="has no /elsewhere"):
        enter(cluster.Terms(str(tmp_path), None, 1, (), ()))
    monkeypatch.delenv("PIPELINE_ROOT")
    monkeypatch.setenv("PIPELINE_SIGNING_KEY_FILE", "key.pem")
    with pytest.raises(ResourceError, match="has PIPELINE_SIGNING_KEY_FILE in its environment"):
        enter(cluster.Terms(str(tmp_path), None, 1, (), ()))
    with cluster._without_secrets():
        enter(cluster.Terms(str(tmp_path), None, 1, (), ()))
    with pytest.raises(ResourceError):
        enter(cluster.Terms(str(tmp_path), None, 1, (), ()))


def test_a_worker_uses_the_cores_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CORES, raising=False)
    all_cores = cores()
    for given, count in (("1", 1), ("1000", all_cores), ("none", all_cores)):
        monkeypatch.setenv(CORES, given)
        assert cores() == count


def test_a_refusal_names_what_differs_first() -> None:
    own = {"kernel class": "x86_64 avx2", "numpy": "2.4.6"}
    assert cluster._difference(own, dict(own)) == ""
    assert cluster._difference(own, own | {"numpy": "1.0"}) == "numpy 1.0 there, 2.4.6 here"
    other = {"kernel class": "aarch64", "torch": "2"}
    assert cluster._difference(own, other) == "kernel class aarch64 there, x86_64 avx2 here, and 2 more differ"
    assert cluster.identity(cluster.Terms("", None, 1, (), ()))["kernel class"] == cluster.kernel_class()
