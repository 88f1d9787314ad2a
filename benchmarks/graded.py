"""How much of a drop in accuracy graded answers show, and how much less they vary: the table of `statistics.graded`.

python -m benchmarks.graded            two minutes

Questions and a variant without a drop are those of `preflight.chance.population`; the reference's scores are as sure as
they are right. The other variants have one more cause of loss, which is sized so that accuracy is exactly 2 points
lower. Shown is the mean change of each figure over all questions, in points; an honest one shows 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.special import softmax

from pipeline.preflight.chance import better, population, right
from pipeline.tasks.statistics import MmluAnswers, graded

QUESTIONS, DROP = 200_000, 2.0
CONFIDENCES = (0.85, 0.90, 0.95)
Scores = np.ndarray


def sized(make: Callable[[float], Scores], wanted: float, low: float, high: float) -> Scores:
    """What `make` gives where its accuracy is as wanted."""
    return make(brentq(lambda size: right(make(size)).mean() - wanted, low, high, xtol=1e-4))


def variants(accuracy: float) -> dict[str, Scores]:
    """The reference, a variant without a drop, and ways to lose `DROP` points."""
    found = population(accuracy, QUESTIONS, seed=1)
    sure = brentq(lambda scale: softmax(scale * found[0], axis=1).max(axis=1).mean() - accuracy, 0.2, 8, xtol=1e-4)
    reference, alike, errors = (sure * one for one in found)
    back = float((alike - reference - errors)[0, 0])
    rng = np.random.default_rng(2)
    forgotten, other = rng.random(QUESTIONS), reference.std() * rng.normal(size=reference.shape)

    def made(size: float, sharper: float = 1.0, share: float = 1.0) -> Scores:
        return better(sharper * reference + share * errors, size)

    milder, lost = made(back, share=0.7), right(reference).mean() - DROP / 100
    return {
        "reference": reference,
        "no drop": alike,
        "errors alone": sized(lambda size: reference + size * errors, lost, 0.01, 20),
        "errors, less knowledge": sized(made, lost, -20, 40),
        "few errors, less knowledge": sized(lambda size: made(size, share=0.3), lost, -20, 40),
        "flatter": sized(lambda size: made(size, sharper=0.85), lost, -20, 40),
        "sharper": sized(lambda size: made(size, sharper=1.15), lost, -20, 40),
        "one wrong answer favoured": sized(lambda size: milder + size * np.eye(4)[1], lost, 0, 10),
        "some questions forgotten": sized(
            lambda size: np.where((forgotten < size)[:, None], errors + other, milder), lost, 0, 0.5
        ),
    }


def figures(scores: Scores) -> dict[str, np.ndarray]:
    """What can be said of each question's answer, float64 [QUESTIONS]."""
    known = MmluAnswers(right(scores), scores, np.zeros(len(scores), np.int64))
    found = {"accuracy": known.correct.astype(float), "probability": softmax(scores, axis=1)[:, 0]}
    for confidence in CONFIDENCES:
        found[f"graded {confidence}"] = graded(known, confidence)
    return found


def main() -> None:
    """Print a table for each accuracy of the reference."""
    for accuracy in (0.55, 0.712, 0.848):
        own, *others = ((name, figures(scores)) for name, scores in variants(accuracy).items())
        table = Table(
            title=f"reference {accuracy:.1%} right: points shown, and the deviation of one question", box=None
        )
        for heading in ("variant", "flips", *own[1]):
            table.add_column(heading)
        for name, found in others:
            changes = {key: own[1][key] - values for key, values in found.items()}
            cells = [f"{100 * change.mean():.2f} ({change.std():.3f})" for change in changes.values()]
            table.add_row(name, f"{np.abs(changes['accuracy']).mean():.1%}", *cells)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
