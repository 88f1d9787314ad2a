"""Gates: three values on intervals, and no pass without sight."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from pipeline.config.signing import ReleasedBuild
from pipeline.errors import EvaluationError
from pipeline.judge import sequential
from pipeline.judge.gates import Policy, decide
from pipeline.judge.policy import GateLimits, load_gates
from pipeline.judge.verdicts import GateLine, Verdict, exit_code, overall, worst

PARITY = {"passed": True, "max_relative_error": 3e-6, "limit": 1e-4}
LIMITS = GateLimits(
    kl_mean_max=0.05,
    kl_p99_max=0.4,
    top1_min=0.9,
    perplexity_ratio_max=1.04,
    mmlu_margin_points=2.0,
    humaneval_margin_points=10.0,
)
POLICY = Policy("7b-and-up/q4_k_m", LIMITS, None, 1.25, None)
UNGATED = dataclasses.replace(
    POLICY, limits=LIMITS.model_copy(update={"mmlu_margin_points": None, "humaneval_margin_points": None})
)
RELEASED = ReleasedBuild(release=3, kl_mean=0.025, tokens=4000, perplexity_reference=8.5)


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
    "divergence": {"tokens": 4000, "windows": 32, "perplexity": 8.5},
    "mmlu": _accuracy("accuracy", 2850, 0.7) | {"mode": "letter", "chance": 0.25},
    "humaneval": _accuracy("pass_at_1", 164, 0.6) | {"isolation": "landlock"},
}
GOOD: dict[str, Any] = {
    "divergence": {
        "tokens": 4000,
        "windows": 32,
        "kl_max": 2.0,
        "perplexity_reference": 8.5,
        **_interval("kl_mean", 0.028, 0.03, 0.032, 0.003),
        **_interval("kl_p99", 0.25, 0.28, 0.33, 0.05),
        **_interval("top1", 0.92, 0.93, 0.94, 0.015),
        **_interval("perplexity_ratio", 1.01, 1.015, 1.02, 0.008),
    },
    "mmlu": _accuracy("accuracy", 2850, 0.698)
    | {"mode": "letter", "chance": 0.25}
    | _drop("accuracy", 0.7, -0.7, 100 * 6 / 2850, 1.1, 1.4)
    | {
        "looks": [
            {"n": 570, "lost": 26, "won": 26, "graded": 0.1, "graded_error": 0.96},
            {"n": 1425, "lost": 66, "won": 64, "graded": 0.1, "graded_error": 0.61},
            {"n": 2850, "lost": 134, "won": 128, "graded": 0.1, "graded_error": 0.43},
        ]
    }
    | _interval("graded_drop_points", -0.6, 0.1, 0.9, 1.2),
    "humaneval": _accuracy("pass_at_1", 164, 0.6) | _drop("pass_at_1", 0.6, -4.0, 0.0, 4.0, 6.0),
}


def _with(section: str, **changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(GOOD)
    changed[section] |= changes
    return changed


def _line(verdict: Verdict, name: str) -> GateLine:
    return next(line for line in verdict.lines if line.name == name)


def test_a_good_variant_passes_every_line() -> None:
    verdict = decide(GOOD, REFERENCE, POLICY, PARITY)
    assert verdict.verdict == "PASS"
    assert verdict.row == "7b-and-up/q4_k_m"
    assert {line.name: line.verdict for line in verdict.lines} == dict.fromkeys(
        ["parity", "kl_mean", "kl_p99", "top1", "perplexity_ratio", "mmlu", "humaneval"], "PASS"
    ) | {"kl_ratchet": "REPORTED", "mmlu_accuracy": "REPORTED"}
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
    verdict = decide(_with("divergence", **_interval(name, *figures)), REFERENCE, POLICY, PARITY)
    assert (_line(verdict, name).verdict, verdict.verdict) == (expected, expected)
    assert bool(_line(verdict, name).note) == (expected != "PASS")


@pytest.mark.parametrize(
    ("windows", "says"),
    [
        (31, "it is judged at 32 and 64 windows"),
        (32, "the interval crosses the limit: 4,000 tokens in 32 windows do not decide; the next look is at 64"),
        (48, "in 48 windows do not decide; the next look is at 64"),
        (64, "no look is left"),
    ],
)
def test_divergence_is_judged_at_its_looks_alone(windows: int, says: str) -> None:
    own = REFERENCE | {"divergence": REFERENCE["divergence"] | {"windows": windows}}
    crossing = _with("divergence", windows=windows, **_interval("kl_mean", 0.04, 0.045, 0.051, 0.01))
    line = _line(decide(crossing, own, POLICY, PARITY), "kl_mean")
    assert line.verdict == "INCONCLUSIVE" and says in line.note
    inside = _line(decide(_with("divergence", windows=windows), own, POLICY, PARITY), "kl_mean")
    assert inside.verdict == ("PASS" if windows in (32, 64) else "INCONCLUSIVE")


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((-6.0, 1.0, 9.9, 9.0), "PASS"),
        ((-9.0, 0.0, 10.1, 12.0), "INCONCLUSIVE"),  # no drop seen, but a drop beyond the margin would not be seen
        ((-4.0, 3.0, 9.9, 11.0), "PASS"),  # power for the margin is short, and the interval proves it all the same
        ((10.1, 15.0, 20.0, 9.0), "FAIL"),
    ],
)
def test_humaneval_is_judged_on_its_interval(figures: tuple[float, ...], expected: str) -> None:
    verdict = decide(_with("humaneval", **_drop("pass_at_1", 0.6, *figures)), REFERENCE, POLICY, PARITY)
    assert _line(verdict, "humaneval").verdict == verdict.verdict == expected


def test_a_blind_humaneval_is_reported() -> None:
    """Losing everything within the margin is blindness too."""
    reference = copy.deepcopy(REFERENCE)
    reference["humaneval"] |= _accuracy("pass_at_1", 164, 0.05)
    metrics = _with("humaneval", **_drop("pass_at_1", 0.05, -2.0, 0.0, 2.0, 3.0))
    verdict = decide(metrics, reference, POLICY, PARITY)
    line = _line(verdict, "humaneval")
    assert (line.verdict, verdict.verdict) == ("REPORTED", "PASS")
    assert "gates nothing" in line.note and "5.0 %, of which 3.0 points are sure" in line.note


def _asked(n: int, drop: float, lost: int, won: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of a variant and of its reference after `n` questions: a graded `drop` in points, whose standard error is
    that of 5.3 % of flips; flips of accuracy evenly spread over the looks."""
    looks = [
        {
            "n": look,
            "lost": round(lost * look / n),
            "won": round(won * look / n),
            "graded": drop,
            "graded_error": 23 / math.sqrt(look),
        }
        for look in sequential.LOOKS
        if look <= n
    ]
    own = 100 * (lost - won) / n
    figures = _accuracy("accuracy", n, 0.698) | _drop("accuracy", 0.7, own - 9, own, own + 9, 9.0)
    reference = copy.deepcopy(REFERENCE)
    reference["mmlu"]["n"] = n
    graded = _interval("graded_drop_points", drop - 5, drop, drop + 5, 6.0)
    return _with("mmlu", **figures, **graded, looks=looks), reference


