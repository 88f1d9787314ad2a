"""How much of a drop in accuracy graded answers show, and how much less they vary: the table of `statistics.graded`.

python -m benchmarks.graded            two minutes

Questions have one right and three wrong answers. The reference's scores are as sure as they are right. A variant has
heavy-tailed errors, stronger on some questions, and one more cause of loss, which is sized so that its accuracy is
exactly 2 points lower. Shown is the mean change of each figure over all questions, in points; an honest one shows 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.special import softmax

from pipeline.tasks.statistics import MmluAnswers, graded

QUESTIONS, FLIPS, DROP = 200_000, 0.092, 2.0
CONFIDENCES = (0.85, 0.90, 0.95)
RIGHT = np.eye(4)[0]
Scores = np.ndarray


def accuracy(scores: Scores) -> float:
    """Share of questions whose first answer has the best score."""
    return float((scores.argmax(axis=1) == 0).mean())


def reference_of(right: float, rng: np.random.Generator) -> Scores:
    """float64 [QUESTIONS, 4] with so many right, and a likeliest answer that is as probable as it is right."""
    wrong, ease = rng.normal(size=(QUESTIONS, 4)), rng.normal(size=QUESTIONS)

    def scores(shift: float) -> Scores:
        return wrong + np.outer(shift + 1.6 * ease, RIGHT)

    raw = scores(brentq(lambda shift: accuracy(scores(shift)) - right, -6, 12, xtol=1e-4))
    return raw * brentq(lambda scale: softmax(scale * raw, axis=1).max(axis=1).mean() - right, 0.2, 8, xtol=1e-4)


def sized(make: Callable[[float], Scores], wanted: float, low: float, high: float) -> Scores:
    """What `make` gives where its accuracy is as wanted."""
    return make(brentq(lambda size: accuracy(make(size)) - wanted, low, high, xtol=1e-4))


def variants(reference: Scores, rng: np.random.Generator) -> dict[str, Scores]:
    """One without a drop, and ways to lose `DROP` points."""
    errors = rng.standard_t(4, size=reference.shape) / np.sqrt(2) * np.exp(0.4 * rng.normal(size=(len(reference), 1)))
    forgotten, other = rng.random(len(reference)), reference.std() * rng.normal(size=reference.shape)
    own = accuracy(reference)
    right = reference.argmax(axis=1) == 0

    def level(noise: float) -> Scores:
        return sized(lambda shift: reference + noise * errors + shift * RIGHT, own, -20, 40)

    noise = brentq(lambda noise: ((level(noise).argmax(axis=1) == 0) != right).mean() - FLIPS, 0.01, 3, xtol=1e-3)
    shift = float((level(noise) - reference - noise * errors)[0, 0])

    def made(size: float, sharper: float = 1.0, share: float = 1.0) -> Scores:
        return sharper * reference + share * noise * errors + size * RIGHT

    def forgetting(size: float) -> Scores:
        found = made(shift, share=0.7)
        return np.where((forgotten < size)[:, None], noise * errors + other, found)

    lost = own - DROP / 100
    return {
        "no drop": level(noise),
        "errors alone": sized(lambda size: reference + size * errors, lost, 0.01, 6),
        "errors, less knowledge": sized(made, lost, -20, 40),
        "few errors, less knowledge": sized(lambda size: made(size, share=0.3), lost, -20, 40),
        "flatter": sized(lambda size: made(size, sharper=0.85), lost, -20, 40),
        "sharper": sized(lambda size: made(size, sharper=1.15), lost, -20, 40),
        "one wrong answer favoured": sized(lambda size: made(shift, share=0.7) + size * np.eye(4)[1], lost, 0, 10),
        "some questions forgotten": sized(forgetting, lost, 0, 0.5),
    }


def figures(scores: Scores) -> dict[str, np.ndarray]:
    """What can be said of each question's answer, float64 [QUESTIONS]."""
    known = MmluAnswers(scores.argmax(axis=1) == 0, scores, np.zeros(len(scores), np.int64))
    found = {"accuracy": known.correct.astype(float), "probability": softmax(scores, axis=1)[:, 0]}
    for confidence in CONFIDENCES:
        found[f"graded {confidence}"] = graded(known, confidence)
    return found


def main() -> None:
    """Print a table for each accuracy of the reference."""
    for right in (0.55, 0.712, 0.848):
        rng = np.random.default_rng(1)
        reference = reference_of(right, rng)
        own = figures(reference)
        table = Table(title=f"reference {right:.1%} right: points shown, and the deviation of one question", box=None)
        for heading in ("variant", "flips", *own):
            table.add_column(heading)
        for name, scores in variants(reference, rng).items():
            changes = {key: own[key] - values for key, values in figures(scores).items()}
            cells = [f"{100 * change.mean():.2f} ({change.std():.3f})" for change in changes.values()]
            table.add_row(name, f"{np.abs(changes['accuracy']).mean():.1%}", *cells)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
