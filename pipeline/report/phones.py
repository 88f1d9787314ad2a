"""What phones get of each model, as lines of at most 118 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.phones import Device, Efficiency, TiersConfig
from pipeline.planning.devices import Candidate, Decision, Figure, Speed, Suggestion, budget_bytes, resident_bytes

WIDTH = 118
_VARIANTS = ("variant", "download, bytes", "weights", "activations", "KV cache", "loading", "peak", "basis", "KL, nats")
_TIERS = ("tier", "may use", "gets")
_DEVICES = ("phone", "tier", "GB/s", "at most", "expected", "tokens/s of")
LEGEND = (
    "Peak: the larger of loading, and of weights as loaded, activations and KV cache together; then the runtime. Only "
    "private memory counts against a tier; weights mapped from a prepacked file have to stay in RAM besides (docs/"
    "devices.md).",
    "Basis: measured on the written file in this runtime; computed from shapes; bound: at most so much, because a "
    "recipe with a budget is solved only after the sensitivity stage. Measured figures include the test's own process.",
    "A variant that no gate has judged is chosen by its size, and may still be refused for its quality. No opt_in: "
    "configs/gates.yaml does not let it be released for this model.",
)
_CHANGES = {
    "prepacked": "weights mapped from a prepacked file",
    "int8-kv": "int8 KV cache",
    "shorter-context": "a shorter context",
}


@dataclass(frozen=True)
class DeviceAnswer:
    """What a phone runs, in its tier's way, and how fast at most."""

    device: Device
    runs: Suggestion | None
    speed: Speed | None


@dataclass(frozen=True)
class ModelAnswer:
    """One model on every tier and phone that was asked about. `origin`: where its shapes are from;
    `permitted`: variants that configs/gates.yaml lets be released."""

    model: str
    title: str
    parameters: int
    origin: str
    candidates: Sequence[Candidate]
    permitted: frozenset[str]
    decisions: Mapping[str, Decision]
    devices: Mapping[str, DeviceAnswer]


@dataclass(frozen=True)
class Answer:
    """The whole answer; `context` in tokens."""

    context: int
    tiers: TiersConfig
    efficiency: Efficiency
    models: Sequence[ModelAnswer]


def lines(found: Answer) -> list[str]:
    """For people."""
    text = [
        f"At {found.context:,} tokens of context, {found.tiers.runtime_bytes:,} bytes for runtime and app (assumed)."
    ]
    for item in found.models:
        text += ["", f"{item.model}: {item.title}, {item.parameters:,} parameters, shapes from {item.origin}"]
        text += _variants(item) + _tiers(item, found) + _devices(item)
    text += ["", *(line for sentence in (*LEGEND, _speed_legend(found.efficiency)) for line in _wrapped(sentence))]
    text += [line for platform, source in found.tiers.sources.items() for line in _wrapped(f"{platform}: {source}.")]
    return text


def _speed_legend(efficiency: Efficiency) -> str:
    return (
        f"Tokens/s: memory bandwidth ÷ bytes that a token reads, with a full and an empty cache: a bound. Expected: "
        f"{efficiency.low:.0%} of the first to {efficiency.high:.0%} of the second, no promise ({efficiency.source})."
    )


def _variants(item: ModelAnswer) -> list[str]:
    needs = next(iter(item.decisions.values())).needs
    rows = [_VARIANTS]
    for candidate in item.candidates:
        need, footprint = needs[candidate.variant], candidate.footprint
        quality = "not measured" if candidate.kl_mean is None else f"{candidate.kl_mean:.3g}"
        if candidate.verdict:
            quality += f", {candidate.verdict}"
        if candidate.variant not in item.permitted:
            quality += ", no opt_in"
        rows.append(
            (
                candidate.variant,
                f"{_at_most(footprint.download)}{footprint.download.bytes:,}",
                *(gigabytes(need.parts[name].bytes) for name in ("weights", "activations", "kv_cache", "loading")),
                gigabytes(need.private),
                need.basis,
                quality,
            )
        )
    return _table(rows, left={0, 7, 8})


