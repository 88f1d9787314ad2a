"""The chance that a suite lets a variant pass that lost nothing: releases simulated and judged by the judge itself.

Hours of measuring are wasted where no result can be PASS, so the chance is said before them. Every simulated release
goes through the summaries of `tasks.statistics` and `judge.gates.decide`, looks included. What is assumed of it:

- KL, its 99th percentile, disagreement of the top token and the excess of the perplexity ratio are at `OF_LIMIT` of
  their limits. Tokens' KL is lognormal, with the width that the two limits of KL imply; windows differ by a lognormal
  factor of `WINDOWS`; the change of a token's log-probability has a variance of 2.2 times its KL. Measured on
  SmolLM2's q4, q4_k_m and q3: windows .12 to .25 within a text, the change 2.1 to 2.4.
- `FLIPS` of the answers flip without a drop: 9.2 % was measured on published results of Q4_K_M (Llama-3.1-8B, MMLU).
  What is written may flip more often, as one token changes all that follow: `MORE_FLIPS`.
- The reference has the accuracy that its entry calls `published`, or `TYPICAL`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pipeline import keys
from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.errors import ConfigError
from pipeline.files import read_json, write_json
from pipeline.judge.gates import Policy, decide
from pipeline.judge.policy import Row, gate_row
from pipeline.judge.sequential import next_look
from pipeline.judge.verdicts import INCONCLUSIVE, PASS, Verdict
from pipeline.tasks import statistics
from pipeline.tasks.registry import Suite, load_suite
from pipeline.tasks.task import FLOOR, LOOKS, Task

DRAWS = 200
"""Simulated releases: a chance of 80 % is known to 3 points."""
HOPELESS = 0.05
"""A suite that lets fewer pass cannot decide."""
OF_LIMIT, WINDOWS, FLIPS, MORE_FLIPS, TYPICAL = 0.8, 0.25, 0.092, 0.20, 0.65
_LOGPROB_VARIANCE = 2.2  # of a token's change, in its KL
_PARITY = {"passed": True, "max_relative_error": 0.0, "limit": 1.0}
Sections = dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""By task, the sections of a variant and of its reference."""


@dataclass(frozen=True)
class Chance:
    """What a suite can decide about a variant.

    Attributes:
        passes: share of simulated releases without a loss that pass.
        blocked: the same for the gates that hold them up, by name.
        items: mean number of items asked of a task that is judged at looks; none without one.
    """

    passes: float
    blocked: dict[str, float]
    items: dict[str, float]

    def describe(self) -> str:
        """`passes 93 % of the time (held up by perplexity_ratio 4 %, humaneval 3 %), with 820 of mmlu on average`."""
        often = sorted(self.blocked.items(), key=lambda pair: -pair[1])
        held = ", ".join(f"{name} {100 * share:.0f} %" for name, share in often if share >= 0.005)
        asked = "".join(f", with {count:,.0f} items of {name} on average" for name, count in self.items.items())
        return f"passes {100 * self.passes:.0f} % of the time" + (f" (held up by {held})" if held else "") + asked


def chance(model: str, variant: str, suite: str, flips: float = FLIPS, draws: int = DRAWS) -> Chance:
    """Of a variant of a model under a suite, kept in the store under all that decides it.

    Args:
        flips: share of the answers of other tasks than MMLU that flip.

    Raises ConfigError where no row of configs/gates.yaml judges the variant.
    """
    name, row = gate_row(model, variant)
    wanted, published = load_suite(suite), load_model(model).published
    key = keys.digest(
        [keys.code(__name__), wanted.model_dump(mode="json"), row.model_dump(mode="json"), published, flips, draws]
    )
    path = Store().root / "chances" / f"{key}.json"
    try:
        return Chance(**read_json(path))
    except (OSError, ValueError, TypeError):
        found = simulated(Policy(name, row, None, math.inf, None), wanted, published, flips, draws)
        write_json(path, vars(found))
        return found


def forbidden(model: str, variant: str) -> str | None:
    """Why a variant of a model can only be refused, whatever is measured, and what to do; None where it may pass."""
    try:
        name, row = gate_row(model, variant)
    except ConfigError as error:
        return str(error)
    if row.permits(model) is not False:
        return None
    return (
        f"its verdict can only be FAIL: `opt_in` of {name} in configs/gates.yaml does not name {model}. Name it there, "
        f"or leave {variant} out of `variants`"
    )


