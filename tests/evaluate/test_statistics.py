"""Intervals against scipy and against simulation; summaries against hand-made arrays; bad arrays refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import EvaluationError
from pipeline.evaluate import statistics as s


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (34, 114), (570, 570), (2100, 3000)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.90, "wilson")
    assert s.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mean_interval_with_one_token_a_window_is_students() -> None:
    values = np.random.default_rng(0).lognormal(size=40)
    found = s.mean_interval(values, np.arange(40))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_correlated_windows_widen_the_interval() -> None:
    """Twelve windows of 250 equal tokens know as much as twelve tokens, not as 3,000."""
    means = np.random.default_rng(1).normal(size=12)
    repeated = s.mean_interval(np.repeat(means, 250), np.repeat(np.arange(12), 250))
    alone = s.mean_interval(means, np.arange(12))
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def _simulated(rng: np.random.Generator, windows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed token divergences, mean 1, that share a factor within each window."""
    index = np.repeat(np.arange(windows), length)
    factor = rng.lognormal(-0.02, 0.2, windows)
    return factor[index] * rng.lognormal(-0.5, 1.0, windows * length), index


@pytest.mark.parametrize("windows", [6, 12, 30])
def test_bounds_of_the_mean_hold_as_often_as_they_claim(windows: int) -> None:
    rng = np.random.default_rng(windows)
    found = [s.mean_interval(*_simulated(rng, windows, 250)) for _ in range(600)]
    assert np.mean([interval.high >= 1 for interval in found]) >= 0.92  # claimed .95; skew costs a little
    assert np.mean([interval.low <= 1 for interval in found]) >= 0.94


def test_detectable_excess_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(3)
    found = [s.mean_interval(*_simulated(rng, 30, 100)) for _ in range(800)]
    excess = np.median([interval.detectable for interval in found])
    assert np.mean([interval.low > 1 - excess for interval in found]) == pytest.approx(0.80, abs=0.06)


def test_bounds_of_the_99th_percentile_hold() -> None:
    rng = np.random.default_rng(4)
    truth = float(np.quantile(_simulated(rng, 2000, 250)[0], 0.99))
    found = [s.quantile_interval(*_simulated(rng, 12, 250), 0.99) for _ in range(300)]
    assert np.mean([interval.high >= truth for interval in found]) >= 0.92
    assert np.mean([interval.low <= truth for interval in found]) >= 0.92


