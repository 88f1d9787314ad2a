"""Statistics of one variant's evaluation: arrays of measurements in, nested dicts of plain numbers out.

Every interval is two-sided at 90 %, so that each of its ends is a one-sided 95 % bound: the bound a gate uses.
Its decisions:

- Tokens of one window share their context, so they are not independent. Means over tokens take their standard error
  from window totals (the linearised ratio estimator; Cochran, Sampling Techniques, 3rd ed., chapter 11) with Student's
  t on windows − 1 degrees of freedom. Shares use Wilson's interval on the effective number of tokens, n divided by the
  design effect, because Wilson's interval stays honest at 0 % and 100 %. The 99th percentile inverts that
  interval (Woodruff, JASA 47, 1952).
- Windows of text diverge unequally, a few of them much more than the others, and Student's bound of their mean is then
  too low: bounds of divergence allow for skewness, and are one-sided 95 % over its looks together (`WINDOW_LOOKS`).
- An accuracy drop is paired by item. Tango's score interval (Statistics in Medicine 17, 1998) is the paired
  counterpart of Wilson's: twenty items without a flip do not look like proof, and its error stays what it claims where
  flips are few. (An exact loss of 2 points among 2.5 % of flips passes the four looks of `sequential` 4.4 % of the
  time; with Wald's interval and one added to each kind of flip it is 6.4 %.)
- A problem may be solved in a share of several samples. The formulas for yes and no then hold with room to spare:
  values in [0, 1] vary by at most mean·(1 − mean), and a difference's square is at most its size.
- Whatever cannot be detected is a number too: each summary carries the effect that its sample size would reveal with
  80 % power in a one-sided test at 5 %. For divergence that is the excess over the limit (in the metric's own unit),
  for accuracy the drop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, softmax, stdtrit

from pipeline.errors import EvaluationError

ALPHA = 0.05  # one-sided
POWER = 0.80
Z = float(ndtri(1 - ALPHA))
"""Quantile of a one-sided normal bound."""
MMLU_CHANCE = 0.25  # four answers
CONFIDENCE = 0.95
"""The likeliest answer's mean probability under `graded`."""
SHOWN = 0.95
"""The least part of a drop in accuracy that `graded` shows."""
LOOKS = (570, 1_425, 2_850, 14_042)  # questions at which `sequential` may judge; nested, see mmlu.subset
WINDOW_LOOKS = {32: 0.01, 64: 0.018}
"""Windows of text at which divergence is judged, and the one-sided error that the bounds of each look are made for.

"Score more" after INCONCLUSIVE is a second chance to pass. The errors of the looks add up, whatever their texts share,
and there is no third. They are made to add up to 2.8 %, because bounds of skewed means err more than they are made for.
Below, in per cent: what passes at its limit, by either look; in brackets, what passes the second at 80 % of the limit.
60,000 seeded runs of 32, then 64 other windows, a quarter of each of four texts whose means are as .5, .7, 1 and 1.8.

    upper bound, error at each look            windows lognormal, σ of                        one in 24 is larger
                                               .25         .5          .75         1          2 times     3 times
    Student's t, 5 and 5 %                     13.0 (100)  16.9 (91)   21.9 (67)   27.4 (53)  17.7 (99)   28.1 (92)
    Johnson's, sample skewness, 5 and 5 %      11.1 (100)  13.5 (86)   16.9 (58)   20.6 (44)  14.7 (98)   23.5 (84)
    Johnson's, larger skewness, 5 and 5 %       9.8 (100)  11.2 (84)   12.5 (51)   14.0 (34)  13.5 (98)   22.5 (84)
    Hall's, larger skewness, 2.5 and 2.5 %      4.6 (100)   4.3 (65)    3.0 (21)    1.3  (4)   7.0 (89)   13.7 (56)
    Student's t, 1 and 1.8 %                    4.6 (100)   7.3 (82)   11.1 (54)   15.9 (42)   7.5 (98)   15.7 (85)
    Johnson's, larger skewness, 1 and 1.8 %     3.0 (100)   3.5 (70)    4.4 (35)    5.4 (21)   4.8 (94)   10.8 (72)

The last is used. The larger skewness is that of the sample, which few windows show too small, or v³ + 3v, that of
lognormal windows with the sample's coefficient of variation v. At one look of 32 and 5 %, windows with σ = .75 pass
8 % by the bootstrap-t, 10 % by empirical likelihood or the logarithm of the mean. SmolLM2's windows (q4, smoke suite)
have a σ of .12 to .24 within a text, the largest is 1.5 times its kind's mean. No bound allows for an outlier that no
window has shown.
"""
_KL_ROUNDING = 1e-4  # nats; float32 softmax can make a KL divergence of equal distributions slightly negative

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """An estimate, its two one-sided 95 % bounds, and the effect detectable at 80 % power; all in one unit.

    `high` is infinite where the sample is too small to bound the quantity from above.
    """

    estimate: float
    low: float
    high: float
    detectable: float

    def points(self) -> Interval:
        """An interval of a share in percentage points."""
        return Interval(*(100 * value for value in astuple(self)))

    def named(self, name: str) -> dict[str, float | None]:
        """The numbers as `name`, `name_low`, `name_high` (None for infinity, unknown to JSON), `name_detectable`."""
        return {
            name: self.estimate,
            f"{name}_low": self.low,
            f"{name}_high": self.high if math.isfinite(self.high) else None,
            f"{name}_detectable": self.detectable,
        }


