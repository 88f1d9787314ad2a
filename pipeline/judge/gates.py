"""Gates: from a variant's metrics to PASS, FAIL, INCONCLUSIVE or ERROR.

Each gate compares an interval with a limit: PASS when the one-sided 95 % bound is inside the limit, FAIL when the other
bound is outside, INCONCLUSIVE otherwise. So a small sample cannot pass by being small, and since a release needs every
gate, no number of gates makes a false pass more likely than one in twenty.

Which gates there are, the rows of the tasks say; here is a function for each kind of them:

- `AT_MOST`, `AT_LEAST`: an interval over windows of text is judged at the looks of `statistics.WINDOW_LOOKS` alone.
- `LOOKS`: a paired drop is judged at the looks of `sequential` alone, by the interval that holds at all looks together;
  an INCONCLUSIVE one asks for the next look. A model whose whole ability lies within the margin cannot pass. What is
  judged is the drop that `statistics.graded` shows.
- `VETO`: the drop in accuracy of the same looks. Beyond the margin it FAILs, otherwise it is REPORTED: it needs more
  questions to pass, and would only keep waiting what the finer figure knows.
- `FLOOR`: a paired drop that such a model's sample cannot see is REPORTED, decides nothing and says why.
- Without a margin a drop is REPORTED.
- `RATCHET` compares a build with the last release on the same tokens, so their estimates differ by the build alone
  and are compared without an interval. Without an earlier release, or on other text, it is REPORTED.
- A verdict in which no measurement was judged is an ERROR.

"Parity" in this module is the record of the parity stage: {"passed": bool, "max_relative_error": float,
"limit": float}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config.signing import ReleasedBuild
from pipeline.judge import sequential
from pipeline.judge.policy import Row
from pipeline.judge.verdicts import ERROR, FAIL, INCONCLUSIVE, PASS, REPORTED, GateLine, Verdict, overall
from pipeline.tasks.registry import gates, tasks
from pipeline.tasks.statistics import WINDOW_LOOKS, Interval, graded_interval, paired_interval
from pipeline.tasks.task import AT_LEAST, AT_MOST, FLOOR, LOOKS, RATCHET, VETO, Gate, Metrics, Task


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
    limits: Row
    permitted: bool | None
    ratchet: float
    released: ReleasedBuild | None


class _Unusable(Exception):
    """A measurement is missing or impossible; the line becomes an ERROR with this message."""


PARITY = Gate("parity", "parity", "max_relative_error", "parity with Optimum", lambda value: f"{value:.1e}")
PERMISSION = Gate("permission", "permission", "", "permission to release")


def rows() -> dict[str, Gate]:
    """The gates of all tasks, and those of no task, by the names of their lines."""
    return {gate.name: gate for gate in (PERMISSION, PARITY, *gates().values())}


def decide(metrics: Metrics, reference: Metrics, policy: Policy, parity: Metrics) -> Verdict:
    """Judge one variant.

    Args:
        metrics: the variant's metrics (shape: `statistics.summarise_*` by task).
        reference: the full-precision reference's metrics on the same items.
        policy: what it is held to.
        parity: the parity stage's record.

    A missing, NaN or impossible measurement is an ERROR line, never an exception and never a pass. A gate without a
    limit has no line where neither model was measured: the suite does not ask for its task.
    """
    lines = [_guarded(PARITY, _parity_line, parity)]
    if policy.permitted is not None:
        note = f"{policy.row} is released only for models that its opt_in in configs/gates.yaml names"
        allowed = GateLine(PERMISSION.name, PASS)
        lines.insert(0, allowed if policy.permitted else replace(allowed, verdict=FAIL, note=note))
    for task in tasks():
        known = any(isinstance(found, Mapping) and task.name in found for found in (metrics, reference))
        for gate in task.gates:
            limit = getattr(policy.limits, gate.limit) if gate.limit else None
            if known or limit is not None:
                lines.append(_guarded(gate, _line, task, metrics, reference, gate, limit, policy))
    return Verdict(overall(lines), tuple(lines), policy.row)


def _guarded(gate: Gate, line: Callable[..., GateLine], *arguments: Any) -> GateLine:
    try:
        return line(*arguments)
    except _Unusable as error:
        return GateLine(gate.name, ERROR, note=str(error))


def _line(
    task: Task, metrics: Metrics, reference: Metrics, gate: Gate, limit: float | None, policy: Policy
) -> GateLine:
    if gate.kind == RATCHET:
        return _ratchet_line(gate, _section(metrics, task.name, "variant"), task.unit, policy)
    return _KINDS[gate.kind](gate, _pair(task, metrics, reference), limit)


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


@dataclass(frozen=True)
class _Pair:
    """A task's section of a variant, and of the reference that it was paired with."""

    section: Metrics
    own: Metrics
    unit: str

    def interval(self, key: str, lowest: float, highest: float, open_end: bool = False) -> tuple[float, float, float]:
        """Low end, estimate and high end; infinite where, with `open_end`, the sample bounds nothing."""
        estimate, low = _number(self.section, key), _number(self.section, f"{key}_low")
        unbounded = open_end and self.section.get(f"{key}_high", math.nan) is None
        high = math.inf if unbounded else _number(self.section, f"{key}_high")
        if not lowest <= low <= estimate <= high or estimate > highest:
            raise _Unusable(f"impossible figures: estimate {estimate:.6g}, interval {low:.6g} to {high:.6g}")
        return low, estimate, high