def test_a_share_of_one_is_not_certain() -> None:
    found = s.share_interval(np.ones(50, bool), np.arange(50) // 10)
    assert found.estimate == found.high == 1
    assert 0.85 < found.low < 0.95
    assert found.detectable > 0.01


def test_share_with_independent_tokens_is_close_to_wilson() -> None:
    flags = np.random.default_rng(5).random(5000) < 0.86
    found = s.share_interval(flags, np.arange(5000) // 50)
    assert (found.low, found.high) == pytest.approx(s.wilson(flags.sum(), 5000), abs=0.003)


def test_too_few_tokens_do_not_bound_the_99th_percentile() -> None:
    values = np.random.default_rng(6).lognormal(size=100)
    found = s.quantile_interval(values, np.arange(100) // 10, 0.99)
    assert found.high == math.inf and found.low < found.estimate
    assert found.named("kl_p99")["kl_p99_high"] is None


@pytest.mark.parametrize(("n", "points"), [(164, 4.3), (570, 2.3), (1425, 1.5), (2850, 1.0), (14_042, 0.5)])
def test_detectable_drop_at_five_per_cent_flips(n: int, points: float) -> None:
    assert 100 * s.detectable_drop(n, 0.05) == pytest.approx(points, abs=0.05)


def test_no_flips_among_twenty_prove_little() -> None:
    outcomes = np.arange(20) < 6
    drop = s.paired_drop(outcomes, outcomes)
    assert drop.estimate == 0
    assert drop.low == pytest.approx(-drop.high)
    assert drop.high > 0.10 and drop.detectable > 0.15


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_drop_interval_contains_its_estimate_and_mirrors(pairs: list[tuple[bool, bool]]) -> None:
    correct, reference = np.array(pairs, dtype=bool).T
    drop, gain = s.paired_drop(correct, reference), s.paired_drop(reference, correct)
    assert -1 <= drop.low <= drop.estimate <= drop.high <= 1
    assert (gain.low, gain.high) == pytest.approx((-drop.high, -drop.low))


def _pass_rate(drop: float, n: int, margin: float, flips: float = 0.092, runs: int = 600) -> float:
    """Share of simulated releases whose drop is proved to lie within the margin."""
    rng = np.random.default_rng(round(1e4 * drop) + n)
    lost, won = (flips + drop) / 2, (flips - drop) / 2
    passes = 0
    for _ in range(runs):
        draw = rng.random(n)
        reference = draw < 0.5  # of these, the first `lost` are lost; of the others, the first `won` are won
        correct = np.where(reference, draw >= lost, draw < 0.5 + won)
        passes += s.paired_drop(correct, reference).high <= margin
    return passes / runs


def test_operating_characteristics_of_a_two_point_margin() -> None:
    assert _pass_rate(0.0, 2850, 0.02) >= 0.94
    assert _pass_rate(0.010, 2850, 0.02) == pytest.approx(0.53, abs=0.08)
    assert _pass_rate(0.025, 2850, 0.02) <= 0.02
    for n in (114, 570, 2850):  # a subset cannot pass by being small: losing the whole margin passes one time in twenty
        assert _pass_rate(0.02, n, 0.02, runs=1000) <= 0.07
    assert _pass_rate(0.0, 114, 0.02) <= 0.2


# --- summaries -------------------------------------------------------------------------------------------------------


def _tokens(n: int = 600) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    reference = rng.normal(-3, 1, n)
    return {
        "kl": rng.lognormal(-2, 1, n),
        "top1_equal": rng.random(n) < 0.9,
        "logprob": reference - 0.1,
        "logprob_reference": reference,
        "window_id": np.arange(n) // 50,
    }


def test_divergence_summary() -> None:
    tokens = _tokens()
    found = s.summarise_divergence(**tokens)
    assert (found["tokens"], found["windows"]) == (600, 12)
    assert found["kl_mean"] == tokens["kl"].mean() and found["kl_max"] == tokens["kl"].max()
    assert found["top1"] == tokens["top1_equal"].mean()
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.1))
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["perplexity_reference"])
    assert found["perplexity_ratio_high"] - found["perplexity_ratio_low"] < 1e-9  # paired: a constant loss is certain
    change = np.exp(tokens["logprob"]) - np.exp(tokens["logprob_reference"])
    assert found["probability_change"] == change.mean() < 0
    assert found["probability_change_low"] < change.mean() < found["probability_change_high"] < 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_reference_summary_pairs_with_the_variants() -> None:
    tokens = _tokens()
    lost, clipped = np.linspace(0, 2e-6, 600), np.linspace(0, 4e-8, 600)
    own = s.summarise_reference_divergence(tokens["logprob_reference"], lost, clipped, tokens["window_id"])
    assert own["perplexity"] == s.summarise_divergence(**tokens)["perplexity_reference"]
    assert own["codes_kl_mean"] == pytest.approx(1e-6)
    assert own["clipped_mean"] == pytest.approx(2e-8)
    assert (own["codes_kl_max"], own["clipped_max"]) == (2e-6, 4e-8)
    assert "kl_mean" not in own


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kl", np.full(600, np.nan), "600 of 600 values of kl are NaN"),
        ("kl", np.full(600, -0.1), "negative"),
        ("logprob", np.zeros(599), r"logprob \(599,\)"),
        ("logprob_reference", np.full(600, -np.inf), "values of logprob_reference"),
        ("top1_equal", np.ones(600), "float64, not bool"),
        ("window_id", np.zeros(600, int), r"600 tokens in 1 window\(s\)"),
        ("window_id", np.zeros((600, 1), int), "shape"),
    ],
)
def test_bad_tokens_are_refused(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        s.summarise_divergence(**{**_tokens(), name: value})


def test_rounding_below_zero_is_no_error() -> None:
    tokens = _tokens()
    tokens["kl"][0] = -1e-7
    assert s.summarise_divergence(**tokens)["kl_mean_low"] > 0


def test_accuracy_summaries() -> None:
    reference = np.arange(20) < 10
    variant = np.arange(20) < 8
    mmlu = s.summarise_mmlu(variant, reference, "cloze")
    assert (mmlu["n"], mmlu["accuracy"], mmlu["reference_accuracy"], mmlu["flips"]) == (20, 0.4, 0.5, 0.1)
    assert mmlu["drop_points"] == pytest.approx(10)
    assert (mmlu["mode"], mmlu["chance"]) == ("cloze", 0.25)
    own = s.summarise_humaneval(reference, None, "landlock")
    assert (own["pass_at_1"], own["isolation"]) == (0.5, "landlock")
    assert own["pass_at_1_low"] < 0.5 < own["pass_at_1_high"]
    assert "drop_points" not in own


@pytest.mark.parametrize(
    ("correct", "reference", "message"),
    [
        (np.ones(20, bool), np.ones(19, bool), "do not pair"),
        (np.ones(20), np.ones(20, bool), "float64, not bool"),
        (np.ones(0, bool), None, "list of items"),
    ],
)
def test_bad_items_are_refused(correct: np.ndarray, reference: np.ndarray | None, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        s.summarise_mmlu(correct, reference, "cloze")
