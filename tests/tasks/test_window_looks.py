"""How often what lies exactly at its limit passes all looks, and what a good variant passes: seeded simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.tasks import statistics as s

RUNS = 3000
TOKENS = 40  # of a window, where tokens matter
KINDS = np.array([0.5, 0.7, 1.0, 1.8])
Draw = Callable[[np.random.Generator, int], np.ndarray]


def lognormal(sigma: float) -> Draw:
    return lambda rng, n: rng.lognormal(-sigma * sigma / 2, sigma, n)


def outliers(factor: float) -> Draw:
    """One window in 24 diverges so many times as much."""
    whole = 1 + (factor - 1) / 24
    return lambda rng, n: lognormal(0.25)(rng, n) * np.where(rng.random(n) < 1 / 24, factor, 1) / whole


WINDOWS: dict[str, Draw] = {f"σ {sigma}": lognormal(sigma) for sigma in (0.25, 0.5, 0.75, 1.0)}
WINDOWS["outliers"] = outliers(2)


def _passed(draw: Draw, scale: float = 1.0, runs: int = RUNS) -> tuple[np.ndarray, np.ndarray]:
    """Whether a mean of `scale` is bounded by 1 at each look, bool [looks, runs]; so by Student's t, of one kind."""
    rng, by_look, naive = np.random.default_rng(round(100 * scale)), [], []
    for count, alpha in s.WINDOW_LOOKS.items():
        kinds = np.arange(count) % 4
        samples = [scale * KINDS[kinds] * draw(rng, count) for _ in range(runs)]
        ids = np.arange(count)
        by_look.append([s.skewed_interval(one, ids, kinds, alpha, True).high <= 1 for one in samples])
        naive.append([s.mean_interval(one / KINDS[kinds], ids).high <= 1 for one in samples])
    return np.array(by_look), np.array(naive)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_variant_at_its_limit_passes_at_most_one_time_in_eighteen(name: str) -> None:
    """5.5 %, by either look of other windows each; the margin is two standard errors of the simulation."""
    bounded, naive = _passed(WINDOWS[name])
    assert bounded.any(axis=0).mean() <= 0.055 + 2 * np.sqrt(0.055 / RUNS)
    assert naive.any(axis=0).mean() > 0.11  # what two looks of Student's 95 % bound let through


def test_a_variant_at_four_fifths_of_its_limit_passes() -> None:
    """Windows that spread as SmolLM2's do."""
    first, second = _passed(lognormal(0.25), 0.8, 500)[0].mean(axis=1)
    assert first >= 0.80 and second >= 0.97


def test_looks_spend_what_they_may_together() -> None:
    assert sum(s.WINDOW_LOOKS.values()) <= s.ALPHA
    assert list(s.WINDOW_LOOKS) == sorted(s.WINDOW_LOOKS) and min(s.WINDOW_LOOKS) >= 32


def _tokens(rng: np.random.Generator, count: int, sigma: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    windows = np.repeat(np.arange(count), TOKENS)
    kl = rng.lognormal(-0.7, 1.2, len(windows)) * lognormal(sigma)(rng, count)[windows]
    return kl, windows, windows % 4


@pytest.mark.parametrize(("count", "alpha"), s.WINDOW_LOOKS.items())
def test_the_other_gates_at_their_limits_pass_no_more(count: int, alpha: float) -> None:
    """99th percentile, top-1 agreement, change in log-likelihood; windows spread by σ 0.5, 5.5 % at both looks."""
    rng, runs = np.random.default_rng(count), 300
    limit = float(np.quantile(_tokens(rng, 8000)[0], 0.99))
    passed = np.zeros((runs, 3), bool)
    for run in range(runs):
        kl, windows, texts = _tokens(rng, count)
        agreement = np.clip(1 - 0.2 * lognormal(0.5)(rng, count), 0, 1)[windows]
        change = 0.1 * lognormal(0.5)(rng, count)[windows] + rng.normal(0, 0.3, len(kl))
        passed[run] = (
            s.quantile_interval(kl, windows, texts, 0.99, alpha).high <= limit,
            s.share_interval(rng.random(len(kl)) < agreement, windows, texts, alpha).low >= 0.8,
            s.skewed_interval(change, windows, texts, alpha, False).high <= 0.1,
        )
    share = 0.055 * alpha / sum(s.WINDOW_LOOKS.values())
    assert (passed.mean(axis=0) <= share + 2 * np.sqrt(share / runs)).all(), passed.mean(axis=0)


def test_texts_that_differ_do_not_widen_the_interval() -> None:
    """How many windows there are of a text is no chance."""
    rng = np.random.default_rng(1)
    kinds = np.repeat(np.arange(4), 8)
    values = 10.0 * kinds + rng.normal(size=32)
    apart = s.skewed_interval(values, np.arange(32), kinds, 0.05, False)
    together = s.skewed_interval(values, np.arange(32), np.zeros(32, int), 0.05, False)
    assert apart.estimate == together.estimate
    assert apart.high - apart.low < (together.high - together.low) / 5


def test_each_kind_is_reported_beside_the_whole() -> None:
    rng, kinds = np.random.default_rng(2), [("prose", "a")] * 4 + [("code", "b")] * 4
    windows = np.repeat(np.arange(8), 50)
    kl = np.where(windows < 4, 0.1, 0.3) * rng.lognormal(-0.02, 0.2, 400)
    equal, logprob = rng.random(400) < 0.8, np.full(400, -2.0)
    found = s.summarise_divergence(kl, equal, logprob - 0.1 * (windows >= 4), logprob, windows, kinds)
    for kind, own in (("prose", windows < 4), ("code", windows >= 4)):
        assert found[f"{kind}_kl_mean"] == pytest.approx(kl[own].mean())
        assert found[f"{kind}_kl_mean_low"] < kl[own].mean() < found[f"{kind}_kl_mean_high"]
        assert found[f"{kind}_top1"] == equal[own].mean()
    assert (found["prose_perplexity_ratio"], found["code_perplexity_ratio"]) == pytest.approx((1, np.exp(0.1)))
    assert found["kl_mean"] == pytest.approx((found["prose_kl_mean"] + found["code_kl_mean"]) / 2)
    assert not [key for key in s.summarise_divergence(kl, equal, logprob, logprob, windows) if key.startswith("prose")]
