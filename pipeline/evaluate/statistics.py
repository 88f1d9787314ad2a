"""Statistics of one variant's evaluation: arrays of measurements in, nested dicts of plain numbers out.

Every interval is two-sided at 90 %, so that each of its ends is a one-sided 95 % bound: the bound a gate uses.
Three decisions:

- Tokens of one window share their context, so they are not independent. Means over tokens take their standard error
  from window totals (the linearised ratio estimator; Cochran, Sampling Techniques, 3rd ed., chapter 11) with Student's
  t on windows − 1 degrees of freedom. Shares use Wilson's interval on the effective number of tokens, n divided by the
  design effect, because Wilson's interval stays honest at 0 % and 100 %. The 99th percentile inverts that
  interval (Woodruff, JASA 47, 1952).
- An accuracy drop is paired by item. Bonett and Price's interval (J. Educ. Behav. Stat. 37, 2012) adds one to each
  kind of flip, so that twenty items without a flip do not look like proof.
- Whatever cannot be detected is a number too: each summary carries the effect that its sample size would reveal with
  80 % power in a one-sided test at 5 %. For divergence that is the excess over the limit (in the metric's own unit),
  for accuracy the drop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from pipeline.errors import EvaluationError

ALPHA = 0.05  # one-sided
POWER = 0.80
MMLU_CHANCE = 0.25  # four answers
_KL_ROUNDING = 1e-4  # nats; float32 softmax can make a KL divergence of equal distributions slightly negative

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """An estimate, its two one-sided 95 % bounds, and the effect detectable at 80 % power; all in one unit.

    `high` is infinite where the sample is too small to bound the quantity from above.
    """

    estimate: float
    low: float
    high: float
    detectable: float

    def named(self, name: str) -> dict[str, float | None]:
        """The numbers as `name`, `name_low`, `name_high` (None for infinity, unknown to JSON), `name_detectable`."""
        return {
            name: self.estimate,
            f"{name}_low": self.low,
            f"{name}_high": self.high if math.isfinite(self.high) else None,
            f"{name}_detectable": self.detectable,
        }


# --- intervals -------------------------------------------------------------------------------------------------------


def wilson(successes: float, n: float, z: float | None = None) -> tuple[float, float]:
    """Wilson's score interval for a share; both arguments may be fractional (effective numbers).

    `z` is the quantile of the one-sided bound, the normal one unless given.
    """
    z = float(ndtri(1 - ALPHA)) if z is None else z
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _window_standard_error(values: Floats, windows: Ints) -> float:
    """Standard error of the mean over all tokens, with windows as the independent units."""
    _, index = np.unique(windows, return_inverse=True)
    totals = np.bincount(index, weights=values - values.mean())
    count = len(totals)
    return math.sqrt(count / (count - 1) * float(totals @ totals)) / len(values)


def _t_quantiles(windows: Ints) -> tuple[float, float]:
    """Student's t at 1 − ALPHA and at POWER, on windows − 1 degrees of freedom."""
    freedom = len(np.unique(windows)) - 1
    return float(stdtrit(freedom, 1 - ALPHA)), float(stdtrit(freedom, POWER))


def mean_interval(values: Floats, windows: Ints) -> Interval:
    """Mean over tokens, with windows as the independent units.

    Args:
        values: [tokens] float64.
        windows: [tokens] integer, the window of each token; at least two different ones.
    """
    t_alpha, t_power = _t_quantiles(windows)
    error = _window_standard_error(values, windows)
    mean = float(values.mean())
    return Interval(mean, mean - t_alpha * error, mean + t_alpha * error, (t_alpha + t_power) * error)


def _effective_tokens(flags: Bools, windows: Ints) -> float:
    """Number of independent tokens that would know the share as well: n over the design effect, at most n."""
    share = float(flags.mean())
    independent = share * (1 - share) / len(flags)  # variance of the share if tokens were independent
    if independent == 0:
        return float(len(flags))
    return len(flags) / max(1.0, _window_standard_error(flags.astype(np.float64), windows) ** 2 / independent)


def share_interval(flags: Bools, windows: Ints) -> Interval:
    """Share of true `flags` [tokens] bool, with windows [tokens] as the independent units."""
    t_alpha, t_power = _t_quantiles(windows)
    share, effective = float(flags.mean()), _effective_tokens(flags, windows)
    low, high = wilson(share * effective, effective, t_alpha)
    centre = (share * effective + t_alpha**2 / 2) / (effective + t_alpha**2)  # never 0 or 1, so never a zero error
    error = math.sqrt(centre * (1 - centre) / effective)
    return Interval(share, low, high, (t_alpha + t_power) * error)


