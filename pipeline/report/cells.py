"""Numbers as text: the words of the table, of gate lines and of the sentence on power. No layout here."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.judge.gates import rows
from pipeline.judge.verdicts import REPORTED, GateLine, Verdict
from pipeline.report.rows import ModelReport, Row
from pipeline.tasks.registry import tasks
from pipeline.tasks.task import AT_LEAST, AT_MOST, DASH, FLOOR, LOOKS, Gate, Task, maybe, number

GATE_COLUMNS = ("gate", "verdict", "n", "estimate", "90 % interval", "limit", "detectable")
POWER_LEGEND = (
    "Detectable: the excess over the limit (for accuracy: the drop) that this sample reveals with 80 % power in a "
    "one-sided test at 5 %. Intervals are two-sided 90 %, so each end is a one-sided 95 % bound; a line passes when "
    "its bound does. pass@1 is HumanEval's; (90 %) marks intervals."
)
CAVEATS = (
    "Divergence says how far a variant is from its own full-precision model, not which way; MMLU and HumanEval say "
    "what was lost of that model's ability, not how large the ability is.",
    "Everything was measured on the system named above, in the runtime that ships. A phone's kernels round otherwise, "
    "and its speed is its own.",
)


def table(model: ModelReport) -> list[list[tuple[str, str]]]:
    """Both lines of every cell: the heading's, then each row's. Tasks that no row was measured in have no columns."""
    measured = [task for task in tasks() if any(row.section(task.name) for row in model.rows)]
    shown = [(task.name, column) for task in measured for column in task.columns]
    grid = [[("variant", ""), ("verdict", ""), ("bytes on disk", "bits/weight"), *(one.heading for _, one in shown)]]
    for row in model.rows:
        size, verdict = row.section("size"), row.verdict.verdict if row.verdict else DASH
        total = maybe(number(size, "bytes_on_disk"), "{:,.0f}".format)
        bits = maybe(number(size, "bits_per_weight"), "{:.2f}".format)
        cells = [column.cells(row.section(name)) for name, column in shown]
        grid.append([(row.variant, ""), (verdict, ""), (total, bits), *cells])
    return grid


def identity(row: Row, beside: Row | None = None) -> dict[str, str]:
    """What tells this row's subject from any other, and what ran it, as facts by name; none that `beside` shares."""
    known = identity(beside) if beside else {}
    found, size = row.section("identity"), number(row.section("size"), "bytes_on_disk")
    runtimes = [f"{name} {found[name]}" for name in ("onnxruntime", "onnxruntime-genai") if name in found]
    facts = {
        "source": found.get("revision"),
        "bytes": size and f"{size:,.0f}",
        "plan": found.get("plan_sha256") and f"sha256 {found['plan_sha256']}",
        "judged as": row.verdict and f"{row.verdict.row} of configs/gates.yaml",
        "measured by": runtimes and f"{', '.join(runtimes)} on {found.get('system', 'an unknown system')}",
        "full precision on": found.get("device"),
    }
    return {name: fact for name, fact in facts.items() if fact and known.get(name) != fact}


# --- gates -----------------------------------------------------------------------------------------------------------


def _gate(line: GateLine) -> Gate:
    return rows().get(line.name) or Gate(line.name, AT_MOST, "", line.name)


def gate_cells(line: GateLine) -> list[str]:
    """One line's text for each of `GATE_COLUMNS`."""
    gate = _gate(line)
    interval = DASH
    if line.low is not None:
        high = gate.format(line.high) if line.high is not None else "unbounded"
        interval = f"{gate.format(line.low).split()[0]} to {high}"
    return [
        gate.title,
        "reported" if line.verdict == REPORTED else line.verdict,
        DASH if line.n is None else f"{line.n:,}",
        maybe(line.estimate, gate.format),
        interval,
        DASH if line.limit is None else f"{'≥' if gate.kind == AT_LEAST else '≤'} {gate.format(line.limit)}",
        maybe(line.detectable, gate.effect or gate.format),
    ]


def decided(verdict: Verdict) -> list[str]:
    """The lines that made a verdict what it is, in words; what several of them have to say is said once."""
    found, said = [], {""}
    for line in (line for line in verdict.lines if line.verdict == verdict.verdict):
        title, _, _, estimate, interval, limit, _ = gate_cells(line)
        text = title + f" {estimate}" * (estimate != DASH) + f" ({interval})" * (interval != DASH)
        text += f", limit {limit}" * (limit != DASH) + f": {line.note}" * (line.note not in said)
        found.append(text)
        said.add(line.note)
    return found


def reasons(row: Row) -> list[str]:
    """What the lines of a row's verdict have to say: why one did not pass, which look this was, with numbers."""
    lines = row.verdict.lines if row.verdict else ()
    return [f"{_gate(line).title}: {line.note}." for line in lines if line.note]


# --- sentences -------------------------------------------------------------------------------------------------------


def legends() -> list[str]:
    """How to read what is shown."""
    return [POWER_LEGEND, *(task.legend for task in tasks() if task.legend)]


def conditions(model: ModelReport) -> str:
    """How tasks were run, as recorded with the reference."""
    told = [task.conditions(own) for task in tasks() if task.conditions and (own := model.reference.section(task.name))]
    return "; ".join(told) + "." * bool(told)


def notes(model: ModelReport) -> list[str]:
    """What tasks say of each row besides their columns; the finer task before the one that it is made from."""
    sentences = []
    for task in sorted(tasks(), key=lambda task: task.reads is None):
        for note in task.notes:
            parts = [f"{row.variant} {text}" for row in model.rows if (text := note.part(row.section(task.name)))]
            if parts:
                sentences.append(f"{note.heading(model.reference.section(task.name))}: {', '.join(parts)}.")
    return sentences


def power_sentences(model: ModelReport) -> list[str]:
    """What this run's sample sizes can and cannot detect, a sentence for each task that has gates."""
    lines = [line for row in model.variants if row.verdict for line in row.verdict.lines]
    sentences = [describe(task, lines) for task in tasks() for describe in (_interval_power, _drop_power)]
    return [sentence for sentence in sentences if sentence]


def _least_known(task: Task, lines: Sequence[GateLine], *kinds: str) -> list[tuple[Gate, GateLine, str]]:
    """A task's gates of these kinds, each with the line whose detectable effect is largest, and that in words."""
    found = []
    for gate in task.gates:
        known = [(line.detectable, line) for line in lines if line.name == gate.name and line.detectable is not None]
        if gate.kind in kinds and gate.effect and known:
            effect, line = max(known, key=lambda pair: pair[0])
            found.append((gate, line, gate.effect(effect)))
    return found


def _interval_power(task: Task, lines: Sequence[GateLine]) -> str:
    known = _least_known(task, lines, AT_MOST, AT_LEAST)
    if not known:
        return ""
    side = {AT_MOST: "above", AT_LEAST: "below"}
    effects = ", ".join(f"{gate.title} {effect} {side[gate.kind]} its limit" for gate, _, effect in known)
    return f"{known[0][1].n:,} {task.unit} can detect: {effects}; a smaller excess can go unseen."


def _drop_power(task: Task, lines: Sequence[GateLine]) -> str:
    for gate, line, effect in _least_known(task, lines, LOOKS, FLOOR):
        text = f"{line.n:,} {task.title} {task.unit} can detect a drop of {effect} and nothing smaller"
        if line.verdict == REPORTED:
            return f"{text}: {task.title} gates nothing here."
        margins = sorted({one.limit for one in lines if one.name == gate.name and one.limit is not None})
        return f"{text}; its margins: {', '.join(f'{margin:g}' for margin in margins)} points."
    return ""