def _pair(task: Task, metrics: Metrics, reference: Metrics) -> _Pair:
    """A measurement counts only when variant and reference met the same items, and are not the same model."""
    section, own = _section(metrics, task.name, "variant"), _section(reference, task.name, "reference")
    if own.get("n") != section.get("n"):  # the reference is asked all that may be asked, a variant ends at a look
        own = {**own, **(_at(own, section.get("n")) or {})}
    pairing = task.pairing
    assert pairing, "a task with gates has one"
    for field in pairing.same:
        if section.get(field) != own.get(field):
            raise _Unusable(
                f"variant has {field} {section.get(field)}, reference {own.get(field)}: not the same {pairing.what}"
            )
    found, expected = _number(section, pairing.mirrored), _number(own, pairing.key)
    if not math.isclose(expected, found, rel_tol=1e-6, abs_tol=1e-9):
        raise _Unusable(f"paired with a reference of {pairing.key} {found:.4f}, but it has {expected:.4f}")
    if pairing.moved and _number(section, pairing.moved) == 0:
        raise _Unusable("no token differs from the reference at all: the reference was measured in the variant's place")
    return _Pair(section, own, task.unit)


def _parity_line(parity: Metrics) -> GateLine:
    error, limit = _number(parity, "max_relative_error"), _number(parity, "limit")
    if parity.get("passed") is True and error <= limit:
        return GateLine(PARITY.name, PASS, estimate=error, limit=limit)
    note = "the exported graph does not compute what the reference export computes, so nothing below can be trusted"
    return GateLine(PARITY.name, ERROR, estimate=error, limit=limit, note=note)


# --- intervals -------------------------------------------------------------------------------------------------------


def _against(low: float, high: float, limit: float, at_least: bool = False) -> str:
    """Where an interval lies: inside the limit (PASS), outside (FAIL), across it (INCONCLUSIVE)."""
    if at_least:
        low, high, limit = -high, -low, -limit
    if high <= limit:
        return PASS
    return FAIL if low > limit else INCONCLUSIVE