def _judged(n: int, drop: float, lost: int = 0, won: int = 0, policy: Policy = POLICY) -> tuple[GateLine, GateLine]:
    """The lines of the graded drop and of accuracy; the worse decides."""
    metrics, reference = _asked(n, drop, lost, won)
    verdict = decide(metrics, reference, policy, PARITY)
    line, accuracy = _line(verdict, "mmlu"), _line(verdict, "mmlu_accuracy")
    assert verdict.verdict == (accuracy.verdict if accuracy.verdict == "FAIL" else line.verdict)
    return line, accuracy


@pytest.mark.parametrize(
    ("n", "drop", "expected", "words"),
    [
        (570, -1.0, "PASS", "look 1 of 4: n 570, alpha 0.002 of 0.05 spent"),
        (570, 0.0, "INCONCLUSIVE", "570 questions detect a drop of"),
        (570, 6.0, "FAIL", "the whole interval lies beyond the margin; look 1 of 4"),
        (1425, 0.3, "PASS", "look 2 of 4"),
        (1425, 0.6, "INCONCLUSIVE", "the margin is 2; look 2 of 4"),
        (2850, 0.9, "PASS", "look 3 of 4"),
        (2850, 1.5, "INCONCLUSIVE", "next look 14,042"),
        (14_042, 1.4, "PASS", "look 4 of 4: n 14,042, alpha 0.050 of 0.05 spent"),
        (14_042, 2.0, "INCONCLUSIVE", "no questions are left to ask"),
        (14_042, 3.0, "FAIL", "look 4 of 4"),
    ],
)
def test_mmlu_is_judged_at_its_look(n: int, drop: float, expected: str, words: str) -> None:
    line, accuracy = _judged(n, drop)
    assert (line.verdict, line.n, line.limit) == (expected, n, 2.0)
    assert (line.estimate, accuracy.estimate, accuracy.verdict) == (drop, 0.0, "REPORTED")
    assert line.low < drop < line.high and words in line.note  # type: ignore[operator]