def quantile_interval(values: Floats, windows: Ints, level: float) -> Interval:
    """A high quantile of `values` [tokens] float64, with windows [tokens] as the independent units.

    The upper bound is infinite when fewer than one token would lie above it. `detectable` scales the distance to the
    lower bound, the side on which an excess is proved.
    """
    t_alpha, t_power = _t_quantiles(windows)
    estimate = float(np.quantile(values, level))
    below = values <= estimate
    share, effective = float(below.mean()), _effective_tokens(below, windows)
    level_low, level_high = wilson(share * effective, effective, t_alpha)
    low = float(np.quantile(values, level_low, method="lower"))
    bounded = level_high < 1 - 1 / len(values)
    high = float(np.quantile(values, level_high, method="higher")) if bounded else math.inf
    return Interval(estimate, low, high, (estimate - low) * (t_alpha + t_power) / t_alpha)


# --- paired accuracy -------------------------------------------------------------------------------------------------


def detectable_drop(n: int, d: float) -> float:
    """Smallest true drop (a share) that `n` paired items reveal with 80 % power in a one-sided test at 5 %.

    Args:
        n: items.
        d: discordance, the share of items whose correctness flips.
    """
    return float(ndtri(1 - ALPHA) + ndtri(POWER)) * math.sqrt(d / n)


def paired_drop(correct: Bools, reference: Bools) -> Interval:
    """Drop in accuracy from the reference to the variant, as a share; positive is a loss.

    Args:
        correct, reference: [n] bool, paired by index.
    """
    n = len(correct)
    lost = (int(np.sum(reference & ~correct)) + 1) / (n + 2)
    won = (int(np.sum(~reference & correct)) + 1) / (n + 2)
    half = float(ndtri(1 - ALPHA)) * math.sqrt((lost + won - (lost - won) ** 2) / (n + 2))
    estimate = float(reference.mean() - correct.mean())
    low, high = max(-1.0, lost - won - half), min(1.0, lost - won + half)
    return Interval(estimate, low, high, detectable_drop(n, lost + won))


# --- summaries: the metrics files ------------------------------------------------------------------------------------


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise EvaluationError(f"{what}. The measurement is unusable; nothing was written. Evaluate the artifact again.")


def _check_tokens(windows: Ints, **arrays: NDArray[Any]) -> None:
    tokens = len(windows)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    _require(
        all(array.shape == (tokens,) for array in arrays.values()) and windows.ndim == 1,
        f"divergence: one value per token is needed, but window_id has shape {windows.shape} and the others {shapes}",
    )
    count = len(np.unique(windows))
    _require(count >= 2, f"divergence: {tokens} tokens in {count} window(s); an interval needs at least 2 windows")
    for name, array in arrays.items():
        bad = int(np.sum(~np.isfinite(array)))
        _require(bad == 0, f"divergence: {bad} of {tokens} values of {name} are NaN or infinite")


def summarise_reference_divergence(
    logprob: Floats, codes_kl: Floats, clipped: Floats, window_id: Ints
) -> dict[str, Any]:
    """The reference's own `divergence` metrics: tokens, windows, perplexity, and what its kept log-probabilities lose.

    Args:
        logprob: [tokens] float64, natural log-probability of the true next token.
        codes_kl: [tokens] float64, KL divergence of the kept distribution from the model's own, nats.
        clipped: [tokens] float64, probability of the tokens whose log-probability was clipped.
        window_id: [tokens] integer.

    Raises:
        EvaluationError: shapes differ, a value is not finite, or there are fewer than two windows.
    """
    _check_tokens(window_id, logprob=logprob, codes_kl=codes_kl, clipped=clipped)
    return {
        "tokens": len(logprob),
        "windows": len(np.unique(window_id)),
        "perplexity": math.exp(-float(logprob.mean())),
        "codes_kl_mean": float(codes_kl.mean()),
        "codes_kl_max": float(codes_kl.max()),
        "clipped_mean": float(clipped.mean()),
        "clipped_max": float(clipped.max()),
    }