def _at_most(figure: Figure) -> str:
    return "≤ " if figure.basis == "bound" else ""


def _tiers(item: ModelAnswer, found: Answer) -> list[str]:
    wide, text = max(map(len, (*item.decisions, _TIERS[0]))), []
    for name, decision in item.decisions.items():
        tier = found.tiers.tiers[name]
        head = f"  {name.ljust(wide)}  {gigabytes(budget_bytes(tier)):>8}  "
        text += _wrapped(f"{head}{_gets(decision, budget_bytes(tier))}", indent=" " * (len(head) + 2), first="")
        for suggestion in decision.suggestions:
            sentence = f"would fit: {_in_words(suggestion, found, name)}"
            text += _wrapped(sentence, " " * len(head))
    return [f"  {_TIERS[0].ljust(wide)}  {_TIERS[1]:>8}  {_TIERS[2]}", *text]


def _gets(decision: Decision, budget: int) -> str:
    if decision.chosen:
        need = decision.needs[decision.chosen.variant]
        return f"{decision.chosen.variant}: peak {gigabytes(need.private)} ({need.basis})"
    if decision.closest is None:
        return "nothing: no variant passed its gates"
    need = decision.needs[decision.closest.variant]
    over = need.private - budget
    closest = f"{decision.closest.variant} needs {gigabytes(need.private)} ({need.basis})"
    return f"nothing: {closest}, {gigabytes(over)} too much"


def _in_words(found: Suggestion, answer: Answer, tier: str) -> str:
    """`q4 with weights mapped from a prepacked file: 1.37 GB private, 6.4 of 6.8 GB with what is mapped`."""
    changes = [_CHANGES[change] for change in found.changes if change in _CHANGES]
    if "shorter-context" in found.changes:
        changes[-1] = f"a context of {found.way.context:,} tokens"
    text = f"{_name(found)} with {', '.join(changes)}" if changes else _name(found)
    text += f": {gigabytes(found.need.private)} private"
    if found.need.mapped:
        total, most = found.need.private + found.need.mapped, resident_bytes(answer.tiers.tiers[tier], answer.tiers)
        text += f", {gigabytes(total)} with what is mapped, of {gigabytes(most)}"
    return f"{text} ({found.need.basis})"


def _devices(item: ModelAnswer) -> list[str]:
    rows = [_DEVICES]
    for phone in item.devices.values():
        bandwidth = f"{phone.device.memory_bandwidth / 1e9:.1f}"
        bound, expected = "–", "–"
        if phone.speed:
            bound = f"{phone.speed.most_full:.1f}–{phone.speed.most_empty:.1f}"
            expected = f"{phone.speed.low:.1f}–{phone.speed.high:.1f}"
        rows.append((phone.device.title, phone.device.tier, bandwidth, bound, expected, _runs(phone.runs)))
    return _table(rows, left={0, 1, 5}) if item.devices else []


def _runs(runs: Suggestion | None) -> str:
    if runs is None:
        return "nothing fits"
    shorter = f"{runs.way.context:,} tokens"
    changes = [shorter if change == "shorter-context" else change for change in runs.changes if change in _CHANGES]
    return ", ".join([_name(runs), *changes])


def _name(found: Suggestion) -> str:
    return f"{found.model} {found.candidate.variant}" if found.model else found.candidate.variant


def gigabytes(count: int) -> str:
    """2.41 GB, decimal."""
    return f"{count / 1e9:.2f} GB"


def _table(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def _wrapped(sentence: str, first: str = "", indent: str | None = None) -> list[str]:
    follow = f"{first}  " if indent is None else indent
    return textwrap.wrap(
        sentence, WIDTH, initial_indent=first, subsequent_indent=follow, break_on_hyphens=False, drop_whitespace=True
    )