@pytest.mark.parametrize(("lost", "won", "expected"), [(160, 100, "REPORTED"), (300, 100, "FAIL")])
def test_accuracy_refuses_what_is_surely_beyond_the_margin(lost: int, won: int, expected: str) -> None:
    line, accuracy = _judged(2850, 0.0, lost, won)
    assert (line.verdict, accuracy.verdict, accuracy.limit, accuracy.n) == ("PASS", expected, 2.0, 2850)
    assert "look 3 of 4" in accuracy.note
    error = 100 * math.sqrt(lost + won) / 2850
    assert accuracy.high - accuracy.low == pytest.approx(2 * sequential.plan()[2].critical * error, rel=0.1)  # type: ignore[operator]


def test_a_look_is_stricter_than_its_sample_alone() -> None:
    """What another look costs: at 1,425 a bound of 2.37 standard errors in place of 1.64."""
    line, _ = _judged(1425, 0.3)
    error = 23 / math.sqrt(1425)
    assert line.high == pytest.approx((0.3 + 2.368 * error) / 0.95, rel=1e-3)
    assert line.low == pytest.approx(0.3 - 2.368 * error, rel=1e-2)
    assert line.detectable == pytest.approx((2.368 + 0.842) * error / 0.95, rel=1e-3)


def test_a_reference_that_was_asked_more_is_paired_at_the_look() -> None:
    metrics, reference = _asked(1425, 0.3, 0, 0)
    own = reference["mmlu"]
    reference["mmlu"] = {**own, **_accuracy("accuracy", 2850, 0.72), "looks": [_accuracy("accuracy", 1425, 0.7)]}
    assert _line(decide(metrics, reference, POLICY, PARITY), "mmlu").verdict == "PASS"
    reference["mmlu"]["looks"] = [_accuracy("accuracy", 1425, 0.71)]
    assert "but it has 0.71" in _line(decide(metrics, reference, POLICY, PARITY), "mmlu").note
    for nothing in ([], None, [3], "looks"):
        reference["mmlu"]["looks"] = nothing
        assert "not the same items" in _line(decide(metrics, reference, POLICY, PARITY), "mmlu").note


def test_questions_between_looks_wait_for_the_next() -> None:
    line, accuracy = _judged(1000, 0.0)
    assert line.n == accuracy.n == 570 and line.note.endswith("(1,000 were asked), next look 1,425")


def test_before_the_first_look_nothing_is_decided() -> None:
    """Not even by a sample that lost nearly everything: that is for divergence to see."""
    for lost in (0, 100):
        line, accuracy = _judged(114, lost, lost)
        assert (line.verdict, accuracy.verdict) == ("INCONCLUSIVE", "REPORTED")
        assert "the first look is at 570" in line.note


def test_more_loss_never_helps() -> None:
    order = ["PASS", "INCONCLUSIVE", "FAIL"]
    for n in (570, 1425, 2850):
        verdicts = [order.index(_judged(n, drop)[0].verdict) for drop in range(-3, 9)]
        assert verdicts == sorted(verdicts) and set(verdicts) == {0, 1, 2}
        refused = [_judged(n, 0.0, lost, 20)[1].verdict == "FAIL" for lost in range(0, 400, 10)]
        assert refused == sorted(refused) and set(refused) == {False, True}


def test_a_wider_margin_never_hurts() -> None:
    order = ["FAIL", "INCONCLUSIVE", "PASS"]
    policies = [_policy(mmlu_margin_points=margin) for margin in (0.2, 1, 2, 3, 5, 8)]
    verdicts = [order.index(_judged(1425, 2.1, policy=policy)[0].verdict) for policy in policies]
    assert verdicts == sorted(verdicts) and set(verdicts) == {0, 1, 2}


def _policy(**limits: Any) -> Policy:
    return dataclasses.replace(POLICY, limits=LIMITS.model_copy(update=limits))