# --- intervals -------------------------------------------------------------------------------------------------------


def wilson(successes: float, n: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval for a share; both arguments may be fractional (effective numbers).

    `z` is the quantile of the one-sided bound, the normal one unless given.
    """
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class _Spread:
    """How far a mean over tokens lies from the truth: `error` is its standard error, on `freedom` degrees of freedom,
    `skewness` that of the mean, and `lognormal` what it would be if the windows of each text were lognormal."""

    error: float
    freedom: float
    skewness: float
    lognormal: float

    def t(self, alpha: float) -> float:
        """Student's t that is exceeded with a chance of `alpha`."""
        return float(stdtrit(self.freedom, 1 - alpha))

    def reach(self, alpha: float, skewness: float) -> float:
        """From the mean to its bound on the side of a long tail (Johnson, JASA 73, 1978, turned into a bound)."""
        t = self.t(alpha)
        return self.error * (t + max(0.0, skewness) * (1 + 2 * t * t) / 6)


def _spread(values: Floats, windows: Ints, texts: Ints | None = None) -> _Spread:
    """Windows are independent, at least two of each text; how many there are of a text is no chance, so texts that
    differ do not widen the error (stratified sampling, Satterthwaite's degrees of freedom)."""
    square = third = lognormal = weight = 0.0
    for own in [slice(None)] if texts is None else [texts == text for text in np.unique(texts)]:
        mine = values[own]
        _, index = np.unique(windows[own], return_inverse=True)
        off = np.bincount(index, weights=mine - mine.mean())
        count = len(off)
        variance = float(off @ off) / (count - 1)  # of a window's total
        square += count * variance
        weight += (count * variance) ** 2 / (count - 1)
        third += count**2 / ((count - 1) * max(count - 2, 1)) * float((off**3).sum())
        if variance and mine.sum() > 0:
            variation = math.sqrt(variance) * count / float(mine.sum())
            lognormal += count * variance**1.5 * (variation**3 + 3 * variation)
    freedom = square**2 / weight if weight else len(np.unique(windows)) - 1.0
    scale = square**1.5 or 1.0
    return _Spread(math.sqrt(square) / len(values), freedom, third / scale, lognormal / scale)


def mean_interval(values: Floats, windows: Ints) -> Interval:
    """Mean over tokens by Student's t, with windows as the independent units.

    Args:
        values: [tokens] float64.
        windows: [tokens] integer, the window of each token; at least two different ones.
    """
    spread, mean = _spread(values, windows), float(values.mean())
    half = spread.t(ALPHA) * spread.error
    return Interval(mean, mean - half, mean + half, half + spread.t(1 - POWER) * spread.error)


def skewed_interval(values: Floats, windows: Ints, texts: Ints, alpha: float, positive: bool) -> Interval:
    """Mean over tokens whose windows may be skewed: each end reaches out to its own long tail.

    Args:
        values, windows: as for `mean_interval`.
        texts: [tokens] integer, the text of each token; at least two windows of each.
        alpha: one-sided error that each end is made for.
        positive: whether values cannot be negative, so that their windows are at least as skewed as lognormal ones.
    """
    spread, mean = _spread(values, windows, texts), float(values.mean())
    upper = spread.reach(alpha, max(spread.skewness, spread.lognormal * positive))
    lower = spread.reach(alpha, -spread.skewness)
    return Interval(mean, mean - lower, mean + upper, upper + spread.t(1 - POWER) * spread.error)


def share_interval(flags: Bools, windows: Ints, texts: Ints | None = None, alpha: float = ALPHA) -> Interval:
    """Share of true `flags` [tokens] bool, with windows [tokens] as the independent units; others as for a mean."""
    spread = _spread(flags.astype(np.float64), windows, texts)
    t_alpha, t_power = spread.t(alpha), spread.t(1 - POWER)
    share, effective = float(flags.mean()), float(len(flags))
    # The number of independent tokens that would know the share as well: n over the design effect, at most n.
    if independent := share * (1 - share) / len(flags):  # variance of the share if tokens were independent
        effective = len(flags) / max(1.0, spread.error**2 / independent)
    low, high = wilson(share * effective, effective, t_alpha)
    centre = (share * effective + t_alpha**2 / 2) / (effective + t_alpha**2)  # never 0 or 1, so never a zero error
    error = math.sqrt(centre * (1 - centre) / effective)
    return Interval(share, low, high, (t_alpha + t_power) * error)


def quantile_interval(values: Floats, windows: Ints, texts: Ints, level: float, alpha: float) -> Interval:
    """A high quantile of `values` [tokens] float64; the others as for `skewed_interval`.

    Its ends are values that a bound of the share of tokens below them puts there (Woodruff, JASA 47, 1952). The upper
    bound is infinite when fewer than one token would lie above it. `detectable` scales the distance to the lower bound,
    the side on which an excess is proved.
    """
    estimate = float(np.quantile(values, level))
    flags = values <= estimate
    below, spread = share_interval(flags, windows, texts, alpha), _spread(flags.astype(np.float64), windows, texts)
    low = float(np.quantile(values, below.low, method="lower"))
    bounded = below.high < 1 - 1 / len(values)
    high = float(np.quantile(values, below.high, method="higher")) if bounded else math.inf
    return Interval(estimate, low, high, (estimate - low) * (1 + spread.t(1 - POWER) / spread.t(alpha)))


# --- paired accuracy -------------------------------------------------------------------------------------------------


def detectable_drop(n: int, d: float, z: float = Z) -> float:
    """Smallest true drop (a share) that `n` paired items reveal with 80 % power.

    Args:
        n: items.
        d: discordance, the share of items whose correctness flips.
        z: quantile of the one-sided bound, that of 5 % unless given.
    """
    return float((z + ndtri(POWER)) * math.sqrt(d / n))


def drop_score(drop: float, n: ArrayLike, lost: ArrayLike, won: ArrayLike) -> Floats:
    """Tango's score statistic for a true drop of `drop` (a share): standard normal when it is true, negative when fewer
    are lost. Its standard error takes the likeliest shares of flips of which `drop` is the difference.

    Args:
        drop: in (-1, 1).
        n, lost, won: items, items that only the reference has right, and only the variant; numbers or arrays alike.
    """
    n, lost, won = (np.asarray(count, np.float64) for count in (n, lost, won))
    slope = (2 * n - lost + won) * drop - lost - won
    share_won = (np.sqrt(np.maximum(0.0, slope**2 + 8 * n * won * drop * (1 - drop))) - slope) / (4 * n)
    distance = lost - won - n * drop
    variance = np.maximum(0.0, n * (2 * share_won + drop * (1 - drop)))
    return np.divide(distance, np.sqrt(variance), out=np.zeros_like(distance), where=distance != 0)


def paired_interval(n: int, lost: float, won: float, z: float = Z) -> Interval:
    """Drop in accuracy from the reference to the variant, as a share; positive is a loss.

    Args:
        n: items.
        lost, won: items that only the reference has right, and only the variant; parts of items where items have parts.
        z: quantile of each bound, that of 5 % unless given (a look of `sequential` has its own).

    An upper bound lies within a margin just when `drop_score(margin, ...)` is at most -z.
    """
    from scipy.optimize import brentq  # half a second, which most stages never need

    estimate, edge = (lost - won) / n, 1 - 1e-12

    def bound(sign: int) -> float:
        def excess(drop: float) -> float:
            return float(drop_score(drop, n, lost, won)) + sign * z

        if sign * excess(sign * edge) > 0:  # every item lost, or every one won
            return float(sign)
        return brentq(excess, estimate, sign * edge, xtol=1e-12)

    # `detectable` adds one to each kind of flip: a sample without a flip does not know that there are none.
    return Interval(estimate, bound(-1), bound(1), detectable_drop(n, (lost + won + 2) / (n + 2), z))


def flips(correct: Bools | Floats, reference: Bools | Floats) -> tuple[int, float, float]:
    """Items, those lost and those won by a variant; both arrays [n] bool or shares in [0, 1], paired by index."""
    loss = reference.astype(np.float64) - correct
    return len(correct), float(np.maximum(loss, 0).sum()), float(np.maximum(-loss, 0).sum())


def pass_at_k(passed: Bools, k: int) -> Floats:
    """Probability that one of `k` samples passes, by problem: float64 [problems].

    The unbiased estimator 1 − C(n − c, k) / C(n, k) for c passes among n samples (Chen et al. 2021, arXiv 2107.03374,
    equation 1).

    Args:
        passed: [problems, samples] bool.
        k: at most the number of samples.
    """
    n = passed.shape[1]
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in passed.sum(axis=1)])


