"""Gates: three values on intervals, and no pass without sight."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from pipeline.config import GateLimits, load_gates
from pipeline.errors import EvaluationError
from pipeline.evaluate.gates import GateLine, Verdict, decide, exit_code, overall, worst

PARITY = {"passed": True, "max_relative_error": 3e-6, "limit": 1e-4}
LIMITS = GateLimits(
    kl_mean_max=0.05,
    kl_p99_max=0.4,
    top1_min=0.9,
    perplexity_ratio_max=1.04,
    mmlu_margin_points=2.0,
    humaneval_margin_points=10.0,
)
UNGATED = LIMITS.model_copy(update={"mmlu_margin_points": None, "humaneval_margin_points": None})


def _interval(name: str, low: float, estimate: float, high: float | None, detectable: float) -> dict[str, float | None]:
    return {name: estimate, f"{name}_low": low, f"{name}_high": high, f"{name}_detectable": detectable}


def _accuracy(name: str, n: int, accuracy: float) -> dict[str, Any]:
    return {"n": n, name: accuracy, f"{name}_low": accuracy - 0.02, f"{name}_high": accuracy + 0.02}


def _drop(name: str, reference: float, *figures: float) -> dict[str, float]:
    low, estimate, high, detectable = figures
    return {
        f"reference_{name}": reference,
        "drop_points": estimate,
        "drop_points_low": low,
        "drop_points_high": high,
        "detectable_drop_points": detectable,
    }


REFERENCE: dict[str, Any] = {
    "divergence": {"tokens": 4000, "perplexity": 8.5},
    "mmlu": _accuracy("accuracy", 2850, 0.7) | {"mode": "letter", "chance": 0.25},
    "humaneval": _accuracy("pass_at_1", 164, 0.6) | {"isolation": "landlock"},
}
GOOD: dict[str, Any] = {
    "divergence": {
        "tokens": 4000,
        "kl_max": 2.0,
        "perplexity_reference": 8.5,
        **_interval("kl_mean", 0.028, 0.03, 0.032, 0.003),
        **_interval("kl_p99", 0.25, 0.28, 0.33, 0.05),
        **_interval("top1", 0.92, 0.93, 0.94, 0.015),
        **_interval("perplexity_ratio", 1.01, 1.015, 1.02, 0.008),
    },
    "mmlu": _accuracy("accuracy", 2850, 0.698)
    | {"mode": "letter", "chance": 0.25}
    | _drop("accuracy", 0.7, -0.8, 0.2, 1.2, 1.4),
    "humaneval": _accuracy("pass_at_1", 164, 0.6) | _drop("pass_at_1", 0.6, -4.0, 0.0, 4.0, 6.0),
}


def _with(section: str, **changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(GOOD)
    changed[section] |= changes
    return changed


def _line(verdict: Verdict, name: str) -> GateLine:
    return next(line for line in verdict.lines if line.name == name)


def test_a_good_variant_passes_every_line() -> None:
    verdict = decide(GOOD, REFERENCE, LIMITS, PARITY)
    assert verdict.verdict == "PASS"
    assert {line.name: line.verdict for line in verdict.lines} == dict.fromkeys(
        ["parity", "kl_mean", "kl_p99", "top1", "perplexity_ratio", "mmlu", "humaneval"], "PASS"
    )
    assert _line(verdict, "kl_mean") == GateLine("kl_mean", "PASS", 4000, 0.03, 0.028, 0.032, 0.05, 0.003)


@pytest.mark.parametrize(
    ("name", "figures", "expected"),
    [
        ("kl_mean", (0.040, 0.045, 0.050, 0.01), "PASS"),
        ("kl_mean", (0.040, 0.045, 0.051, 0.01), "INCONCLUSIVE"),
        ("kl_mean", (0.049, 0.055, 0.061, 0.01), "INCONCLUSIVE"),
        ("kl_mean", (0.051, 0.055, 0.061, 0.01), "FAIL"),
        ("kl_p99", (0.30, 0.35, None, 0.1), "INCONCLUSIVE"),
        ("kl_p99", (0.45, 0.50, None, 0.1), "FAIL"),
        ("top1", (0.90, 0.91, 0.92, 0.01), "PASS"),
        ("top1", (0.89, 0.91, 0.93, 0.01), "INCONCLUSIVE"),
        ("top1", (0.87, 0.88, 0.89, 0.01), "FAIL"),
        ("perplexity_ratio", (1.03, 1.05, 1.07, 0.02), "INCONCLUSIVE"),
        ("perplexity_ratio", (1.05, 1.06, 1.07, 0.02), "FAIL"),
    ],
)
def test_divergence_is_judged_on_its_interval(name: str, figures: tuple[Any, ...], expected: str) -> None:
    verdict = decide(_with("divergence", **_interval(name, *figures)), REFERENCE, LIMITS, PARITY)
    assert (_line(verdict, name).verdict, verdict.verdict) == (expected, expected)
    assert bool(_line(verdict, name).note) == (expected != "PASS")


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((-0.5, 0.7, 1.9, 1.7), "PASS"),
        ((-3.0, 0.0, 3.0, 4.0), "INCONCLUSIVE"),  # no drop seen, but a drop beyond the margin would not be seen
        ((-1.5, 0.2, 1.9, 2.3), "PASS"),  # power for the margin is short, and the interval proves it all the same
        ((2.1, 3.0, 3.9, 1.5), "FAIL"),
    ],
)
def test_accuracy_is_judged_on_its_interval(figures: tuple[float, ...], expected: str) -> None:
    verdict = decide(_with("mmlu", **_drop("accuracy", 0.7, *figures)), REFERENCE, LIMITS, PARITY)
    assert _line(verdict, "mmlu").verdict == verdict.verdict == expected


def test_a_reference_at_chance_cannot_pass_its_variants() -> None:
    """Both answer 'A' to everything: no flips, no drop, nothing seen."""
    reference = copy.deepcopy(REFERENCE)
    reference["mmlu"] |= _accuracy("accuracy", 2850, 0.26)
    metrics = _with("mmlu", **_drop("accuracy", 0.26, -0.1, 0.0, 0.1, 0.1))
    line = _line(decide(metrics, reference, LIMITS, PARITY), "mmlu")
    assert line.verdict == "INCONCLUSIVE"
    assert "26.0 %" in line.note and "chance (25 %)" in line.note


def test_losing_everything_within_the_margin_is_blindness_too() -> None:
    reference = copy.deepcopy(REFERENCE)
    reference["humaneval"] |= _accuracy("pass_at_1", 164, 0.05)
    metrics = _with("humaneval", **_drop("pass_at_1", 0.05, -2.0, 0.0, 2.0, 3.0))
    assert _line(decide(metrics, reference, LIMITS, PARITY), "humaneval").verdict == "INCONCLUSIVE"


def test_without_a_margin_accuracy_is_reported_with_reasons() -> None:
    metrics = _with("mmlu", **_drop("accuracy", 0.7, 20.0, 30.0, 40.0, 5.0))
    verdict = decide(metrics, REFERENCE, UNGATED, PARITY)
    assert verdict.verdict == "PASS"
    line = _line(verdict, "mmlu")
    assert line.verdict == "REPORTED"
    assert "gates nothing" in line.note and "5.0 points" in line.note and "2,850 items" in line.note


def _without(metrics: dict[str, Any], section: str, key: str | None = None) -> dict[str, Any]:
    changed = copy.deepcopy(metrics)
    del (changed[section] if key else changed)[key or section]
    return changed


@pytest.mark.parametrize(
    ("metrics", "reference", "line", "message"),
    [
        (_without(GOOD, "divergence"), REFERENCE, "kl_mean", "no divergence section"),
        (_without(GOOD, "divergence", "kl_p99_high"), REFERENCE, "kl_p99", "kl_p99_high is missing"),
        (_with("divergence", kl_mean=math.nan), REFERENCE, "kl_mean", "kl_mean is nan"),
        (_with("divergence", top1=1.2, top1_high=1.3), REFERENCE, "top1", "impossible"),
        (_with("divergence", kl_mean=0.001), REFERENCE, "kl_mean", "impossible"),
        (_with("divergence", tokens=3000), REFERENCE, "kl_mean", "not the same text"),
        (_with("divergence", perplexity_reference=9.0), REFERENCE, "top1", "perplexity 9"),
        (_with("divergence", kl_max=0.0), REFERENCE, "kl_mean", "in the variant's place"),
        (_without(GOOD, "mmlu"), REFERENCE, "mmlu", "variant's metrics have no mmlu"),
        (GOOD, _without(REFERENCE, "mmlu"), "mmlu", "reference's metrics have no mmlu"),
        (_with("mmlu", mode="cloze"), REFERENCE, "mmlu", "mode cloze, reference letter"),
        (_with("mmlu", reference_accuracy=0.5), REFERENCE, "mmlu", "0.5000, but it has 0.7000"),
        (_with("humaneval", drop_points="0"), REFERENCE, "humaneval", "drop_points is missing"),
        (_with("humaneval", n=20), REFERENCE, "humaneval", "not the same items"),
    ],
)
@pytest.mark.parametrize("limits", [LIMITS, UNGATED], ids=["gated", "ungated"])
def test_what_was_not_measured_is_an_error(
    metrics: dict[str, Any], reference: dict[str, Any], line: str, message: str, limits: GateLimits
) -> None:
    verdict = decide(metrics, reference, limits, PARITY)
    assert verdict.verdict == _line(verdict, line).verdict == "ERROR"
    assert message in _line(verdict, line).note


@pytest.mark.parametrize("metrics", [{}, [], None, {"divergence": 3}])
def test_nonsense_is_an_error_not_an_exception(metrics: Any) -> None:
    assert decide(metrics, metrics, LIMITS, PARITY).verdict == "ERROR"


@pytest.mark.parametrize(
    "parity",
    [
        {},
        None,
        PARITY | {"passed": False},
        PARITY | {"passed": "yes"},
        PARITY | {"max_relative_error": 1e-3},
        PARITY | {"max_relative_error": math.nan},
    ],
)
def test_without_parity_nothing_passes(parity: Any) -> None:
    assert decide(GOOD, REFERENCE, LIMITS, parity).verdict == "ERROR"


def test_a_verdict_that_judged_nothing_is_an_error() -> None:
    assert overall([GateLine("parity", "PASS"), GateLine("mmlu", "REPORTED")]) == "ERROR"
    assert overall([]) == worst([]) == "ERROR"


def test_the_worst_line_decides() -> None:
    assert worst(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert worst(["FAIL", "INCONCLUSIVE", "PASS"]) == "FAIL"
    assert worst(["FAIL", "ERROR"]) == "ERROR"
    assert [exit_code(name) for name in ("PASS", "FAIL", "INCONCLUSIVE", "ERROR")] == [0, 1, 2, 3]


def test_verdicts_survive_json() -> None:
    for limits in (LIMITS, UNGATED):
        verdict = decide(_with("divergence", kl_p99_high=None), REFERENCE, limits, PARITY)
        assert Verdict.from_json(json.loads(json.dumps(verdict.to_json(), allow_nan=False))) == verdict


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a verdict file"),
        ({"verdict": "PASS"}, "not a verdict file"),
        ({"verdict": "PASS", "lines": [{"name": "kl_mean", "verdict": "FAIL"}]}, "its own lines give FAIL"),
        ({"verdict": "PASS", "lines": []}, "its own lines give ERROR"),
        ({"verdict": "OK", "lines": [{"name": "kl_mean", "verdict": "OK"}]}, "says 'OK'"),
        ({"verdict": "PASS", "lines": [{"name": "kl_mean", "verdict": "PASS", "n": "4"}]}, "wrong type"),
        ({"verdict": "PASS", "lines": [{"name": "kl_mean", "verdict": "PASS", "odd": 1}]}, "not a verdict file"),
    ],
)
def test_a_damaged_verdict_file_is_refused(data: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Verdict.from_json(data)


def test_configured_limits_loosen_with_compression_and_smallness() -> None:
    classes = load_gates().classes
    for row in classes.values():
        means = [row.variants[name].kl_mean_max for name in ("q4_k_m", "q4", "q3")]
        assert means == sorted(means)
    for variant in ("q4_k_m", "q4", "q3"):
        sizes = [classes[name].variants[variant] for name in ("7b-and-up", "3b-to-4b", "under-1b")]
        assert [row.kl_mean_max for row in sizes] == sorted(row.kl_mean_max for row in sizes)
        assert [row.top1_min for row in sizes] == sorted((row.top1_min for row in sizes), reverse=True)
        assert sizes[-1].mmlu_margin_points is None