def summarise_divergence(
    kl: Floats, top1_equal: Bools, logprob: Floats, logprob_reference: Floats, window_id: Ints
) -> dict[str, Any]:
    """The `divergence` metrics of a variant, paired with the reference by token.

    `probability_change` is the mean change in the true token's probability: unlike KL it says which way.

    Args:
        kl: [tokens] float64, KL divergence of the variant from the reference, nats.
        top1_equal: [tokens] bool, whether both name the same most likely token.
        logprob, logprob_reference: [tokens] float64, natural log-probability of the true next token.
        window_id: [tokens] integer, the window of each token.

    Raises:
        EvaluationError: shapes differ, a value is not finite, a KL is negative beyond rounding, `top1_equal` is not
            bool, or there are fewer than two windows.
    """
    _check_tokens(window_id, kl=kl, top1_equal=top1_equal, logprob=logprob, logprob_reference=logprob_reference)
    _require(top1_equal.dtype == np.bool_, f"divergence: top1_equal is {top1_equal.dtype}, not bool")
    _require(float(kl.min()) >= -_KL_ROUNDING, f"divergence: a KL of {kl.min():.3g} nats is negative: not a KL")
    kl = np.maximum(kl, 0)
    log_ratio = mean_interval(logprob_reference - logprob, window_id)
    ratio = Interval(
        math.exp(log_ratio.estimate),
        math.exp(log_ratio.low),
        math.exp(log_ratio.high),
        math.exp(log_ratio.estimate) * math.expm1(log_ratio.detectable),
    )
    return {
        "tokens": len(kl),
        "windows": len(np.unique(window_id)),
        **mean_interval(kl, window_id).named("kl_mean"),
        **quantile_interval(kl, window_id, 0.99).named("kl_p99"),
        "kl_max": float(kl.max()),
        **share_interval(top1_equal, window_id).named("top1"),
        "perplexity": math.exp(-float(logprob.mean())),
        "perplexity_reference": math.exp(-float(logprob_reference.mean())),
        **ratio.named("perplexity_ratio"),
        **mean_interval(np.exp(logprob) - np.exp(logprob_reference), window_id).named("probability_change"),
    }


def _accuracy(task: str, name: str, correct: Bools, reference: Bools | None) -> dict[str, Any]:
    """Accuracy under the key `name` and, for a variant, the paired drop from the reference in percentage points."""
    _require(correct.ndim == 1 and len(correct) > 0, f"{task}: a list of items is needed, got shape {correct.shape}")
    _require(correct.dtype == np.bool_, f"{task}: outcomes are {correct.dtype}, not bool")
    low, high = wilson(float(correct.sum()), len(correct))
    own = {"n": len(correct), name: float(correct.mean()), f"{name}_low": low, f"{name}_high": high}
    if reference is None:
        return own
    _require(
        reference.shape == correct.shape and reference.dtype == np.bool_,
        f"{task}: {len(correct)} items of the variant do not pair with the reference's {reference.shape} "
        f"{reference.dtype}",
    )
    drop = paired_drop(correct, reference)
    return own | {
        f"reference_{name}": float(reference.mean()),
        "flips": float(np.mean(correct != reference)),
        "drop_points": 100 * drop.estimate,
        "drop_points_low": 100 * drop.low,
        "drop_points_high": 100 * drop.high,
        "detectable_drop_points": 100 * drop.detectable,
    }


def summarise_mmlu(correct: Bools, reference: Bools | None, mode: str) -> dict[str, Any]:
    """The `mmlu` metrics: accuracy, and the paired drop unless `reference` is None (the reference's own row).

    Args:
        correct: [n] bool.
        reference: [n] bool, the reference's outcomes on the same questions in the same order.
        mode: how questions were asked ("cloze", "letter").

    `flips` is the share of items whose correctness changed.

    Raises:
        EvaluationError: the arrays do not pair, are empty or are not bool.
    """
    return {**_accuracy("MMLU", "accuracy", correct, reference), "mode": mode, "chance": MMLU_CHANCE}


def summarise_humaneval(passed: Bools, reference: Bools | None, isolation: str) -> dict[str, Any]:
    """The `humaneval` metrics: pass@1, the paired drop, and the sandbox's level of isolation.

    Args and errors as `summarise_mmlu`.
    """
    return {**_accuracy("HumanEval", "pass_at_1", passed, reference), "isolation": isolation}