# --- summaries: the metrics files ------------------------------------------------------------------------------------


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise EvaluationError(f"{what}. The measurement is unusable; nothing was written. Evaluate the artifact again.")


def _check_tokens(what: str, unit: str, groups: Ints, **arrays: NDArray[Any]) -> None:
    tokens = len(groups)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    _require(
        all(array.shape == (tokens,) for array in arrays.values()) and groups.ndim == 1,
        f"{what}: one value per token is needed, but the {unit}s of tokens have shape {groups.shape}, {shapes}",
    )
    count = len(np.unique(groups))
    _require(count >= 2, f"{what}: {tokens} tokens in {count} {unit}(s); an interval needs at least 2")
    for name, array in arrays.items():
        bad = int(np.sum(~np.isfinite(array)))
        _require(bad == 0, f"{what}: {bad} of {tokens} values of {name} are NaN or infinite")


def summarise_reference_divergence(logprob: Floats, codes_kl: Floats, clipped: Floats, window_id: Ints) -> Metrics:
    """The reference's own `divergence` metrics: tokens, windows, perplexity, and what its kept log-probabilities lose.

    Args:
        logprob: [tokens] float64, natural log-probability of the true next token.
        codes_kl: [tokens] float64, KL divergence of the kept distribution from the model's own, nats.
        clipped: [tokens] float64, probability of the tokens whose log-probability was clipped.
        window_id: [tokens] integer.

    Raises:
        EvaluationError: shapes differ, a value is not finite, or there are fewer than two windows.
    """
    _check_tokens("divergence", "window", window_id, logprob=logprob, codes_kl=codes_kl, clipped=clipped)
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
    kl: Floats,
    top1_equal: Bools,
    logprob: Floats,
    logprob_reference: Floats,
    window_id: Ints,
    texts: Sequence[tuple[str, str]] = (),
) -> Metrics:
    """The `divergence` metrics of a variant, paired with the reference by token.

    Every token counts alike, so kinds of text weigh by their tokens. Each kind's own `<kind>_kl_mean`, `<kind>_top1`
    and `<kind>_perplexity_ratio` stand beside the whole, with one-sided 95 % bounds. The bounds of the whole are those
    of its look (`WINDOW_LOOKS`), 95 % where it is none. `probability_change` is the mean change in the true token's
    probability: unlike KL it says which way.

    Args:
        kl: [tokens] float64, KL divergence of the variant from the reference, nats.
        top1_equal: [tokens] bool, whether both name the same most likely token.
        logprob, logprob_reference: [tokens] float64, natural log-probability of the true next token.
        window_id: [tokens] integer, the window of each token.
        texts: kind and name of each window's text, at least two windows of each; none where all are of one text.

    Raises:
        EvaluationError: shapes differ, a value is not finite, a KL is negative beyond rounding, `top1_equal` is not
            bool, or there are fewer than two windows.
    """
    arrays = {"kl": kl, "top1_equal": top1_equal, "logprob": logprob, "logprob_reference": logprob_reference}
    _check_tokens("divergence", "window", window_id, **arrays)
    _require(top1_equal.dtype == np.bool_, f"divergence: top1_equal is {top1_equal.dtype}, not bool")
    _require(float(kl.min()) >= -_KL_ROUNDING, f"divergence: a KL of {kl.min():.3g} nats is negative: not a KL")
    kl, change, windows = np.maximum(kl, 0), logprob_reference - logprob, len(np.unique(window_id))
    names = list(dict.fromkeys(texts))
    text = np.array([names.index(name) for name in texts])[window_id] if names else np.zeros_like(window_id)

    def figures(own: Bools, alpha: float, prefix: str = "") -> Metrics:
        ids = window_id[own], text[own]
        found = skewed_interval(change[own], *ids, alpha, positive=False)
        estimate, low, high = map(math.exp, (found.estimate, found.low, found.high))
        ratio = Interval(estimate, low, high, estimate * math.expm1(found.detectable))
        return {
            **skewed_interval(kl[own], *ids, alpha, positive=True).named(f"{prefix}kl_mean"),
            **share_interval(top1_equal[own], *ids, alpha).named(f"{prefix}top1"),
            **ratio.named(f"{prefix}perplexity_ratio"),
        }

    alpha = WINDOW_LOOKS.get(windows, ALPHA)
    found: Metrics = {"tokens": len(kl), "windows": windows, **figures(np.ones(len(kl), np.bool_), alpha)}
    found |= quantile_interval(kl, window_id, text, 0.99, alpha).named("kl_p99")
    for kind in dict.fromkeys(kind for kind, _ in names):
        mine = np.isin(text, [number for number, name in enumerate(names) if name[0] == kind])
        own = figures(mine, ALPHA, f"{kind}_")
        found |= {key: value for key, value in own.items() if not key.endswith("_detectable")}
    return found | {
        "kl_max": float(kl.max()),
        "perplexity": math.exp(-float(logprob.mean())),
        "perplexity_reference": math.exp(-float(logprob_reference.mean())),
        **mean_interval(np.exp(logprob) - np.exp(logprob_reference), window_id).named("probability_change"),
    }


