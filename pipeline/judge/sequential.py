"""How many questions prove that accuracy did not drop by more than a margin: a group-sequential test, in four looks.

The subsets of MMLU are nested, so a test may stop at 570 questions when they suffice and go on where they do not. Each
look at the same growing sample is another chance to be lucky; the looks share an error of 5 % through a spending
function (Lan and DeMets, Biometrika 70, 1983), and the critical value of each look follows from what is spent there
(recursive numerical integration: Armitage, McPherson and Rowe, JRSS A 132, 1969; Jennison and Turnbull, Group
Sequential Methods, 2000, chapters 7 and 19). Read as intervals, estimate ± critical value × standard error hold at all
looks together, whatever rule ended the sampling (repeated confidence intervals; Jennison and Turnbull, JRSS B 51,
1989): so the interval of the latest look decides, and PASS and FAIL are each wrong at most one time in twenty.

The rule. α(n) = 4 % · (n / 2,850)² up to 2,850 questions (the power family; Kim and DeMets, Biometrika 74, 1987), and
the fifth per cent is kept for the whole split. What was asked of it, at the 9.2 % of flips that a good 4-bit variant
shows and a margin of 2 points, and what candidates give (`crossing`; the last column without a drop, on average):

    spending function                       no drop passes   1 point passes   2.5 points   questions
                                            by 570, 2,850    by 14,042        pass         asked
    asked                                        ≥ 95.0 %    ≥ 90.0 %         ≤ 2.0 %
    O'Brien-Fleming type of n / 14,042       0.0,  25.0 %      98.8 %           0.0 %       11,249
    Pocock type of n / 14,042               12.8,  88.3 %      98.4 %           0.2 %        3,356
    a quarter of 5 % at each look           25.2,  93.3 %      96.5 %           0.8 %        2,448
    4 % by 2,850, power 1                   20.2,  94.9 %      96.0 %           0.7 %        2,350
    4 % by 2,850, power 2 (this rule)        8.5,  95.8 %      96.1 %           0.5 %        2,460
    4 % by 2,850, power 3                    3.3,  96.0 %      96.1 %           0.5 %        2,608

Simulated with whole questions and the score test of `statistics.paired_interval`, the rule has 95.6, 96.0 and 0.5 %,
and a drop of exactly the margin passes and fails 5.0 % of the time each (4.3 and 5.6 % where nothing is won and flips
are all losses). The whole split has five times the information of 2,850 questions: a spending function that runs on
information saves the error for it, where one per cent is plenty, and starves the look where variants are meant to pass.
That is why the textbook's choices miss the first demand, and why four of the five per cent are spent by 2,850. The
price: at more than 9.5 % of flips fewer than 95 % pass by 2,850 (at 12 %: 90 %) and the others go on.

What it assumes: questions are equally informative at all looks. Up to 5,700 the subsets hold equally many questions of
each subject, the whole split does not, so the last look's drop weighs large subjects more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from scipy.special import ndtr

from pipeline.tasks.statistics import ALPHA, LOOKS

_PLANNED, _PLANNED_ALPHA = 2_850, 0.04  # where the test is meant to end, and what it may have spent there
_NODES = 64  # of the quadrature at each look: boundaries are exact to 1e-9
_REACH = 9.0  # standard deviations that hold all the probability there is

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """One look of the plan.

    Attributes:
        number: from 1.
        n: questions.
        spent: one-sided error spent by this look and those before it, of `ALPHA`.
        critical: standard errors that an estimate must lie away from the margin.
        next: questions of the next look; None at the last.
    """

    number: int
    n: int
    spent: float
    critical: float
    next: int | None

    def describe(self) -> str:
        """`look 2 of 4: n 1,425, alpha 0.010 of 0.05 spent`."""
        return f"look {self.number} of {len(LOOKS)}: n {self.n:,}, alpha {self.spent:.3f} of {ALPHA:g} spent"


def spending(n: int) -> float:
    """Error that looks at up to `n` questions may spend together."""
    return _PLANNED_ALPHA * (n / _PLANNED) ** 2 if n <= _PLANNED else ALPHA


@cache
def plan() -> tuple[Look, ...]:
    """The looks, in order."""
    information, spent = [n / LOOKS[-1] for n in LOOKS], [spending(n) for n in LOOKS]
    columns = (range(1, len(LOOKS) + 1), LOOKS, spent, boundaries(information, spent), (*LOOKS[1:], None))
    return tuple(Look(*fields) for fields in zip(*columns, strict=True))


def reached(n: int) -> Look | None:
    """The latest look that `n` questions allow; None before the first."""
    return max((look for look in plan() if look.n <= n), key=lambda look: look.n, default=None)


def next_look(n: int) -> int | None:
    """Questions of the first look beyond `n`; None when all have been asked."""
    return min((look for look in LOOKS if look > n), default=None)


# --- boundaries ------------------------------------------------------------------------------------------------------


def boundaries(information: Sequence[float], spent: Sequence[float]) -> tuple[float, ...]:
    """Critical values of standardised statistics Z₁ … Z_K that make the error spent by each look as given.

    Args:
        information: of each look, increasing, in any unit: Corr(Z_j, Z_k) = sqrt(I_j / I_k) for j < k.
        spent: cumulative one-sided error, increasing, in (0, 1).
    """
    from scipy.optimize import brentq

    found: list[float] = []
    for look, (before, total) in enumerate(itertools.pairwise((0.0, *spent)), 1):

        def excess(bound: float, look: int = look, error: float = total - before) -> float:
            return float(crossing(information[:look], [*found, bound])[-1]) - error

        found.append(brentq(excess, -_REACH, _REACH, xtol=1e-12))
    return tuple(found)


def crossing(information: Sequence[float], bounds: Sequence[float], drift: float = 0.0) -> Floats:
    """Probability that Z is above its bound for the first time at each look, float64 [looks].

    `drift` is the mean of Z per square root of information: Z_k ~ N(drift · sqrt(I_k), 1).

    The density of Z_k on the paths that have not crossed is carried from look to look on Gauss-Legendre nodes.
    """
    nodes, weights = leggauss(_NODES)
    found = np.empty(len(bounds))
    values, mass = np.zeros(1), np.ones(1)  # before the first look: certainty at zero
    earlier = 0.0
    for look, (level, bound) in enumerate(zip(information, bounds, strict=True)):
        step = level - earlier
        mean = (values * np.sqrt(earlier) + drift * step) / np.sqrt(level)
        deviation = np.sqrt(step / level)
        found[look] = mass @ ndtr((mean - bound) / deviation)
        low = min(drift * np.sqrt(level), bound) - _REACH
        values, scale = low + (bound - low) * (nodes + 1) / 2, weights * (bound - low) / 2
        density = np.exp(-0.5 * ((values[:, None] - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        mass, earlier = scale * (density @ mass), level
    return found
