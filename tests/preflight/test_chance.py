"""What suites can decide: simulated through the judge, equal for equal seeds, and refused before hours of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.config.models import load_model, load_pipeline
from pipeline.config.phones import KernelsConfig, ShapesConfig
from pipeline.errors import PipelineError, ResourceError
from pipeline.judge.gates import Policy
from pipeline.judge.policy import gate_row
from pipeline.preflight import chance, footprints, guard
from pipeline.prepack import emulator
from pipeline.tasks.registry import Suite, load_suite


def _policy(variant: str, model: str = "phi-4") -> Policy:
    name, row = gate_row(model, variant)
    return Policy(name, row, None, math.inf, None)


def _changed(suite: str, **parts: Any) -> Suite:
    """A shipped suite with some keys of its parts changed."""
    whole = load_suite(suite)
    return whole.model_copy(update={name: getattr(whole, name).model_copy(update=keys) for name, keys in parts.items()})


@pytest.mark.parametrize(("model", "variant"), [("mimo-8b", "q4"), ("phi-4", "q4_k_m")])
def test_the_release_suite_decides(model: str, variant: str) -> None:
    """Jointly over all gates and looks, four of five variants without a loss pass, though a fifth of what they write
    flips; docs/full-size.md has all models and variants, with more draws."""
    published = load_model(model).published
    found = chance.simulated(_policy(variant, model), load_suite("release"), published, chance.MORE_FLIPS, draws=60)
    assert found.passes >= 0.80


def test_a_suite_of_57_questions_decides_nothing() -> None:
    found = chance.simulated(_policy("q4"), load_suite("smoke"), {}, draws=5)
    assert (found.passes, found.blocked["mmlu"], found.items) == (0.0, 1.0, {"mmlu": 57})


def test_the_most_frequent_obstacle_is_named_first() -> None:
    said = chance.Chance(
        0.5, {"a": 0.1, "b": 0.4, "c": 0.2}, {}
    ).describe()  # as the store's sorted JSON gives them back
    assert "held up by b 40 %, c 20 %, a 10 %" in said


def test_more_questions_decide_more() -> None:
    found = [
        chance.simulated(
            _policy("q4"), _changed("release", mmlu={"most": most}, divergence={"window": 64}), {}, draws=30
        )
        for most in (None, 1425, 2850)
    ]
    held = [one.blocked.get("mmlu", 0.0) for one in found]
    assert held == sorted(held, reverse=True) and held[0] > 0.3 and held[-1] < 0.1
    assert found[0].items == {"mmlu": 570} and 570 < found[2].items["mmlu"] < 2850


def test_equal_arguments_give_equal_figures() -> None:
    suite = load_suite("smoke")
    first, second = (chance.simulated(_policy("q4"), suite, {}, draws=3) for _ in range(2))
    assert first == second


def test_a_variant_at_its_limits_seldom_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chance, "OF_LIMIT", 1.0)
    found = chance.simulated(_policy("q4"), _changed("release", divergence={"window": 128}), {}, draws=60)
    assert found.passes <= 0.055


def test_solutions_flip_as_asked() -> None:
    task = next(task for task, _ in load_suite("release").by_task() if task.name == "humaneval")
    section, own = chance._solutions(task, 20_000, 0.6, 0.2, np.random.default_rng(0))
    assert section["flips"] == pytest.approx(0.2, abs=0.01)
    assert own["pass_at_1"] == pytest.approx(0.6, abs=0.01)
    assert abs(section["drop_points"]) < 1


def test_the_population_has_the_accuracy_and_flips_of_its_name() -> None:
    reference, variant = (chance.right(scores) for scores in chance.population(0.712)[:2])
    assert reference.mean() == pytest.approx(0.712, abs=1e-3)
    assert variant.mean() == pytest.approx(0.712, abs=1e-3)
    assert (reference != variant).mean() == pytest.approx(chance.FLIPS, abs=2e-3)


def test_a_variant_that_its_row_does_not_name_is_said_to_fail() -> None:
    assert "opt_in" in chance.outlook("phi-4-mini", "q3", "release")
    reason = chance.hopeless("phi-4-mini", "q3", "release")
    assert reason and "leave q3 out of `variants`" in reason


@pytest.mark.parametrize(("worse", "said"), [(0.9, ""), (0.8, "; 80 % if 20 % of what is written flips")])
def test_flips_are_spoken_of_where_they_decide(monkeypatch: pytest.MonkeyPatch, worse: float, said: str) -> None:
    passes = {chance.FLIPS: 0.9, chance.MORE_FLIPS: worse}
    monkeypatch.setattr(chance, "chance", lambda *asked: chance.Chance(passes[asked[-1]], {}, {}))
    assert chance.outlook("phi-4", "q4", "release").endswith(f"passes 90 % of the time{said}.")


def test_figures_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path))
    first = chance.chance("smollm2-135m", "q4", "smoke", draws=2)
    monkeypatch.setattr(chance, "simulated", lambda *_: pytest.fail("simulated again"))
    assert chance.chance("smollm2-135m", "q4", "smoke", draws=2) == first


@pytest.mark.parametrize(("stage", "variant"), [("download", ""), ("quantize", "q3")])
def test_hours_that_cannot_end_in_pass_are_refused(monkeypatch: pytest.MonkeyPatch, stage: str, variant: str) -> None:
    """From shapes alone, before the first byte of a checkpoint of 15 GB."""
    monkeypatch.setattr(guard, "load_pipeline", lambda: _run)
    monkeypatch.setattr(guard, "fetch_dataset", lambda *_: pytest.fail("fetched"))
    _run = load_pipeline().model_copy(update={"variants": ("q3",)})
    with pytest.raises(PipelineError, match=r"opt_in.*undecided: true"):
        guard.before(stage, "phi-4-mini", variant)
    _run = _run.model_copy(update={"undecided": True})
    guard._require_decision("phi-4-mini", variant)


def test_a_model_of_unknown_shapes_is_downloaded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_pipeline().model_copy(update={"variants": ("q3",)})
    monkeypatch.setattr(guard, "load_pipeline", lambda: run)
    monkeypatch.setattr(footprints, "load_shapes", lambda: ShapesConfig(models={}))
    guard._require_decision("mimo-8b", "")


def test_kernel_classes_that_cannot_be_made_are_refused_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a phone would map a variant of the run: SmolLM2 is loaded everywhere."""
    run = load_pipeline().model_copy(update={"variants": ("q4",)})
    monkeypatch.setattr(guard, "load_pipeline", lambda: run)
    monkeypatch.setattr(emulator.shutil, "which", lambda _: None)
    guard._require_kernels()
    run = run.model_copy(update={"models": ("mimo-8b",)})
    with pytest.raises(ResourceError, match=r"without apt-get.*leave only `here` in `classes` of configs/kernels.yaml"):
        guard._require_kernels()
    monkeypatch.setattr(guard, "load_kernels", lambda: KernelsConfig(classes=("here",)))
    guard._require_kernels()