def _check_items(task: str, shape: tuple[str, ...], outcomes: Bools, reference: Bools | None) -> None:
    _require(
        outcomes.ndim == len(shape) and outcomes.size > 0,
        f"{task}: a list of items [{', '.join(shape)}] is needed, got shape {outcomes.shape}",
    )
    _require(outcomes.dtype == np.bool_, f"{task}: outcomes are {outcomes.dtype}, not bool")
    if reference is not None:
        _require(
            reference.shape == outcomes.shape and reference.dtype == np.bool_,
            f"{task}: {len(outcomes)} items of the variant do not pair with the reference's {reference.shape} "
            f"{reference.dtype}",
        )


def _accuracy(name: str, correct: Bools | Floats, reference: Bools | Floats | None) -> Metrics:
    """Accuracy under the key `name` and, for a variant, the paired drop from the reference in percentage points."""
    own = {"n": len(correct), **_share(name, correct)}
    if reference is None:
        return own
    drop = paired_interval(*flips(correct, reference)).points()
    return own | {
        f"reference_{name}": float(reference.mean()),
        "flips": float(np.abs(reference.astype(np.float64) - correct).mean()),
        "drop_points": drop.estimate,
        "drop_points_low": drop.low,
        "drop_points_high": drop.high,
        "detectable_drop_points": drop.detectable,
    }