def outlook(model: str, variant: str, suite: str) -> str:
    """What a suite can decide about a variant of a model, in a sentence."""
    begin = f"{model} {variant}, suite {suite}"
    if reason := forbidden(model, variant):
        return f"{begin}: {reason}."
    usual, worse = (chance(model, variant, suite, flips) for flips in (FLIPS, MORE_FLIPS))
    said = f"{begin}: a variant without a loss {usual.describe()}"
    if worse.passes != usual.passes:  # equal where nothing that is written has a limit, or can decide
        said += f"; {100 * worse.passes:.0f} % if {100 * MORE_FLIPS:.0f} % of what is written flips"
    return f"{said}."


def hopeless(model: str, variant: str, suite: str) -> str | None:
    """Why no measuring under a suite can end in PASS, in one paragraph with what to do; None where it can."""
    if reason := forbidden(model, variant):
        return f"{model} {variant}: {reason}."
    if (found := chance(model, variant, suite)).passes >= HOPELESS:
        return None
    return (
        f"{model} {variant}: the suite {suite!r} cannot decide: a variant without a loss {found.describe()}. Set "
        f"`suite: release` in configs/pipeline.yaml, or give `make repro` SUITE=release."
    )


def simulated(
    policy: Policy, suite: Suite, published: Mapping[str, float], flips: float = FLIPS, draws: int = DRAWS
) -> Chance:
    """The same without anything kept. Seeded: equal arguments give equal figures."""
    rng = np.random.default_rng(19)
    passed, blocked, asked = 0, dict[str, int](), dict[str, list[int]]()
    for _ in range(draws):
        verdict, items = _release(policy, suite, published, flips, rng)
        passed += verdict.verdict == PASS
        for line in verdict.lines:
            if line.verdict not in (PASS, "REPORTED"):
                blocked[line.name] = blocked.get(line.name, 0) + 1
        for task, count in items.items():
            asked.setdefault(task, []).append(count)
    shares = {name: count / draws for name, count in blocked.items()}
    return Chance(passed / draws, shares, {task: float(np.mean(counts)) for task, counts in asked.items()})


def _release(
    policy: Policy, suite: Suite, published: Mapping[str, float], flips: float, rng: np.random.Generator
) -> tuple[Verdict, dict[str, int]]:
    """One verdict at the look that ends it, and how many items that took by task."""
    sections: Sections = {}
    looking: dict[str, tuple[Task, int, np.ndarray]] = {}
    for task, part in suite.by_task():
        kinds = {gate.kind for gate in task.gates if gate.limit and getattr(policy.limits, gate.limit) is not None}
        accuracy = published.get(task.name, TYPICAL)
        if LOOKS in kinds:
            assert task.stops, "what is judged at looks has stops"
            stops = task.stops(part)
            looking[task.name] = task, stops[0], rng.integers(0, _QUESTIONS, stops[-1])
        elif FLOOR in kinds:
            sections[task.name] = _solutions(task, getattr(part, task.counted[0]), accuracy, flips, rng)
        elif kinds:
            sections[task.name] = _divergence(part, policy.limits, rng)
    while True:
        asked = {name: n for name, (_, n, _) in looking.items()}
        for name, (_, n, drawn) in looking.items():
            sections[name] = _questions(drawn[:n], published.get(name, TYPICAL))
        variant, reference = ({name: pair[side] for name, pair in sections.items()} for side in (0, 1))
        verdict = decide(variant, reference, policy, _PARITY)
        waiting = {line.name for line in verdict.lines if line.verdict == INCONCLUSIVE}
        further = {
            name: look
            for name, (task, n, drawn) in looking.items()
            if waiting & {gate.name for gate in task.gates}
            and (look := next_look(n)) is not None
            and look <= len(drawn)
        }
        if verdict.verdict != INCONCLUSIVE or not further:
            return verdict, asked
        looking |= {name: (looking[name][0], look, looking[name][2]) for name, look in further.items()}


