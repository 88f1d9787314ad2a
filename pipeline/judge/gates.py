"""Gates: from a variant's metrics to PASS, FAIL, INCONCLUSIVE or ERROR.

Each gate compares an interval with a limit: PASS when the one-sided 95 % bound is inside the limit, FAIL when the other
bound is outside, INCONCLUSIVE otherwise. So a small sample cannot pass by being small, and since a release needs every
gate, no number of gates makes a false pass more likely than one in twenty.

- MMLU is judged at the looks of `sequential` alone, by the interval that holds at all looks together; an INCONCLUSIVE
  one asks for the next look. A model whose whole ability lies within the margin cannot pass.
- HumanEval is a smoke floor: blind in the same way, it is REPORTED, decides nothing and says why.
- Without a margin an accuracy is REPORTED. So is the change of the correct answer's probability.
- The ratchet compares a build with the last release on the same tokens, so their estimates differ by the build alone
  and are compared without an interval. Without an earlier release, or on other text, it is REPORTED.
- A verdict in which no measurement was judged is an ERROR.

"Parity" in this module is the record of the parity stage: {"passed": bool, "max_relative_error": float,
"limit": float}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.gates import GateLimits, ReleasedBuild
from pipeline.errors import EvaluationError
from pipeline.judge import sequential
from pipeline.tasks.statistics import paired_interval

PASS, FAIL, INCONCLUSIVE, ERROR = "PASS", "FAIL", "INCONCLUSIVE", "ERROR"
REPORTED = "REPORTED"  # of a line only: shown, decides nothing
_EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 2, ERROR: 3}
_SEVERITY = (PASS, INCONCLUSIVE, FAIL, ERROR)

# metric of the `divergence` section, its field in GateLimits, whether the limit is a maximum
_DIVERGENCE_GATES = (
    ("kl_mean", "kl_mean_max", True),
    ("kl_p99", "kl_p99_max", True),
    ("top1", "top1_min", False),
    ("perplexity_ratio", "perplexity_ratio_max", True),
)

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class GateLine:
    """One gate's figures. Estimates, bounds, limit and detectable effect share the gate's unit.

    Units: nats for `kl_mean` and `kl_p99`, shares for `top1`, a ratio for `perplexity_ratio`, percentage points of
    drop for `mmlu`, `mmlu_probability` and `humaneval`, relative error for `parity`. `high` None: the sample does not
    bound it. Bounds of `mmlu` at a look hold at all looks together.
    """

    name: str
    verdict: str
    n: int | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    detectable: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The worst of the lines that decide, all lines, and the row of configs/gates.yaml that they were judged by."""

    verdict: str
    lines: tuple[GateLine, ...]
    row: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for a verdict file; `Verdict.from_json(v.to_json()) == v`."""
        return dataclasses.asdict(self) | {"lines": [dataclasses.asdict(line) for line in self.lines]}

    @classmethod
    def from_json(cls, data: Any) -> Verdict:
        """Parse a verdict file's content.

        Raises:
            EvaluationError: it is not a verdict, or its verdict is not the one its lines give.
        """
        try:
            verdict = cls(data["verdict"], tuple(GateLine(**line) for line in data["lines"]), data["row"])
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"not a verdict file ({type(error).__name__}: {error}). Validate again.") from None
        if not isinstance(verdict.row, str):
            raise EvaluationError(f"a verdict file names its limits as {verdict.row!r}. Validate again.")
        for line in verdict.lines:
            _check_types(line)
        if verdict.verdict != overall(verdict.lines):
            raise EvaluationError(
                f"a verdict file says {verdict.verdict}, but its own lines give {overall(verdict.lines)}: it was "
                f"edited or damaged. Validate again."
            )
        return verdict


def _check_types(line: GateLine) -> None:
    numbers = (line.n, line.estimate, line.low, line.high, line.limit, line.detectable)
    texts = isinstance(line.name, str) and isinstance(line.note, str)
    if not texts or not all(value is None or isinstance(value, int | float) for value in numbers):
        raise EvaluationError(f"a verdict file's line {line.name!r} holds a value of the wrong type. Validate again.")
    if line.verdict not in (*_EXIT_CODES, REPORTED):
        raise EvaluationError(f"a verdict file's line {line.name!r} says {line.verdict!r}. Validate again.")


@dataclass(frozen=True)
class Policy:
    """What one variant of one model is held to.

    Attributes:
        row: class and row of configs/gates.yaml, for people.
        limits: that row.
        permitted: whether the model may be released in this row at all; None where no permission is needed.
        ratchet: most that the mean KL may be of the last release's.
        released: the last earlier release of this model and variant.
    """

    row: str
    limits: GateLimits
    permitted: bool | None
    ratchet: float
    released: ReleasedBuild | None


class _Unusable(Exception):
    """A measurement is missing or impossible; the line becomes an ERROR with this message."""


def worst(verdicts: Iterable[str]) -> str:
    """The most severe of PASS < INCONCLUSIVE < FAIL < ERROR; ERROR for none at all."""
    return max(verdicts, key=_SEVERITY.index, default=ERROR)


def overall(lines: Iterable[GateLine]) -> str:
    """The worst deciding line. ERROR when no measurement decides: parity and permission say nothing about quality."""
    deciding = [line for line in lines if line.verdict != REPORTED]
    if not any(line.name not in ("parity", "permission") for line in deciding):
        return ERROR
    return worst(line.verdict for line in deciding)


def exit_code(verdict: str) -> int:
    """0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 ERROR."""
    return _EXIT_CODES[verdict]


def decide(metrics: Metrics, reference: Metrics, policy: Policy, parity: Mapping[str, Any]) -> Verdict:
    """Judge one variant.

    Args:
        metrics: the variant's metrics (shape: `statistics.summarise_*` by section).
        reference: the full-precision reference's metrics on the same items.
        policy: what it is held to.
        parity: the parity stage's record.

    A missing, NaN or impossible measurement is an ERROR line, never an exception and never a pass.
    """
    limits = policy.limits
    lines = [] if policy.permitted is None else [_permission_line(policy)]
    lines.append(_guarded(_parity_line, "parity", parity))
    for name, field, at_most in _DIVERGENCE_GATES:
        limit = getattr(limits, field)
        lines.append(_guarded(_divergence_line, name, metrics, reference, limit, at_most))
    lines.append(_guarded(_ratchet_line, "kl_ratchet", metrics, policy))
    lines.append(_guarded(_mmlu_line, "mmlu", metrics, reference, limits.mmlu_margin_points))
    lines.append(_guarded(_probability_line, "mmlu_probability", metrics, reference))
    lines.append(_guarded(_humaneval_line, "humaneval", metrics, reference, limits.humaneval_margin_points))
    return Verdict(overall(lines), tuple(lines), policy.row)


def _guarded(line: Callable[..., GateLine], name: str, *arguments: Any) -> GateLine:
    try:
        return line(name, *arguments)
    except _Unusable as error:
        return GateLine(name, ERROR, note=str(error))


def _number(section: Metrics, key: str) -> float:
    value = section.get(key) if isinstance(section, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unusable(f"{key} is missing from the metrics")
    if not math.isfinite(value):
        raise _Unusable(f"{key} is {value}")
    return value


def _section(metrics: Metrics, name: str, whose: str) -> Metrics:
    section = metrics.get(name) if isinstance(metrics, Mapping) else None
    if not isinstance(section, Mapping):
        raise _Unusable(f"the {whose}'s metrics have no {name} section: it was not measured")
    return section


def _ordered(low: float, estimate: float, high: float, lowest: float, highest: float) -> None:
    if not lowest <= low <= estimate <= high or estimate > highest:
        raise _Unusable(f"impossible figures: estimate {estimate:.6g}, interval {low:.6g} to {high:.6g}")


def _parity_line(name: str, parity: Mapping[str, Any]) -> GateLine:
    error, limit = _number(parity, "max_relative_error"), _number(parity, "limit")
    if parity.get("passed") is True and error <= limit:
        return GateLine(name, PASS, estimate=error, limit=limit)
    note = "the exported graph does not compute what the reference export computes, so nothing below can be trusted"
    return GateLine(name, ERROR, estimate=error, limit=limit, note=note)


def _permission_line(policy: Policy) -> GateLine:
    if policy.permitted:
        return GateLine("permission", PASS)
    note = f"{policy.row} is released only for models that its opt_in in configs/gates.yaml names"
    return GateLine("permission", FAIL, note=note)


def _against(low: float, high: float, limit: float, at_most: bool) -> str:
    """Where an interval lies: inside the limit (PASS), outside (FAIL), across it (INCONCLUSIVE)."""
    if not at_most:
        low, high, limit = -high, -low, -limit
    if high <= limit:
        return PASS
    return FAIL if low > limit else INCONCLUSIVE


def _divergence_line(name: str, metrics: Metrics, reference: Metrics, limit: float, at_most: bool) -> GateLine:
    section, own = _section(metrics, "divergence", "variant"), _section(reference, "divergence", "reference")
    _same_text(section, own)
    estimate, low = _number(section, name), _number(section, f"{name}_low")
    bounded = section.get(f"{name}_high", math.nan) is not None
    high = _number(section, f"{name}_high") if bounded else math.inf
    _ordered(low, estimate, high, 0.0, 1.0 if name == "top1" else math.inf)
    verdict, detectable = _against(low, high, limit, at_most), _number(section, f"{name}_detectable")
    tokens = int(_number(section, "tokens"))
    notes = {
        PASS: "",
        FAIL: "the whole interval lies outside the limit",
        INCONCLUSIVE: f"the interval crosses the limit: {tokens:,} tokens do not decide; score more"
        if bounded
        else f"{tokens:,} tokens do not bound this from above; score more",
    }
    return GateLine(name, verdict, tokens, estimate, low, high if bounded else None, limit, detectable, notes[verdict])


def _same_text(section: Metrics, own: Metrics) -> None:
    """A divergence counts only when variant and reference scored the same tokens, and are not the same model."""
    if _number(section, "tokens") != _number(own, "tokens"):
        raise _Unusable(f"variant scored {section['tokens']} tokens, reference {own['tokens']}: not the same text")
    expected, found = _number(own, "perplexity"), _number(section, "perplexity_reference")
    if not math.isclose(expected, found, rel_tol=1e-6):
        raise _Unusable(f"paired with a reference of perplexity {found:.6g}, but the reference's is {expected:.6g}")
    if _number(section, "kl_max") == 0:
        raise _Unusable("no token differs from the reference at all: the reference was measured in the variant's place")


# --- ratchet ---------------------------------------------------------------------------------------------------------


def _ratchet_line(name: str, metrics: Metrics, policy: Policy) -> GateLine:
    section, released = _section(metrics, "divergence", "variant"), policy.released
    tokens, estimate = int(_number(section, "tokens")), _number(section, "kl_mean")
    if released is None:
        return GateLine(name, REPORTED, tokens, estimate, note="no earlier release of this model and variant")
    limit = policy.ratchet * released.kl_mean
    before = f"release {released.release} has {released.kl_mean:.4g} nats"
    perplexity = _number(section, "perplexity_reference")
    if (tokens, True) != (released.tokens, math.isclose(perplexity, released.perplexity_reference, rel_tol=1e-5)):
        note = (
            f"not comparable with the last release: {before} on {released.tokens:,} tokens of perplexity "
            f"{released.perplexity_reference:.6g} to the reference, this build has {tokens:,} of {perplexity:.6g}: "
            f"text or reference differ"
        )
        return GateLine(name, REPORTED, tokens, estimate, note=note)
    verdict = PASS if estimate <= limit else FAIL
    note = f"{before} on the same tokens; this build has {estimate / released.kl_mean:.2f} times that"
    return GateLine(name, verdict, tokens, estimate, limit=limit, note=note)


# --- accuracy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drop:
    """A paired drop in percentage points, and what the reference has to lose."""

    n: int
    estimate: float
    low: float
    high: float
    detectable: float
    ability: float  # points that are surely above chance
    standing: str  # the reference's ability in words

    def line(self, name: str, verdict: str, margin: float | None, note: str = "") -> GateLine:
        return GateLine(name, verdict, self.n, self.estimate, self.low, self.high, margin, self.detectable, note)

    @property
    def blindness(self) -> str:
        """What this sample cannot see, in words with numbers."""
        return f"{self.standing}; {self.n:,} items detect a drop of {self.detectable:.1f} points or more"


def _drop(name: str, key: str, metrics: Metrics, reference: Metrics) -> _Drop:
    """The drop over all items that were asked."""
    section, own = _section(metrics, name, "variant"), _section(reference, name, "reference")
    _same_items(section, own, key)
    n, detectable = int(_number(section, "n")), _number(section, "detectable_drop_points")
    low, estimate, high = (_number(section, f"drop_points{end}") for end in ("_low", "", "_high"))
    _ordered(low, estimate, high, -100.0, 100.0)
    chance = _number(own, "chance") if "chance" in own else 0.0  # HumanEval cannot be guessed
    ability = 100 * (_number(own, f"{key}_low") - chance)
    return _Drop(n, estimate, low, high, detectable, ability, _standing(own, key, ability, 100 * chance))


def _standing(own: Metrics, key: str, ability: float, chance: float) -> str:
    accuracy, low = 100 * _number(own, key), 100 * _number(own, f"{key}_low")
    if ability <= 0:
        return f"the reference has {accuracy:.1f} % (lower bound {low:.1f} %), no more than chance ({chance:.0f} %)"
    above = f" above chance ({chance:.0f} %)" if chance else ""
    return f"the reference has {accuracy:.1f} %, of which {ability:.1f} points{above} are sure"


def _mmlu_line(name: str, metrics: Metrics, reference: Metrics, margin: float | None) -> GateLine:
    whole = _drop(name, "accuracy", metrics, reference)
    if margin is None:
        return whole.line(name, REPORTED, None, f"gates nothing: {whole.blindness}")
    look = sequential.reached(whole.n)
    if look is None:
        note = f"{whole.n:,} questions decide nothing: the first look is at {sequential.LOOKS[0]:,}"
        return whole.line(name, INCONCLUSIVE, margin, note)
    drop = _at_look(whole, look, metrics[name])
    verdict = _against(drop.low, drop.high, margin, at_most=True)
    if verdict == PASS and drop.ability <= margin:
        return drop.line(name, INCONCLUSIVE, margin, f"cannot pass: {drop.blindness}")
    asked = f" ({whole.n:,} were asked)" if whole.n > look.n else ""
    note = look.describe() + asked
    if verdict == FAIL:
        note = f"the whole interval lies beyond the margin; {note}"
    elif verdict == INCONCLUSIVE:
        following = f"next look {look.next:,}" if look.next else "no questions are left to ask"
        sees = f"{drop.n:,} questions detect a drop of {drop.detectable:.1f} points, the margin is {margin:g}"
        note = f"{sees}; {note}, {following}"
    return drop.line(name, verdict, margin, note)


def _at_look(whole: _Drop, look: sequential.Look, section: Metrics) -> _Drop:
    """The drop among the questions of a look, with that look's critical value."""
    looks = section.get("looks")
    known = [counts for counts in looks if isinstance(counts, Mapping)] if isinstance(looks, list) else []
    counts = next((counts for counts in known if counts.get("n") == look.n), None)
    if counts is None:
        raise _Unusable(f"the metrics have no counts at the look of {look.n:,} questions")
    lost, won = (int(_number(counts, key)) for key in ("lost", "won"))
    if min(lost, won) < 0 or lost + won > look.n:
        raise _Unusable(f"impossible figures: {lost} lost and {won} won of {look.n:,} questions")
    found = paired_interval(look.n, lost, won, look.critical)
    if look.n == whole.n and not math.isclose(100 * found.estimate, whole.estimate, abs_tol=1e-6):
        raise _Unusable(f"{lost} lost and {won} won of {look.n:,} are not a drop of {whole.estimate:.4g} points")
    points = (100 * value for value in (found.estimate, found.low, found.high, found.detectable))
    return _Drop(look.n, *points, whole.ability, whole.standing)