def _share(name: str, values: Bools | Floats) -> dict[str, float]:
    """The mean of values in [0, 1] under the key `name`, with Wilson's interval."""
    low, high = wilson(float(values.sum()), len(values))
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True)
class MmluAnswers:
    """What a model made of the questions.

    correct: bool [n]; scores: float64 [n, 4], log-likelihoods of the answers (in cloze mode per token); answers:
    integer [n], the correct answer's column.
    """

    correct: Bools
    scores: Floats
    answers: Ints

    def first(self, n: int) -> MmluAnswers:
        """The first `n` of them."""
        return MmluAnswers(self.correct[:n], self.scores[:n], self.answers[:n])


def graded(found: MmluAnswers, confidence: float = CONFIDENCE) -> Floats:
    """How right each answer is, float64 [n] in 0 to 1: a probability of the correct one, with accuracy's meaning.

    It is the probability of the correct answer when all scores are multiplied by one number, chosen so that the
    likeliest answer has a probability of `confidence` on average. Accuracy is the same at a confidence of 1; a lower
    one turns the flips of near ties into small changes, so the mean change varies less. Both models are brought to one
    confidence because quantization changes it: as it stands, the probability of the correct answer hides a loss behind
    a sharper model. Simulated (three wrong answers, heavy-tailed noise that flips 9.2 % without a drop, a reference
    with 71 % right, seven ways to lose exactly 2 points of accuracy: `benchmarks/graded.py`), so much of the 2 points
    is seen, with the standard deviation of one question:

        figure                                     least   most   deviation without a drop
        accuracy                                    2.00   2.00    0.30
        probability of the correct answer, as is   -0.80   2.80    0.12
        graded, confidence .85                      1.72   1.92    0.17
        graded, confidence .90                      1.86   2.00    0.20
        graded, confidence .95                      1.96   2.05    0.24

    Of a reference with 85 % right the least are 1.40, 1.67 and 1.91 (`SHOWN`) at the three confidences. So at .95 the
    same certainty takes 1.5 times fewer questions than accuracy. The published 2 to 20 times are those of the second
    line, which says nothing about accuracy where a model grew sharper.
    """
    from scipy.optimize import brentq

    def excess(log_scale: float) -> float:
        return float(softmax(math.exp(log_scale) * found.scores, axis=1).max(axis=1).mean()) - confidence

    sharpest = 12.0
    scale = math.exp(brentq(excess, -sharpest, sharpest, xtol=1e-9) if excess(sharpest) > 0 else sharpest)
    return softmax(scale * found.scores, axis=1)[np.arange(len(found.answers)), found.answers]