def _solutions(
    task: Task, n: int, accuracy: float, flips: float, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Items that are right or wrong, of which a share of `flips` flips, as many up as down."""
    half = min(flips / 2, accuracy, 1 - accuracy)
    kind = rng.choice(4, n, p=[accuracy - half, half, half, 1 - accuracy - half])  # both right, lost, won, both wrong
    variant, reference = np.isin(kind, (0, 2))[:, None], np.isin(kind, (0, 1))[:, None]
    key = next(gate.key for gate in task.gates if gate.kind == FLOOR)
    of = (task.title, task.unit, key)
    return (
        statistics.summarise_samples(*of, variant, reference),
        statistics.summarise_samples(*of, reference, None),
    )


# --- MMLU ------------------------------------------------------------------------------------------------------------

_QUESTIONS = 100_000  # of the population that a release draws from


@cache
def population(
    accuracy: float, questions: int = _QUESTIONS, seed: int = 7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of the reference, of a variant without a drop, and the variant's errors, float64 [questions, 4]. The first
    answer is correct; `FLIPS` of the answers flip.

    A question is hard or easy, its wrong answers are equally tempting, and the errors have heavy tails that some
    questions feel more than others. What they cost on average the variant has back everywhere alike, in the score of
    the correct answer.
    """
    from scipy.optimize import brentq

    rng = np.random.default_rng(seed)
    wrong, ease = rng.normal(size=(questions, 4)), rng.normal(size=questions)
    errors = rng.standard_t(4, size=(questions, 4)) * np.exp(0.4 * rng.normal(size=(questions, 1)))
    hard = better(wrong, 1.6 * ease)
    scores = better(hard, brentq(lambda shift: right(better(hard, shift)).mean() - accuracy, -6, 12, xtol=1e-4))
    own = right(scores)

    def level(noise: float) -> np.ndarray:
        worse = scores + noise * errors
        return better(worse, brentq(lambda shift: right(better(worse, shift)).mean() - own.mean(), -20, 40, xtol=1e-4))

    noise = brentq(lambda noise: (right(level(noise)) != own).mean() - FLIPS, 1e-3, 2, xtol=1e-3)
    return scores, level(noise), noise * errors


def right(scores: np.ndarray) -> np.ndarray:
    """Whether the first answer has the best score, bool [questions]."""
    return scores.argmax(axis=1) == 0


def better(scores: np.ndarray, shift: float | np.ndarray) -> np.ndarray:
    """Scores where the first answer's is higher by `shift`, for all questions or for each."""
    return scores + np.outer(shift, np.eye(4)[0])


def _questions(drawn: np.ndarray, accuracy: float) -> tuple[dict[str, Any], dict[str, Any]]:
    reference, variant = (
        statistics.MmluAnswers(right(scores), scores, np.zeros(len(scores), np.int64))
        for scores in (scores[drawn] for scores in population(accuracy)[:2])
    )
    return statistics.summarise_mmlu(variant, reference, ""), statistics.summarise_mmlu(reference, None, "")


# --- divergence ------------------------------------------------------------------------------------------------------


def _divergence(part: Any, limits: Row, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    windows = len(part.windows)
    window = np.repeat(np.arange(windows), part.window - 1)
    factor = _lognormal(WINDOWS, rng.normal(size=windows))
    mean, high = (OF_LIMIT * getattr(limits, f"kl_{name}_max") for name in ("mean", "p99"))
    # The 99th percentile of a lognormal of variance s² lies exp(2.326 s − s²/2) above its mean.
    spread = 2.326 - math.sqrt(max(0.0, 2.326**2 - 2 * math.log(high / mean)))
    within = math.sqrt(max(0.0, spread**2 - WINDOWS**2))
    kl = mean * factor[window] * _lognormal(within, rng.normal(size=len(window)))
    wrong = OF_LIMIT * (1 - limits.top1_min) * _lognormal(WINDOWS / 2, np.log(factor) / WINDOWS)  # type: ignore[attr-defined]
    equal = rng.random(len(window)) > wrong[window]
    excess = math.log1p(OF_LIMIT * (limits.perplexity_ratio_max - 1))  # type: ignore[attr-defined]
    change = excess * factor[window] + np.sqrt(_LOGPROB_VARIANCE * kl) * rng.normal(size=len(window))
    own = np.full(len(window), -2.0)
    nothing = np.zeros(len(window))
    return (
        statistics.summarise_divergence(kl, equal, own - change, own, window, part.windows),
        statistics.summarise_reference_divergence(own, nothing, nothing, window),
    )


def _lognormal(spread: float, normal: np.ndarray) -> np.ndarray:
    """Factors of mean 1."""
    return np.exp(spread * normal - spread**2 / 2)
