"""cascade: how often a variant would doubt its MMLU answers and ask the cloud, and how right device and cloud then are.

An answer's confidence is its mean log-probability, as validate recorded it: in letter modes that of the letter, in
cloze mode that of the choice's tokens. The hybrid manager compares the same with its threshold. Thresholds are those at
which the full-precision model asks for a given share, and the one of configs/hybrid.yaml. Whatever is asked counts as
answered right: a cloud gives that at most. The price of quantization is the share that a variant must ask to be as
right as the full-precision model is alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.config.hybrid import load_hybrid
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.report.columns import aligned, wrapped
from pipeline.tasks.kept import read_record
from pipeline.tasks.mmlu import ITEMS
from pipeline.tasks.statistics import MMLU_CHANCE, mean_interval, wilson
from pipeline.workspace import REFERENCE, Workspace

SHARES = (0.1, 0.25, 0.5)
"""Of questions that the full-precision model asks the cloud: they choose the thresholds."""


@dataclass(frozen=True)
class Sure:
    """Answers in the order of their questions: confidence float64 [n], nats per token; correct bool [n]."""

    confidence: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Point:
    """A variant under a threshold. Shares of all questions but `kept`, the accuracy of those that stay on the device.

    Attributes:
        more: `asked` less the full-precision model's, with its bounds (two-sided 90 %); paired by question.
        right: accuracy of device and cloud together, if the cloud is always right.
    """

    variant: str
    threshold: float
    asked: float
    more: tuple[float, float, float]
    kept: float | None
    right: float


@dataclass(frozen=True)
class Cost:
    """The price of quantization: what a variant must ask to reach `target`, the full-precision model's accuracy."""

    variant: str
    accuracy: float
    low: float
    high: float
    target: float
    asked: float


def point(variant: str, own: Sure, reference: Sure, threshold: float) -> Point:
    """What a threshold makes of a variant's answers to the reference's questions."""
    asks, before = own.confidence < threshold, reference.confidence < threshold
    found = mean_interval(asks.astype(np.float64) - before, np.arange(len(asks)))
    kept = float(own.correct[~asks].mean()) if not asks.all() else None
    right = float((asks | own.correct).mean())
    return Point(variant, threshold, float(asks.mean()), (found.estimate, found.low, found.high), kept, right)


def needed(own: Sure, target: float) -> float:
    """The least share, least sure answers first, that must be asked for an accuracy of `target` in all."""
    order = np.argsort(own.confidence, kind="stable")
    wrong_left = (~own.correct).sum() - np.concatenate([[0], np.cumsum(~own.correct[order])])
    reached = 1 - wrong_left / len(order) >= target - 1e-12
    return float(np.argmax(reached)) / len(order)


def run(model: str, as_json: bool) -> None:
    """Print the table of all variants of `model` that were asked the reference's questions.

    Raises EvaluationError: the reference, or every variant, was not measured on MMLU.
    """
    answers = _answers(Workspace(model))
    reference = answers[REFERENCE]
    thresholds = [float(np.quantile(reference.confidence, share)) for share in SHARES]
    if cascade := load_hybrid().cascade:
        thresholds.append(cascade.threshold)
    points = [point(name, own, reference, limit) for limit in thresholds for name, own in answers.items()]
    costs = [_cost(name, own, reference) for name, own in answers.items()]
    meaningful = costs[0].low > MMLU_CHANCE
    document = {
        "model": model, "questions": len(reference.correct), "above_chance": bool(meaningful),
        "thresholds": [asdict(one) for one in points], "price": [asdict(one) for one in costs],
    }  # fmt: skip
    print(json.dumps(document, indent=2) if as_json else "\n".join(_text(model, meaningful, points, costs, reference)))


def _cost(variant: str, own: Sure, reference: Sure) -> Cost:
    n, target = len(own.correct), float(reference.correct.mean())
    low, high = wilson(float(own.correct.sum()), n)
    return Cost(variant, float(own.correct.mean()), low, high, target, needed(own, target))


def _answers(workspace: Workspace) -> dict[str, Sure]:
    """By variant, the reference first: answers to the questions that all of them were asked."""
    folder = workspace.evaluation(REFERENCE).parent
    measured = sorted(folder.glob(f"*/mmlu/{ITEMS}"), key=lambda path: (path.parts[-3] != REFERENCE, path))
    names = [path.parts[-3] for path in measured if "metrics" in (read_record(path.parent) or {})]
    if len(names) < 2 or names[0] != REFERENCE:
        raise EvaluationError(
            f"{folder} has MMLU answers of {', '.join(names) or 'nothing'}; a cascade needs those of {REFERENCE} and "
            f"of a variant. Run `dvc repro`, or `python -m pipeline validate {workspace.model} {REFERENCE}`."
        )
    journals = {name: Journal(folder / name / "mmlu" / ITEMS).items for name in names}
    common = [name for name in journals[REFERENCE] if all(name in items for items in journals.values())]
    if len(common) < 2:
        raise EvaluationError(f"{folder}: the variants were not asked the same MMLU questions. Validate them again.")
    return {name: _sure([items[one] for one in common]) for name, items in journals.items()}


def _sure(items: Sequence[dict[str, object]]) -> Sure:
    scores = np.array([item["scores"] for item in items], np.float64)
    return Sure(scores.max(axis=1), np.array([item["correct"] for item in items], np.bool_))


# --- text ------------------------------------------------------------------------------------------------------------


def _text(model: str, meaningful: bool, points: Sequence[Point], costs: Sequence[Cost], reference: Sure) -> list[str]:
    n, first = len(reference.correct), costs[0]
    heading = f"{model}, {n:,} MMLU questions. Whatever the cloud is asked counts as answered right."
    if not meaningful:
        heading = (
            f"A check of the machinery, no result: the full-precision {model} has {first.accuracy:.1%} of {n:,} MMLU "
            f"questions right ({first.low:.1%} to {first.high:.1%}), which is not above chance ({MMLU_CHANCE:.0%}), so "
            f"its confidence says nothing."
        )
    head = (
        "variant",
        "threshold, nats",
        "asks the cloud",
        "more than full precision",
        "right alone",
        "right with the cloud",
    )
    table = [head] + [
        (
            one.variant, f"{one.threshold:.3f}", f"{one.asked:.1%}", _points(one.more),
            "–" if one.kept is None else f"{one.kept:.1%}", f"{one.right:.1%}",
        )
        for one in points
    ]  # fmt: skip
    price = [("variant", "accuracy alone", "asks the cloud to be as right as full precision")] + [
        (one.variant, f"{one.accuracy:.1%} ({one.low:.1%} to {one.high:.1%})", f"{one.asked:.1%}") for one in costs
    ]
    return [*wrapped(heading), "", *aligned(table, {0}), "", *aligned(price, {0}), "", *wrapped(_LEGEND)]


_LEGEND = (
    "threshold: an answer whose mean log-probability is below it is asked. right alone: of the questions that stay on "
    "the device. Differences are paired, in percentage points, with two-sided 90 % intervals."
)


def _points(more: tuple[float, float, float]) -> str:
    estimate, low, high = (100 * value for value in more)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"