def graded_change(variant: MmluAnswers, reference: MmluAnswers) -> tuple[float, float]:
    """The mean drop of `graded`, paired by question, and its standard error; percentage points."""
    change = 100 * (graded(reference) - graded(variant))
    return float(change.mean()), float(change.std(ddof=1)) / math.sqrt(len(change))


def graded_interval(change: float, error: float, z: float = Z) -> Interval:
    """The drop in accuracy, in points, that a `graded_change` stands for: as it shows at least `SHOWN` of a drop, the
    upper bound is divided by that. `z` as in `paired_interval`."""
    high = change + z * error
    return Interval(change, change - z * error, max(high, high / SHOWN), (z + float(ndtri(POWER))) * error / SHOWN)


def summarise_mmlu(variant: MmluAnswers, reference: MmluAnswers | None, mode: str) -> Metrics:
    """The `mmlu` metrics: accuracy, and what was lost unless `reference` is None (the reference's own row).

    Args:
        variant: on the questions of a nested subset, in its order.
        reference: the reference's, on the same questions in the same order.
        mode: how questions were asked ("cloze", "letter").

    `flips` is the share of items whose correctness changed; `graded_drop_points` is the drop that `graded` shows.
    `looks` has a row for each look that was reached: of a variant what both are judged by (items lost and won; the mean
    change of `graded` and its standard error, in points), of the reference its accuracy.

    Raises:
        EvaluationError: the arrays do not pair, are empty, not bool or not finite.
    """
    pairs = None if reference is None else reference.correct
    _check_items("MMLU", ("questions",), variant.correct, pairs)
    found = _accuracy("accuracy", variant.correct, pairs)
    reached = [n for n in LOOKS if n <= len(variant.correct)]
    if reference is None:
        found["looks"] = [_accuracy("accuracy", variant.correct[:n], None) for n in reached]
    else:
        for scores in (variant.scores, reference.scores):
            _require(
                scores.shape == (len(variant.correct), 4) and len(scores) > 1 and bool(np.isfinite(scores).all()),
                f"MMLU: scores of shape {scores.shape} for {len(variant.correct)} questions, or not finite",
            )
        found["looks"] = [_look(variant.first(n), reference.first(n)) for n in reached]
        found |= graded_interval(*graded_change(variant, reference)).named("graded_drop_points")
    return {**found, "mode": mode, "chance": MMLU_CHANCE}