def test_a_reference_at_chance_cannot_pass_its_variants() -> None:
    """Both answer 'A' to everything: no flips, no drop, nothing seen."""
    metrics, reference = _asked(2850, 0.0, 0, 0)
    reference["mmlu"] |= _accuracy("accuracy", 2850, 0.26)
    metrics["mmlu"]["reference_accuracy"] = 0.26
    line = _line(decide(metrics, reference, POLICY, PARITY), "mmlu")
    assert line.verdict == "INCONCLUSIVE"
    assert "26.0 %" in line.note and "chance (25 %)" in line.note


def test_without_a_margin_accuracy_is_reported_with_reasons() -> None:
    figures = _drop("accuracy", 0.7, 20.0, 30.0, 40.0, 5.0) | _interval("graded_drop_points", 21.0, 28.0, 35.0, 5.0)
    verdict = decide(_with("mmlu", **figures), REFERENCE, UNGATED, PARITY)
    assert verdict.verdict == "PASS"
    for name, estimate in (("mmlu", 28.0), ("mmlu_accuracy", 30.0)):
        line = _line(verdict, name)
        assert (line.verdict, line.estimate) == ("REPORTED", estimate)
        assert "nothing" in line.note and "5.0 points" in line.note and "2,850 items" in line.note


# --- ratchet and permission ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kl", "expected"), [(0.025, "PASS"), (0.03125, "PASS"), (0.0313, "FAIL"), (0.01, "PASS")])
def test_the_ratchet_holds_the_last_release(kl: float, expected: str) -> None:
    """1.25 times 0.025 nats; both estimates are of the same tokens, so no interval widens them."""
    metrics = _with("divergence", **_interval("kl_mean", kl - 0.002, kl, kl + 0.002, 0.003))
    verdict = decide(metrics, REFERENCE, dataclasses.replace(POLICY, released=RELEASED), PARITY)
    line = _line(verdict, "kl_ratchet")
    assert (line.verdict, verdict.verdict, line.limit) == (expected, expected, pytest.approx(0.03125))
    assert "release 3 has 0.025 nats on the same tokens" in line.note


@pytest.mark.parametrize("change", [{"tokens": 3000}, {"perplexity_reference": 8.51}])
def test_another_text_or_reference_is_not_comparable(change: dict[str, Any]) -> None:
    released = RELEASED.model_copy(update=change | {"kl_mean": 1e-6})
    verdict = decide(GOOD, REFERENCE, dataclasses.replace(POLICY, released=released), PARITY)
    line = _line(verdict, "kl_ratchet")
    assert (verdict.verdict, line.verdict, line.limit) == ("PASS", "REPORTED", None)
    assert "not comparable" in line.note and "text or reference differ" in line.note


def test_without_an_earlier_release_the_ratchet_says_so() -> None:
    line = _line(decide(GOOD, REFERENCE, POLICY, PARITY), "kl_ratchet")
    assert (line.verdict, line.estimate, line.limit) == ("REPORTED", 0.03, None)
    assert "no earlier release" in line.note


def test_a_row_that_needs_permission_fails_without_it() -> None:
    refused = decide(GOOD, REFERENCE, dataclasses.replace(POLICY, permitted=False), PARITY)
    assert refused.verdict == _line(refused, "permission").verdict == "FAIL"
    assert "opt_in in configs/gates.yaml" in _line(refused, "permission").note
    allowed = decide(GOOD, REFERENCE, dataclasses.replace(POLICY, permitted=True), PARITY)
    assert allowed.verdict == _line(allowed, "permission").verdict == "PASS"


# --- what cannot be judged -------------------------------------------------------------------------------------------


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
        (_without(GOOD, "divergence", "kl_mean"), REFERENCE, "kl_ratchet", "kl_mean is missing"),
        (_without(GOOD, "mmlu", "graded_drop_points"), REFERENCE, "mmlu", "is missing"),
        (_with("mmlu", mode="cloze"), REFERENCE, "mmlu_accuracy", "mode cloze, reference letter"),
    ],
)
@pytest.mark.parametrize("policy", [POLICY, UNGATED], ids=["gated", "ungated"])
def test_what_was_not_measured_is_an_error(
    metrics: dict[str, Any], reference: dict[str, Any], line: str, message: str, policy: Policy
) -> None:
    verdict = decide(metrics, reference, policy, PARITY)
    assert verdict.verdict == _line(verdict, line).verdict == "ERROR"
    assert message in _line(verdict, line).note


