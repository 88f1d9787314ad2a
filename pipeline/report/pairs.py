"""What one measured variant differs in from another, item by item, by the results that `validate` keeps of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import keys
from pipeline.calibrate.texts import dataset
from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_pipeline
from pipeline.errors import PipelineError
from pipeline.journal import Journal
from pipeline.tasks import humaneval, mmlu, mmlu_questions
from pipeline.tasks.divergence_scores import read_scores
from pipeline.tasks.kept import read_record
from pipeline.tasks.registry import load_suite
from pipeline.tasks.statistics import Interval, flips, mean_interval, paired_interval

ITEMS = {"mmlu": ("accuracy", mmlu.ITEMS), "humaneval": ("pass_at_1", humaneval.VERDICTS)}
"""By task: the accuracy of its metrics, and the journal of its items, each right or not."""
_SAME = (
    "suite",
    "data",
    "reference",
)  # of what decided a task's items: what they were, and what they were compared with
_WIDTH = 76  # of a question as it is shown


@dataclass(frozen=True)
class Flips:
    """Items in both, and what only one of them has right, in the order they were asked. Shares where there are samples.

    Attributes:
        difference: in accuracy, second less first, as a share.
    """

    n: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    difference: Interval


def why_not(task: str, first: Path, second: Path, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Why two evaluations (folders with a folder for each task) cannot be paired in a task; "" where they can.

    `metrics` are the task's sections of both: results of another measurement than they say are not paired with them.
    """
    records = [read_record(folder / task) or {} for folder in (first, second)]
    for folder, record, section in zip((first, second), records, metrics, strict=True):
        if "metrics" not in record:
            return f"{folder} has no results by item"
        if record["metrics"] != section:
            return f"the results by item in {folder} are of another measurement"
    items = [record["items"] for record in records]
    other = [name for name in _SAME if items[0].get(name) != items[1].get(name)]
    return f"they were not asked the same: another {' and '.join(other)}" if other else ""


def divergence(first: Path, second: Path, reference: Path) -> dict[str, Interval]:
    """By metric, second less first over the same tokens; of the perplexity ratio, second over first.

    Windows are the independent units. Agreement of the top token needs the items of the reference that both met:
    it is left out without them.
    """
    a, b = (read_scores(folder / "divergence") for folder in (first, second))
    windows = a["window_id"]
    ratio = mean_interval(a["logprob"] - b["logprob"], windows)
    found = {
        "kl_mean": mean_interval(np.maximum(b["kl"], 0) - np.maximum(a["kl"], 0), windows),
        "perplexity_ratio": Interval(*map(math.exp, astuple(ratio))),
    }
    met = (read_record(first / "divergence") or {"items": {}})["items"].get("reference")
    own = read_record(reference / "divergence") or {}
    if keys.digest(own.get("sha256")) == met:
        top = read_scores(reference / "divergence")["top"]
        agree = [(scores["top"] == top).astype(np.float64) for scores in (a, b)]
        found["top1"] = mean_interval(agree[1] - agree[0], windows)
    return found


def flipped(task: str, first: Path, second: Path) -> Flips | None:
    """What of `ITEMS` flipped between two evaluations; None where they share no item."""
    a, b = (Journal(folder / task / ITEMS[task][1]).items for folder in (first, second))
    shares = [_shares(items, a.keys() & b.keys()) for items in (a, b)]
    if not shares[0]:
        return None
    right = [np.array([rows[name] for name in shares[0]]) for rows in shares]
    n, lost, won = flips(right[1], right[0])
    drop = paired_interval(n, lost, won)
    difference = Interval(0 - drop.estimate, -drop.high, -drop.low, drop.detectable)
    names = _titles(a) if task == "mmlu" else {}

    def only(one: np.ndarray, other: np.ndarray) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name, more in zip(shares[0], one > other, strict=True) if more)

    return Flips(n, only(*right), only(*right[::-1]), difference)


def _shares(items: Mapping[str, Any], common: set[str]) -> dict[str, float]:
    """The share of right samples of each question or problem; samples of one have names that end in their number."""
    found: dict[str, list[bool]] = {}
    for name, item in items.items():
        if name in common:
            found.setdefault(name.partition("#")[0], []).append(item["correct"])
    return {name: float(np.mean(right)) for name, right in found.items()}


def _titles(items: Mapping[str, Any]) -> dict[str, str]:
    """Questions by name: the subject, and the text where the questions of the suite are here and are those."""
    try:
        wanted = getattr(load_suite(load_pipeline().suite), "mmlu", None)
        split = mmlu_questions.load_questions(dataset("mmlu", Store()))
        asked = mmlu_questions.subset(split, len(items), wanted.seed if wanted else 0)
    except PipelineError:
        asked = []
    found = {}
    for name, item in items.items():
        question = asked[item["number"]] if item["number"] < len(asked) else None
        known = question and (question.subject, question.answer) == (item["subject"], item["answer"])
        text = " ".join(question.question.split()) if question and known else ""
        found[name] = f"{item['subject']}: {text[:_WIDTH]}{'…' * (len(text) > _WIDTH)}" if text else item["subject"]
    return found