def _look(variant: MmluAnswers, reference: MmluAnswers) -> Metrics:
    n, lost, won = flips(variant.correct, reference.correct)
    change, error = graded_change(variant, reference)
    return {"n": n, "lost": int(lost), "won": int(won), "graded": change, "graded_error": error}


def summarise_humaneval(passed: Bools, reference: Bools | None, ks: Sequence[int]) -> Metrics:
    """The scores of the `humaneval` metrics: pass@k, and pass@1's paired drop unless `reference` is None.

    - `n` problems with `samples` solutions each; `pass_at_1`, `pass_at_<k>`, each with `_low` and `_high`;
    - of a variant: `reference_pass_at_1`; `flips`, the mean change of a problem's pass@1 in either direction (with one
      sample the share of problems whose correctness changed); `drop_points` with `_low` and `_high`, and
      `detectable_drop_points`, in percentage points of pass@1.

    The section adds how solutions were asked for and run, and how many met a limit
    (`pipeline.tasks.humaneval`).

    Args:
        passed: [problems, samples] bool.
        reference: the same of the reference, on the same problems in the same order.
        ks: at most `samples` each; 1 need not be among them.

    Raises:
        EvaluationError: the arrays do not pair, are empty or are not bool.
    """
    scores = summarise_samples("HumanEval", "problems", "pass_at_1", passed, reference)
    for k in sorted({*ks} - {1}):
        scores |= _share(f"pass_at_{k}", pass_at_k(passed, k))
    return scores


def summarise_samples(task: str, unit: str, key: str, passed: Bools, reference: Bools | None) -> Metrics:
    """The mean share of right samples under the name `key`, and its paired drop unless `reference` is None.

    Args:
        task, unit: what was asked, and what its items are called.
        passed: [items, samples] bool.
        reference: the same of the reference, on the same items in the same order.

    Raises:
        EvaluationError: the arrays do not pair, are empty or are not bool.
    """
    _check_items(task, (unit, "samples"), passed, reference)
    scores = _accuracy(key, pass_at_k(passed, 1), None if reference is None else pass_at_k(reference, 1))
    return scores | {"samples": passed.shape[1]}


def summarise_agreement(
    logprob: Floats, problem: Ints, logprob_reference: Floats | None = None, top1_equal: Bools | None = None
) -> Metrics:
    """The `agreement` metrics: how a model reads the reference's own solutions, token by token.

    - `solutions`, `tokens`; `logprob`, the mean log-probability of these tokens, nats;
    - of a variant: `top1`, the share of tokens where it and the reference name the same most likely one, and
      `logprob_drop`, the reference's mean log-probability less the variant's, nats per token; each with `_low`, `_high`
      and `_detectable`, problems being the independent units.

    Args:
        logprob, logprob_reference: [tokens] float64, natural log-probability of each token of the solutions; no
            reference for the reference's own row.
        problem: [tokens] integer, the problem of each token; at least two different ones.
        top1_equal: [tokens] bool, whether both name the same most likely token.

    Raises:
        EvaluationError: shapes differ, a value is not finite, or there are fewer than two problems.
    """
    pairs = {"logprob_reference": logprob_reference, "top1_equal": top1_equal}
    given = {name: array for name, array in pairs.items() if array is not None}
    _check_tokens("agreement", "problem", problem, logprob=logprob, **given)
    own = {"solutions": len(np.unique(problem)), "tokens": len(logprob), "logprob": float(logprob.mean())}
    if logprob_reference is None or top1_equal is None:
        return own
    return {
        **own,
        **share_interval(top1_equal, problem).named("top1"),
        **mean_interval(logprob_reference - logprob, problem).named("logprob_drop"),
    }