def _interval_line(gate: Gate, pair: _Pair, limit: float) -> GateLine:
    low, estimate, high = pair.interval(gate.key, 0.0, gate.highest, open_end=True)
    windows, count = int(_number(pair.section, "windows")), int(_number(pair.section, pair.unit))
    bounded, known = math.isfinite(high), windows in WINDOW_LOOKS
    verdict = _against(low, high, limit, gate.kind == AT_LEAST) if known else INCONCLUSIVE
    note = "the whole interval lies outside the limit" if verdict == FAIL else ""
    if verdict == INCONCLUSIVE:
        why = "the interval crosses the limit" if bounded else "the sample does not bound this from above"
        why = why if known else f"it is judged at {' and '.join(map(str, WINDOW_LOOKS))} windows"
        following = next((f"the next look is at {look}" for look in WINDOW_LOOKS if look > windows), "no look is left")
        note = f"{why}: {count:,} {pair.unit} in {windows} windows do not decide; {following}"
    figures = (estimate, low, high if bounded else None, limit, _number(pair.section, f"{gate.key}_detectable"))
    return GateLine(gate.name, verdict, count, *figures, note)


def _ratchet_line(gate: Gate, section: Metrics, unit: str, policy: Policy) -> GateLine:
    count, estimate, released = int(_number(section, unit)), _number(section, gate.key), policy.released
    if released is None:
        return GateLine(gate.name, REPORTED, count, estimate, note="no earlier release of this model and variant")
    limit = policy.ratchet * released.kl_mean
    before = f"release {released.release} has {released.kl_mean:.4g} nats"
    perplexity = _number(section, "perplexity_reference")
    if count != released.tokens or not math.isclose(perplexity, released.perplexity_reference, rel_tol=1e-5):
        note = (
            f"not comparable with the last release: {before} on {released.tokens:,} tokens of perplexity "
            f"{released.perplexity_reference:.6g} to the reference, this build has {count:,} of {perplexity:.6g}: "
            f"text or reference differ"
        )
        return GateLine(gate.name, REPORTED, count, estimate, note=note)
    verdict = PASS if estimate <= limit else FAIL
    note = f"{before} on the same tokens; this build has {estimate / released.kl_mean:.2f} times that"
    return GateLine(gate.name, verdict, count, estimate, limit=limit, note=note)


_GRADED = "graded_drop_points"


# --- accuracy --------------------------------------------------------------------------------------------------------


def _drop(gate: Gate, pair: _Pair, margin: float | None) -> tuple[GateLine, float, str]:
    """The drop over all items that were asked: its line, the points of the reference that are surely above chance, and
    what it has in words."""
    section, own = pair.section, pair.own
    n, detectable = int(_number(section, "n")), _number(section, "detectable_drop_points")
    low, estimate, high = pair.interval("drop_points", -100.0, 100.0)
    chance = _number(own, "chance") if "chance" in own else 0.0  # what is written cannot be guessed
    accuracy, least = 100 * _number(own, gate.key), _number(own, f"{gate.key}_low")
    ability = 100 * (least - chance)
    if ability <= 0:
        standing = f"{accuracy:.1f} % (lower bound {100 * least:.1f} %), no more than chance ({100 * chance:.0f} %)"
    else:
        above = f" above chance ({100 * chance:.0f} %)" if chance else ""
        standing = f"{accuracy:.1f} %, of which {ability:.1f} points{above} are sure"
    verdict = REPORTED if margin is None else _against(low, high, margin)
    line = GateLine(gate.name, verdict, n, estimate, low, high, margin, detectable)
    return line, ability, f"the reference has {standing}"


def _blind(line: GateLine, standing: str) -> str:
    """What a sample cannot see, in words with numbers."""
    return f"{standing}; {line.n:,} items detect a drop of {line.detectable:.1f} points or more"


