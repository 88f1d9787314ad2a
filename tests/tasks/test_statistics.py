"""Intervals against scipy and against simulation; summaries against hand-made arrays; bad arrays refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats

from pipeline.errors import EvaluationError
from pipeline.tasks import statistics as s


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
    found = [s.quantile_interval(*_simulated(rng, 12, 250), np.zeros(3000, int), 0.99, s.ALPHA) for _ in range(300)]
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
    found = s.quantile_interval(values, np.arange(100) // 10, np.zeros(100, int), 0.99, s.ALPHA)
    assert found.high == math.inf and found.low < found.estimate
    assert found.named("kl_p99")["kl_p99_high"] is None


@pytest.mark.parametrize(("n", "points"), [(164, 4.3), (570, 2.3), (1425, 1.5), (2850, 1.0), (14_042, 0.5)])
def test_detectable_drop_at_five_per_cent_flips(n: int, points: float) -> None:
    assert 100 * s.detectable_drop(n, 0.05) == pytest.approx(points, abs=0.05)


def test_no_flips_among_twenty_prove_little() -> None:
    drop = s.paired_interval(20, 0, 0)
    assert drop.estimate == 0
    assert drop.low == pytest.approx(-drop.high)
    assert drop.high > 0.10 and drop.detectable > 0.15


def test_paired_interval_is_tangos() -> None:
    """R, PropCIs::scoreci.mp(25, 28, 618, 0.90)."""
    drop = s.paired_interval(618, 28, 25)
    assert (round(drop.low, 4), round(drop.high, 4)) == (-0.0148, 0.0247)


@pytest.mark.parametrize(("n", "lost", "won"), [(160, 40, 20), (570, 12, 0), (57, 3, 9)])
@pytest.mark.parametrize("drop", [-0.08, 0.0, 0.02, 0.11])
def test_the_score_has_the_likeliest_standard_error(n: int, lost: int, won: int, drop: float) -> None:
    """The share of wins that makes the counts likeliest, found by search instead of by formula."""

    def surprise(share_won: float) -> float:
        shares = share_won + drop, share_won, 1 - 2 * share_won - drop
        return -sum(
            special.xlogy(count, share) for count, share in zip((lost, won, n - lost - won), shares, strict=True)
        )

    bounds = max(0.0, -drop) + 1e-12, (1 - drop) / 2 - 1e-12
    share = optimize.minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    error = math.sqrt((2 * share + drop - drop**2) / n)
    assert s.drop_score(drop, n, lost, won) == pytest.approx(((lost - won) / n - drop) / error, rel=1e-4)


COUNTS = st.integers(1, 400).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n)).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(0, pair[0] - pair[1]))
    )
)


@given(COUNTS, st.sampled_from([1.6449, 2.948]))
def test_drop_interval_contains_its_estimate_mirrors_and_inverts_the_score(
    counts: tuple[int, int, int], z: float
) -> None:
    n, lost, won = counts
    drop, gain = s.paired_interval(n, lost, won, z), s.paired_interval(n, won, lost, z)
    assert -1 <= drop.low <= drop.estimate <= drop.high <= 1
    assert (gain.low, gain.high) == pytest.approx((-drop.high, -drop.low), abs=1e-9)
    for margin in (0.02, 0.1):  # a bound is inside the margin just when the score says so
        if abs(drop.high - margin) > 1e-9:
            assert (drop.high <= margin) == (s.drop_score(margin, n, lost, won) <= -z)


@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.tuples(st.integers(0, n), st.integers(0, n)), min_size=1)))
def test_drop_of_shares_contains_its_estimate(counts: list[tuple[int, int]]) -> None:
    correct, reference = np.array(counts).T / max(1, np.max(counts))
    drop = s.paired_interval(*s.flips(correct, reference))
    assert -1 <= drop.low <= drop.estimate + 1e-12 and drop.estimate <= drop.high + 1e-12 <= 1 + 1e-9


def test_intervals_of_shares_cover_with_room_to_spare() -> None:
    """20 samples of each of 40 problems of unequal difficulty: the 90 % interval is no narrower than it should be."""
    rng, covered, runs = np.random.default_rng(3), 0, 400
    for _ in range(runs):
        skill = rng.beta(0.5, 0.8, 40)
        passed = rng.random((40, 20)) < skill[:, None]
        scores = s.summarise_humaneval(passed, None, (1,))
        covered += scores["pass_at_1_low"] <= 0.5 / 1.3 <= scores["pass_at_1_high"]
    assert covered / runs >= 0.90


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 5), (10, 3), (200, 100)])
def test_pass_at_k_is_the_chance_of_a_hit_among_k_drawn(n: int, k: int) -> None:
    passed = np.arange(n) < np.array([[0], [1], [n // 2], [n]])
    expected = [1 - stats.hypergeom(n, c, k).pmf(0) for c in (0, 1, n // 2, n)]
    assert s.pass_at_k(passed, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    rng, p, k = np.random.default_rng(1), 0.2, 5
    passed = rng.random((20_000, 10)) < p
    assert s.pass_at_k(passed, k).mean() == pytest.approx(1 - (1 - p) ** k, abs=0.005)
    plug_in = 1 - (1 - passed.mean(axis=1)) ** k
    assert abs(plug_in.mean() - (1 - (1 - p) ** k)) > 0.02  # what the paper warns of


@pytest.mark.parametrize("z", [1.6449, 2.948])
def test_more_loss_never_helps(z: float) -> None:
    """Exhaustively, for 24 items: no item that is lost instead of kept, or kept instead of won, lowers a bound."""
    n = 24
    found = {(lost, won): s.paired_interval(n, lost, won, z) for lost in range(n + 1) for won in range(n + 1 - lost)}
    for (lost, won), better in found.items():
        for worse in (found.get(counts) for counts in ((lost + 1, won), (lost + 1, won - 1), (lost, won - 1))):
            assert worse is None or (worse.low >= better.low - 1e-9 and worse.high >= better.high - 1e-9)


def test_operating_characteristics_of_a_single_look() -> None:
    """Margin 2 points, 9.2 % of flips; a subset cannot pass by being small."""
    rng, flips, runs = np.random.default_rng(0), 0.092, 50_000

    def passing(drop: float, n: int) -> float:
        lost, won, _ = rng.multinomial(n, [(flips + drop) / 2, (flips - drop) / 2, 1 - flips], size=runs).T
        return float(np.mean(s.drop_score(0.02, n, lost, won) <= -1.6449))

    assert passing(0.0, 2850) >= 0.96
    assert passing(0.010, 2850) == pytest.approx(0.53, abs=0.03)
    assert passing(0.025, 2850) <= 0.01
    for n in (114, 570, 2850):
        assert passing(0.02, n) <= 0.055
    assert passing(0.0, 114) <= 0.2


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


def _answers(correct: np.ndarray) -> s.MmluAnswers:
    """Answers of equal certainty, right where `correct`: the first of four is."""
    return s.MmluAnswers(correct, np.eye(4)[np.where(correct, 0, 1)], np.zeros(len(correct), np.int64))


def _questions(rng: np.random.Generator, n: int) -> np.ndarray:
    """Scores of a model with about 71 % right that is as sure as it is right; the first answer is correct."""
    scores = rng.normal(size=(n, 4))
    scores[:, 0] += 1.7 + 1.6 * rng.normal(size=n)
    return 1.9 * scores


def _as_answers(scores: np.ndarray) -> s.MmluAnswers:
    return s.MmluAnswers(scores.argmax(axis=1) == 0, scores, np.zeros(len(scores), np.int64))


def test_accuracy_summaries() -> None:
    reference = np.arange(20) < 10
    variant = np.arange(20) < 8
    mmlu = s.summarise_mmlu(_answers(variant), _answers(reference), "cloze")
    assert (mmlu["n"], mmlu["accuracy"], mmlu["reference_accuracy"], mmlu["flips"]) == (20, 0.4, 0.5, 0.1)
    assert mmlu["drop_points"] == pytest.approx(10)
    assert (mmlu["mode"], mmlu["chance"], mmlu["looks"]) == ("cloze", 0.25, [])
    own = s.summarise_humaneval(reference[:, None], None, (1,))
    assert (own["n"], own["pass_at_1"], own["samples"]) == (20, 0.5, 1)
    assert own["pass_at_1_low"] < 0.5 < own["pass_at_1_high"]
    assert "drop_points" not in own
    alone = s.summarise_mmlu(_answers(reference), None, "cloze")
    assert not {"drop_points", "graded_drop_points"} & set(alone)
    assert alone["looks"] == []
    asked = s.summarise_mmlu(_answers(np.arange(600) < 300), None, "cloze")
    assert [(look["n"], look["accuracy"]) for look in asked["looks"]] == [(570, 300 / 570)]


def test_samples_give_shares_and_pass_at_k() -> None:
    reference = np.zeros((4, 4), bool)
    reference[0], reference[1, :2] = True, True
    variant = reference.copy()
    variant[0, 0] = False
    found = s.summarise_humaneval(variant, reference, (1, 2, 4))
    assert (found["n"], found["samples"]) == (4, 4)
    assert found["pass_at_1"] == pytest.approx((0.75 + 0.5) / 4)
    assert found["reference_pass_at_1"] == pytest.approx((1 + 0.5) / 4)
    assert found["flips"] == pytest.approx(0.25 / 4)
    assert found["drop_points"] == pytest.approx(25 / 4)
    assert found["pass_at_2"] == pytest.approx((1 + 1 - 1 / 6) / 4)
    assert (found["pass_at_4"], found["pass_at_4_low"] < 0.5 < found["pass_at_4_high"]) == (0.5, True)


def test_one_sample_each_gives_what_yes_and_no_give() -> None:
    rng = np.random.default_rng(5)
    variant, reference = rng.random((2, 60)) < 0.6
    found = s.summarise_humaneval(variant[:, None], reference[:, None], (1,))
    mmlu = s.summarise_mmlu(_answers(variant), _answers(reference), "letter")
    for key in ("flips", "drop_points", "drop_points_low", "drop_points_high", "detectable_drop_points"):
        assert found[key] == pytest.approx(mmlu[key])
    assert found["pass_at_1_low"] == pytest.approx(mmlu["accuracy_low"])


def test_agreement_counts_tokens_and_problems_are_its_units() -> None:
    problem = np.repeat(np.arange(10), 30)
    logprob, equal = np.full(300, -0.5), problem != 3  # one problem goes wrong as a whole
    found = s.summarise_agreement(logprob - 0.2 * (problem == 3), problem, logprob, equal)
    assert (found["solutions"], found["tokens"], found["top1"]) == (10, 300, 0.9)
    assert found["logprob"] == pytest.approx(-0.52)
    assert found["logprob_drop"] == pytest.approx(0.02)
    assert found["top1_low"] < 0.75 and found["top1_high"] < 1  # thirty misses are one event
    assert found["logprob_drop_low"] < 0 < found["logprob_drop_high"]
    assert set(s.summarise_agreement(logprob, problem)) == {"solutions", "tokens", "logprob"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": np.zeros(300, int)}, r"300 tokens in 1 problem\(s\)"),
        ({"logprob": np.full(300, np.nan)}, "300 of 300 values of logprob are NaN"),
        ({"top1_equal": np.ones(299, bool)}, r"top1_equal \(299,\)"),
    ],
)
def test_bad_agreement_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    good = {"logprob": np.zeros(300), "problem": np.arange(300) % 3, "logprob_reference": np.zeros(300)}
    with pytest.raises(EvaluationError, match=message):
        s.summarise_agreement(**(good | {"top1_equal": np.ones(300, bool)} | change))


@pytest.mark.parametrize(
    ("passed", "reference", "message"),
    [
        (np.ones(20, bool), None, r"\[problems, samples\] is needed"),
        (np.ones((20, 1)), None, "float64, not bool"),
        (np.ones((20, 2), bool), np.ones((20, 1), bool), "do not pair"),
        (np.ones((0, 1), bool), None, "list of items"),
    ],
)
def test_bad_solutions_are_refused(passed: np.ndarray, reference: np.ndarray | None, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        s.summarise_humaneval(passed, reference, (1,))


def test_looks_count_the_first_questions() -> None:
    reference, variant = np.ones(3000, bool), np.ones(3000, bool)
    variant[[0, 569, 570, 2849, 2850]] = False
    reference[1425] = False
    found = s.summarise_mmlu(_answers(variant), _answers(reference), "letter")
    assert [(look["n"], look["lost"], look["won"]) for look in found["looks"]] == [
        (570, 2, 0),
        (1425, 3, 0),
        (2850, 4, 1),
    ]
    # Where all answers are equally sure, the graded change is that of accuracy less what both leave to other answers.
    assert found["looks"][0]["graded"] == pytest.approx(100 * 2 / 570 * (0.95 - 0.05 / 3))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_graded_answers_do_not_depend_on_how_sure_a_model_is() -> None:
    scores = _questions(np.random.default_rng(3), 500)
    expected = s.graded(_as_answers(scores))
    assert s.graded(_as_answers(0.2 * scores + 7)) == pytest.approx(expected, abs=1e-6)
    assert special.softmax(scores, axis=1)[:, 0].mean() < special.softmax(2 * scores, axis=1)[:, 0].mean() - 0.02
    assert expected.mean() == pytest.approx((scores.argmax(axis=1) == 0).mean(), abs=0.02)


def test_scores_that_are_all_equal_are_a_guess() -> None:
    flat = s.MmluAnswers(np.zeros(20, bool), np.zeros((20, 4)), np.zeros(20, np.int64))
    assert s.graded(flat) == pytest.approx(0.25)


@pytest.mark.parametrize("sharper", [0.85, 1.0, 1.15])
def test_graded_drops_show_what_accuracy_lost(sharper: float) -> None:
    """A loss of about 2 points by noise and by knowledge, in flatter and sharper models."""
    rng = np.random.default_rng(4)
    scores = _questions(rng, 200_000)
    variant = sharper * scores + 0.56 * rng.standard_t(4, size=scores.shape)
    variant[:, 0] += 0.05
    reference, found = _as_answers(scores), _as_answers(variant)
    lost = 100 * (reference.correct.mean() - found.correct.mean())
    change, error = s.graded_change(found, reference)
    assert lost > 0.5
    assert s.SHOWN - 0.02 <= change / lost <= 1.06
    accuracy = 100 * np.std(reference.correct.astype(float) - found.correct) / np.sqrt(len(scores))
    assert error < 0.85 * accuracy
    interval = s.graded_interval(change, error)
    assert interval.low == pytest.approx(change - s.Z * error)
    assert interval.high == pytest.approx((change + s.Z * error) / s.SHOWN)
    gain = s.graded_interval(-change, error)
    assert gain.high == pytest.approx(-change + s.Z * error)


@pytest.mark.parametrize("scores", [np.full((20, 4), np.nan), np.zeros((19, 4)), np.zeros((20, 3))])
def test_bad_scores_are_refused(scores: np.ndarray) -> None:
    good = _answers(np.ones(20, bool))
    with pytest.raises(EvaluationError, match="MMLU: scores of shape"):
        s.summarise_mmlu(s.MmluAnswers(good.correct, scores, good.answers), good, "cloze")


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
        s.summarise_mmlu(_answers(correct), reference if reference is None else _answers(reference), "cloze")