@pytest.mark.parametrize(
    ("looks", "line", "message"),
    [
        (None, "mmlu", "no counts at the look of 2,850"),
        ([], "mmlu_accuracy", "no counts at the look of 2,850"),
        ([{"n": 1425, "lost": 1, "won": 1}], "mmlu", "no counts at the look of 2,850"),
        ([{"n": 2850, "lost": 1, "won": 1}], "mmlu", "graded is missing"),
        ([{"n": 2850, "graded": 0.1, "graded_error": math.nan}], "mmlu", "graded_error is nan"),
        ([{"n": 2850, "graded": 0.1, "graded_error": -0.1}], "mmlu", "impossible figures"),
        ([{"n": 2850, "lost": "1", "won": 1}], "mmlu_accuracy", "lost is missing"),
        ([{"n": 2850, "lost": -1, "won": 1}], "mmlu_accuracy", "impossible figures"),
        ([{"n": 2850, "lost": 2000, "won": 1994}], "mmlu_accuracy", "impossible figures"),
        ([{"n": 2850, "lost": 7, "won": 0}], "mmlu_accuracy", "7 lost and 0 won of 2,850 are not a drop of 0.2105"),
        ([7, {"n": [2850]}], "mmlu", "no counts at the look"),
    ],
)
def test_impossible_looks_are_an_error(looks: Any, line: str, message: str) -> None:
    found = _line(decide(_with("mmlu", looks=looks), REFERENCE, POLICY, PARITY), line)
    assert found.verdict == "ERROR" and message in found.note


@pytest.mark.parametrize("metrics", [{}, [], None, {"divergence": 3}])
def test_nonsense_is_an_error_not_an_exception(metrics: Any) -> None:
    assert decide(metrics, metrics, POLICY, PARITY).verdict == "ERROR"


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
    assert decide(GOOD, REFERENCE, POLICY, parity).verdict == "ERROR"


def test_a_verdict_that_judged_nothing_is_an_error() -> None:
    unjudged = [GateLine("permission", "PASS"), GateLine("parity", "PASS"), GateLine("mmlu", "REPORTED")]
    assert overall(unjudged) == "ERROR"
    assert overall([]) == worst([]) == "ERROR"


def test_the_worst_line_decides() -> None:
    assert worst(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert worst(["FAIL", "INCONCLUSIVE", "PASS"]) == "FAIL"
    assert worst(["FAIL", "ERROR"]) == "ERROR"
    assert [exit_code(name) for name in ("PASS", "FAIL", "INCONCLUSIVE", "ERROR")] == [0, 1, 2, 3]


def test_verdicts_survive_json() -> None:
    for policy in (POLICY, UNGATED):
        verdict = decide(_with("divergence", kl_p99_high=None), REFERENCE, policy, PARITY)
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
        ({"verdict": "PASS", "lines": [{"name": "kl_mean", "verdict": "PASS"}], "row": 3}, "names its limits as 3"),
    ],
)
def test_a_damaged_verdict_file_is_refused(data: Any, message: str) -> None:
    if isinstance(data, dict):
        data = {"row": "a/b"} | data
    with pytest.raises(EvaluationError, match=message):
        Verdict.from_json(data)


def test_a_verdict_file_from_before_rows_is_refused() -> None:
    with pytest.raises(EvaluationError, match="not a verdict file"):
        Verdict.from_json({"verdict": "PASS", "lines": [{"name": "kl_mean", "verdict": "PASS"}]})


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
        named = [("mimo-8b", "phi-4"), (), ()] if variant == "q3" else [None] * 3  # the largest models may ship a q3
        assert [row.opt_in for row in sizes] == named


def test_slack_below_a_billion_and_a_half_parameters_is_threefold() -> None:
    large, small = (load_gates().classes[name].variants for name in ("7b-and-up", "under-1b"))
    for variant, row in large.items():
        assert small[variant].kl_mean_max == pytest.approx(3 * row.kl_mean_max)
        assert small[variant].kl_p99_max == pytest.approx(3 * row.kl_p99_max)
        assert small[variant].perplexity_ratio_max - 1 == pytest.approx(3 * (row.perplexity_ratio_max - 1))


def test_only_a_quantile_may_have_no_upper_bound() -> None:
    for section, key, line in (("humaneval", "drop_points", "humaneval"), ("mmlu", "drop_points", "mmlu")):
        verdict = decide(_with(section, **{f"{key}_high": None}), REFERENCE, POLICY, PARITY)
        assert _line(verdict, line).verdict == "ERROR" and f"{key}_high is missing" in _line(verdict, line).note