def _looks_line(gate: Gate, pair: _Pair, margin: float | None) -> GateLine:
    accuracy, ability, standing = _drop(gate, pair, margin)
    asked, (low, estimate, high) = accuracy.n or 0, pair.interval(_GRADED, -math.inf, math.inf)
    detectable = _number(pair.section, f"{_GRADED}_detectable")
    whole = replace(accuracy, estimate=estimate, low=low, high=high, detectable=detectable)
    if margin is None:
        return replace(whole, note=f"gates nothing: {_blind(whole, standing)}")
    look = sequential.reached(asked)
    if look is None:
        note = f"{asked:,} {pair.unit} decide nothing: the first look is at {sequential.LOOKS[0]:,}"
        return replace(whole, verdict=INCONCLUSIVE, note=note)
    change, error = (_number(_counts(look, pair), key) for key in ("graded", "graded_error"))
    if error < 0:
        raise _Unusable(f"impossible figures: a graded change of {change:.4g} with a standard error of {error:.4g}")
    drop = _within(whole, look, graded_interval(change, error, look.critical), margin)
    if drop.verdict == PASS and ability <= margin:
        return replace(drop, verdict=INCONCLUSIVE, note=f"cannot pass: {_blind(drop, standing)}")
    note = look.describe() + (f" ({asked:,} were asked)" if asked > look.n else "")
    if drop.verdict == FAIL:
        note = f"the whole interval lies beyond the margin; {note}"
    elif drop.verdict == INCONCLUSIVE:
        following = f"next look {look.next:,}" if look.next else f"no {pair.unit} are left to ask"
        sees = f"{look.n:,} {pair.unit} detect a drop of {drop.detectable:.1f} points, the margin is {margin:g}"
        note = f"{sees}; {note}, {following}"
    return replace(drop, note=note)


def _veto_line(gate: Gate, pair: _Pair, margin: float | None) -> GateLine:
    whole, _, standing = _drop(gate, pair, margin)
    look = sequential.reached(whole.n or 0)
    reported = replace(whole, verdict=REPORTED, note=f"refuses nothing: {_blind(whole, standing)}")
    if margin is None or look is None:
        return reported
    counts = _counts(look, pair)
    lost, won = (int(_number(counts, key)) for key in ("lost", "won"))
    if min(lost, won) < 0 or lost + won > look.n:
        raise _Unusable(f"impossible figures: {lost} lost and {won} won of {look.n:,} {pair.unit}")
    drop = _within(whole, look, paired_interval(look.n, lost, won, look.critical).points(), margin)
    if look.n == whole.n and not math.isclose(drop.estimate or 0.0, whole.estimate or 0.0, abs_tol=1e-6):
        raise _Unusable(f"{lost} lost and {won} won of {look.n:,} are not a drop of {whole.estimate:.4g} points")
    if drop.verdict == FAIL:
        return replace(drop, note=f"the whole interval lies beyond the margin; {look.describe()}")
    return replace(drop, verdict=REPORTED, note=f"not surely beyond the margin; {look.describe()}")


def _at(section: Metrics, n: object) -> Metrics | None:
    """A section's row of the look at `n` items; None where it has none."""
    looks = section.get("looks")
    known = [counts for counts in looks if isinstance(counts, Mapping)] if isinstance(looks, list) else []
    return next((counts for counts in known if counts.get("n") == n), None)


def _counts(look: sequential.Look, pair: _Pair) -> Metrics:
    """What a section knows of its first questions, at a look."""
    counts = _at(pair.section, look.n)
    if counts is None:
        raise _Unusable(f"the metrics have no counts at the look of {look.n:,} {pair.unit}")
    return counts


def _within(whole: GateLine, look: sequential.Look, found: Interval, margin: float) -> GateLine:
    return replace(whole, verdict=_against(found.low, found.high, margin), n=look.n, **asdict(found))


def _floor_line(gate: Gate, pair: _Pair, margin: float | None) -> GateLine:
    drop, ability, standing = _drop(gate, pair, margin)
    if margin is None or (ability <= margin and drop.verdict != FAIL):
        return replace(drop, verdict=REPORTED, note=f"gates nothing: {_blind(drop, standing)}")
    sees = f"{drop.n:,} items detect a drop of {drop.detectable:.1f} points, the margin is {margin:g}; ask more"
    notes = {PASS: "", FAIL: "the whole interval lies beyond the margin", INCONCLUSIVE: sees}
    return replace(drop, note=notes[drop.verdict])


_KINDS: dict[str, Callable[[Gate, _Pair, Any], GateLine]] = {
    AT_MOST: _interval_line,
    AT_LEAST: _interval_line,
    LOOKS: _looks_line,
    VETO: _veto_line,
    FLOOR: _floor_line,
}