def _probability_line(name: str, metrics: Metrics, reference: Metrics) -> GateLine:
    section = _section(metrics, "mmlu", "variant")
    _same_items(section, _section(reference, "mmlu", "reference"), "accuracy")
    key = "probability_drop_points"
    low, estimate, high = (_number(section, f"{key}{end}") for end in ("_low", "", "_high"))
    _ordered(low, estimate, high, -math.inf, math.inf)
    n, detectable = int(_number(section, "n")), _number(section, f"{key}_detectable")
    return GateLine(name, REPORTED, n, estimate, low, high, None, detectable)


def _humaneval_line(name: str, metrics: Metrics, reference: Metrics, margin: float | None) -> GateLine:
    drop = _drop(name, "pass_at_1", metrics, reference)
    verdict = REPORTED if margin is None else _against(drop.low, drop.high, margin, at_most=True)
    if margin is None or (drop.ability <= margin and verdict != FAIL):
        return drop.line(name, REPORTED, margin, f"gates nothing: {drop.blindness}")
    notes = {
        PASS: "",
        FAIL: "the whole interval lies beyond the margin",
        INCONCLUSIVE: f"{drop.n:,} items detect a drop of {drop.detectable:.1f} points, the margin is {margin:g}; "
        f"ask more",
    }
    return drop.line(name, verdict, margin, notes[verdict])


def _same_items(section: Metrics, own: Metrics, key: str) -> None:
    for field in ("n", "mode", "prompt", "samples", "temperature"):
        if section.get(field) != own.get(field):
            raise _Unusable(f"variant has {field} {section.get(field)}, reference {own.get(field)}: not the same items")
    if not math.isclose(_number(section, f"reference_{key}"), _number(own, key), abs_tol=1e-9):
        raise _Unusable(f"paired with a reference of {section[f'reference_{key}']:.4f}, but it has {own[key]:.4f}")
