"""What to ship: the variant that each class of phones gets, by the arithmetic of tiers.json, and why not the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.phones import TiersConfig, load_tiers
from pipeline.errors import PipelineError
from pipeline.judge.measured import measured_candidate
from pipeline.judge.verdicts import PASS
from pipeline.planning import devices
from pipeline.planning.devices import Candidate, Decision, Need
from pipeline.report import cells
from pipeline.report.rows import ModelReport, Row
from pipeline.tasks.task import memory, nats

COLUMNS = ("phones", "get", "how", "peak memory")
NOTHING = "nothing"


@dataclass(frozen=True)
class Advice:
    """What to do with one model.

    Attributes:
        headline: the whole of it in a sentence.
        phones: the texts of `COLUMNS`, a row for each group of classes of phones with the same answer.
        others: why, by variant that no class gets.
    """

    headline: str
    phones: Sequence[Sequence[str]]
    others: Mapping[str, Sequence[str]]


def advise(model: ModelReport) -> Advice:
    """The advice on a model's measured and judged variants; one that lacks a figure goes to no phone."""
    tiers = load_tiers()
    candidates = {row.variant: one for row in model.variants if (one := _candidate(row))}
    decisions = {
        name: devices.decide(list(candidates.values()), tier, tiers, tiers.context)
        for name, tier in tiers.tiers.items()
    }
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, decision in decisions.items():
        groups.setdefault(_answer(name, decision, tiers), []).append(name)
    shipped = {name: one.chosen.candidate for name, one in decisions.items() if one.chosen}
    rest = [row for row in model.variants if row.variant not in {one.variant for one in shipped.values()}]
    return Advice(
        _headline([shipped[name].variant if name in shipped else NOTHING for name in decisions]),
        [(", ".join(names), *answer) for answer, names in groups.items()],
        {row.variant: _why_not(row, candidates.get(row.variant), shipped, tiers) for row in rest},
    )


def _candidate(row: Row) -> Candidate | None:
    try:
        return measured_candidate(row.variant, row.metrics, row.verdict.verdict if row.verdict else None)
    except PipelineError:
        return None


def _headline(got: Sequence[str]) -> str:
    """The whole advice in a sentence, from what each class gets."""
    counts = Counter(sorted(got, key=lambda name: name == NOTHING))
    if len(counts) == 1:
        return f"ship {got[0]} to all {len(got)} classes of phones"
    parts = ", ".join(f"{variant} to {count}" for variant, count in counts.items())
    return f"ship {parts} of {len(got)} classes of phones"


def _answer(name: str, decision: Decision, tiers: TiersConfig) -> tuple[str, str, str]:
    """What a class of phones gets, how it runs it, what that takes; or what it lacks."""
    if chosen := decision.chosen:
        return chosen.candidate.variant, _way(chosen.need), _takes(chosen.need)
    if (closest := decision.closest) is None:
        return NOTHING, "no variant passed its gates", cells.DASH
    lacks = devices.excess(closest.need, tiers.tiers[name], tiers)
    return NOTHING, f"{closest.candidate.variant} comes nearest", f"{memory(lacks)} too much"


def _way(found: Need) -> str:
    way = found.way
    weights = "weights mapped from storage" if way.weights == "mapped" else "weights in private memory"
    return f"{weights}, {way.context:,} tokens of context, chunks of {way.prefill_chunk}, {way.threads} threads"


def _takes(found: Need) -> str:
    return f"{memory(found.private)} private" + f" + {memory(found.mapped)} mapped" * bool(found.mapped)


def _why_not(
    row: Row, candidate: Candidate | None, shipped: Mapping[str, Candidate], tiers: TiersConfig
) -> Sequence[str]:
    if row.verdict and row.verdict.verdict != PASS:
        return cells.decided(row.verdict)
    if candidate is None:
        return ["its measurements lack a figure: validate it again"]
    held = devices.ways(candidate, tiers)
    if not held:
        name, tier = max(tiers.tiers.items(), key=lambda one: one[1].ram_bytes)
        lacks = devices.excess(devices.nearest(candidate.footprint, tier, tiers), tier, tiers)
        return [f"fits nowhere: {memory(lacks)} too much even for {name}"]
    better = {one.variant: one.kl_mean for name, one in shipped.items() if name in held and one.kl_mean is not None}
    figures = ", ".join(f"{nats(kl)} ({variant})" for variant, kl in better.items())
    return [f"every class that holds it holds a better one: mean KL {figures} against {nats(candidate.kl_mean or 0)}"]
