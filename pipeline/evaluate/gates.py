"""Gates: from a variant's metrics to PASS, FAIL, INCONCLUSIVE or ERROR.

Each gate compares an interval with a limit: PASS when the one-sided 95 % bound is inside the limit, FAIL when the other
bound is outside, INCONCLUSIVE otherwise. So a small sample cannot pass by being small. No gate passes by being blind
either: an accuracy gate counts only where losing the whole ability would exceed its margin; without a margin it is
REPORTED, decides nothing and says why; and a verdict in which nothing was judged is an ERROR.

"Parity" in this module is the record of the parity stage: {"passed": bool, "max_relative_error": float,
"limit": float}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import GateLimits
from pipeline.errors import EvaluationError

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
    drop for `mmlu` and `humaneval`, relative error for `parity`. `high` None: the sample does not bound it.
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
    """The worst of the lines that decide, and all lines."""

    verdict: str
    lines: tuple[GateLine, ...]

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
            verdict = cls(data["verdict"], tuple(GateLine(**line) for line in data["lines"]))
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"not a verdict file ({type(error).__name__}: {error}). Validate again.") from None
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


class _Unusable(Exception):
    """A measurement is missing or impossible; the line becomes an ERROR with this message."""


def worst(verdicts: Iterable[str]) -> str:
    """The most severe of PASS < INCONCLUSIVE < FAIL < ERROR; ERROR for none at all."""
    return max(verdicts, key=_SEVERITY.index, default=ERROR)


def overall(lines: Iterable[GateLine]) -> str:
    """The worst deciding line. ERROR when no measurement decides: parity alone says nothing about quality."""
    deciding = [line for line in lines if line.verdict != REPORTED]
    if not any(line.name != "parity" for line in deciding):
        return ERROR
    return worst(line.verdict for line in deciding)


def exit_code(verdict: str) -> int:
    """0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 ERROR."""
    return _EXIT_CODES[verdict]


def decide(metrics: Metrics, reference: Metrics, limits: GateLimits, parity: Mapping[str, Any]) -> Verdict:
    """Judge one variant.

    Args:
        metrics: the variant's metrics (shape: `statistics.summarise_*` by section).
        reference: the full-precision reference's metrics on the same items.
        limits: the row of configs/gates.yaml for the model's class and this variant.
        parity: the parity stage's record.

    A missing, NaN or impossible measurement is an ERROR line, never an exception and never a pass.
    """
    lines = [_guarded(_parity_line, "parity", parity)]
    for name, field, at_most in _DIVERGENCE_GATES:
        limit = getattr(limits, field)
        lines.append(_guarded(_divergence_line, name, metrics, reference, limit, at_most))
    margins = (
        ("mmlu", "accuracy", limits.mmlu_margin_points),
        ("humaneval", "pass_at_1", limits.humaneval_margin_points),
    )
    for name, key, margin in margins:
        lines.append(_guarded(_accuracy_line, name, key, metrics, reference, margin))
    return Verdict(overall(lines), tuple(lines))


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


def _accuracy_line(name: str, key: str, metrics: Metrics, reference: Metrics, margin: float | None) -> GateLine:
    section, own = _section(metrics, name, "variant"), _section(reference, name, "reference")
    _same_items(section, own, key)
    n, detectable = int(_number(section, "n")), _number(section, "detectable_drop_points")
    estimate = _number(section, "drop_points")
    low, high = _number(section, "drop_points_low"), _number(section, "drop_points_high")
    _ordered(low, estimate, high, -100.0, 100.0)
    figures = (n, estimate, low, high, margin, detectable)
    ability = 100 * (_number(own, f"{key}_low") - _chance(own))  # points that are surely there to lose
    blindness = _blindness(own, key, ability, n, detectable)
    if margin is None:
        return GateLine(name, REPORTED, *figures, note=f"gates nothing: {blindness}")
    verdict = _against(low, high, margin, at_most=True)
    if verdict == PASS and ability <= margin:
        return GateLine(name, INCONCLUSIVE, *figures, note=f"cannot pass: {blindness}")
    notes = {
        PASS: "",
        FAIL: "the whole interval lies beyond the margin",
        INCONCLUSIVE: f"{n:,} items detect a drop of {detectable:.1f} points, the margin is {margin:g}; ask more",
    }
    return GateLine(name, verdict, *figures, note=notes[verdict])


def _same_items(section: Metrics, own: Metrics, key: str) -> None:
    for field in ("n", "mode"):
        if section.get(field) != own.get(field):
            raise _Unusable(f"variant has {field} {section.get(field)}, reference {own.get(field)}: not the same items")
    if not math.isclose(_number(section, f"reference_{key}"), _number(own, key), abs_tol=1e-9):
        raise _Unusable(f"paired with a reference of {section[f'reference_{key}']:.4f}, but it has {own[key]:.4f}")


def _chance(own: Metrics) -> float:
    """Accuracy of guessing: HumanEval has none."""
    return _number(own, "chance") if "chance" in own else 0.0


def _blindness(own: Metrics, key: str, ability: float, n: int, detectable: float) -> str:
    """What this sample cannot see, in words with numbers."""
    accuracy, low = 100 * _number(own, key), 100 * _number(own, f"{key}_low")
    chance = 100 * _chance(own)
    if ability <= 0:
        standing = f"the reference has {accuracy:.1f} % (lower bound {low:.1f} %), no more than chance ({chance:.0f} %)"
    else:
        above = f" above chance ({chance:.0f} %)" if chance else ""
        standing = f"the reference has {accuracy:.1f} %, of which {ability:.1f} points{above} are sure"
    return f"{standing}; {n:,} items detect a drop of {detectable:.1f} points or more"
