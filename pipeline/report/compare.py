"""compare: two variants side by side, with intervals of what they differ in, and what both answer; text or JSON.

Differences are second less first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.files import sha256_of
from pipeline.report import pairs
from pipeline.report.columns import aligned, wrapped
from pipeline.report.sides import Side, find_side
from pipeline.runtime.chat import template_text
from pipeline.runtime.generate import Limits, Writer
from pipeline.tasks.registry import tasks
from pipeline.tasks.statistics import Interval
from pipeline.tasks.task import DASH, Format, Metrics, bounds, maybe, memory, nats, number, percent, share
from pipeline.workspace import PLAN_FILE, REFERENCE

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
)
_TOKENS = 64  # of an answer
_SHOWN = 3  # flipped items of each kind


@dataclass(frozen=True)
class Line:
    """A line of the table: a metric, how it is shown, and how two values differ, shown with its unit."""

    title: str
    section: str
    key: str
    format: Format
    ends: Format
    change: Callable[[float, float], float] = lambda first, second: 100 * (second / first - 1)
    shown: Format = "{:+z.1f}".format
    unit: str = " %"


_POINTS = (lambda first, second: second - first, lambda value: f"{100 * value:+z.1f}", " points")
_whole, _two, _three = "{:,.0f}".format, "{:.2f}".format, "{:.3f}".format
_LINES = (
    Line("bytes on disk", "size", "bytes_on_disk", _whole, _whole),
    Line("bits per weight", "size", "bits_per_weight", _two, _two),
    Line("private memory, loaded", "speed", "load_peak_private_bytes", memory, memory),
    Line("private memory, peak", "speed", "peak_private_bytes", memory, memory),
    Line("mean KL, nats per token", "divergence", "kl_mean", nats, nats, lambda a, b: b - a, "{:+z.3f}".format, ""),
    Line("same top token", "divergence", "top1", share, percent, *_POINTS),
    Line(
        "perplexity ratio", "divergence", "perplexity_ratio", _three, _three, lambda a, b: b / a, "× {:.3f}".format, ""
    ),
    Line("MMLU accuracy", "mmlu", "accuracy", share, percent, *_POINTS),
    Line("HumanEval pass@1", "humaneval", "pass_at_1", share, percent, *_POINTS),
    Line("tokens/s", "speed", "tokens_per_second", "{:.1f}".format, "{:.1f}".format),
    Line("first token, seconds", "speed", "time_to_first_token_seconds", _three, _three),
)


def run(first: str, second: str, model: str | None, prompts: Sequence[str], answers: bool, as_json: bool) -> None:
    """Print how `second` differs from `first`, variants of `model` or folders.

    Raises:
        ConfigError: there is no such variant or model, or several models and none was named.
        EvaluationError: a side was not measured, or cannot be loaded.
    """
    sides = [find_side(text, model) for text in (first, second)]
    found = _compared(sides)
    if answers:
        found["answers"], unanswered = _answers(sides, prompts or PROMPTS)
        found["notes"] += unanswered
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(_text(sides, found)))


# --- figures ---------------------------------------------------------------------------------------------------------


def _compared(sides: Sequence[Side]) -> dict[str, Any]:
    """The document that `--json` prints: figures (value, interval, difference), flipped items, notes."""
    differences, flips, notes = _paired(sides)
    figures = {}
    for line in _LINES:
        values = [number(side.section(line.section), line.key) for side in sides]
        if any(value is not None for value in values):
            ends = [
                [number(side.section(line.section), f"{line.key}_{end}") for end in ("low", "high")] for side in sides
            ]
            figures[f"{line.section}.{line.key}"] = {
                "values": values, "intervals": ends, "difference": differences.get(line.key)
            }  # fmt: skip
    names, verdicts = [side.name for side in sides], [side.verdict for side in sides]
    notes += [note for side in sides if (note := _stale(side))]
    notes += [f"{side.name} was not measured: {side.measure}" for side in sides if not side.section("identity")]
    return {"sides": names, "verdicts": verdicts, "figures": figures, "flips": flips, "notes": notes}


def _stale(side: Side) -> str:
    """Whether the artifact at hand is another than the measured one, in words."""
    measured = side.section("identity").get("plan_sha256")
    plan = side.folder and side.folder / PLAN_FILE
    if not measured or not plan or not plan.exists() or sha256_of(plan) == measured:
        return ""
    return f"{side.name}: its figures are of another artifact than lies in {side.folder}: {side.measure}"


def _paired(sides: Sequence[Side]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Differences with intervals by metric, flipped items by task, and what could not be paired."""
    first, second = (side.evaluation for side in sides)
    keys = {"divergence": "kl_mean"} | {name: key for name, (key, _) in pairs.ITEMS.items()}
    shared = [name for name, key in keys.items() if all(key in side.section(name) for side in sides)]
    if first is None or second is None:
        absent = " and ".join(f"{side.name} ({side.measure})" for side in sides if not side.evaluation)
        return {}, {}, [f"nothing is paired: there are no results by item of {absent}"] if shared else []
    differences: dict[str, Interval] = {}
    flips, notes = {}, []
    for name in shared:
        if problem := pairs.why_not(name, first, second, [side.section(name) for side in sides]):
            notes.append(f"{name} is not paired: {problem}")
        elif name == "divergence":
            differences |= pairs.divergence(first, second, first.parent / REFERENCE)
        elif found := pairs.flipped(name, first, second):
            differences[pairs.ITEMS[name][0]] = found.difference
            flips[name] = {"n": found.n, "only_first": found.only_first, "only_second": found.only_second}
    return {key: dataclasses.asdict(value) for key, value in differences.items()}, flips, notes


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers(sides: Sequence[Side], prompts: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """What both say to each prompt; nothing, and why, where one of them is not on this machine."""
    if lacking := [f"{side.name} ({side.make})" for side in sides if side.folder is None]:
        return [], [f"no answers: there is no artifact of {' and '.join(lacking)}"]
    told = [_told(side.folder, prompts) for side in sides if side.folder]
    return [{"prompt": prompt, "answers": both} for prompt, *both in zip(prompts, *told, strict=True)], []


def _told(folder: Path, prompts: Sequence[str]) -> list[str]:
    """The greedy beginnings of a model's answers: one model is in memory at a time."""
    writer = Writer(folder)
    ask: Callable[[str], str] = writer.chat if template_text(folder) else str
    asked = [ask(prompt) for prompt in prompts]
    if (longest := max(len(writer.tokenizer.encode(text)) for text in asked)) + _TOKENS > writer.context:
        raise EvaluationError(
            f"{folder}: a prompt of {longest:,} tokens and {_TOKENS} of an answer exceed the context of "
            f"{writer.context:,}. Shorten --prompt, or give --no-answers."
        )
    written = [writer.continuation(text, Limits(_TOKENS), lambda _: False) for text in asked]
    return [text.text + " …" * bool(text.cut) for text in written]


# --- text ------------------------------------------------------------------------------------------------------------


def _text(sides: Sequence[Side], found: dict[str, Any]) -> list[str]:
    rows = [("", *found["sides"], "difference")]
    for line in _LINES:
        if figure := found["figures"].get(f"{line.section}.{line.key}"):
            rows.append(
                (line.title, *(_cell(line, side.section(line.section)) for side in sides), _change(line, figure))
            )
    rows.append(("verdict", *(verdict or DASH for verdict in found["verdicts"]), ""))
    text = [*aligned(rows, {0}), "", *wrapped(f"Difference: from {sides[0].name} to {sides[1].name}; {_LEGEND}")]
    for task, items in found["flips"].items():
        text += ["", *_flipped(sides, task, items)]
    text += [line for note in found["notes"] for line in wrapped(f"Note: {note}.")]
    for item in found.get("answers", ()):
        text += ["", *wrapped(item["prompt"], "? ")]
        for side, answer in zip(sides, item["answers"], strict=True):
            text += [f"{side.name}:", *(row for part in answer.strip().splitlines() for row in wrapped(part, "  "))]
    return text


_LEGEND = (
    "intervals are two-sided, 90 %. A difference with an interval is paired, over the same tokens or items; one "
    "without is that of the two figures. Speeds and memory belong to the run that measured them."
)


def _cell(line: Line, section: Metrics) -> str:
    ends = bounds(section, line.key, line.ends)
    return maybe(number(section, line.key), line.format) + (f" ({ends})" if ends else "")


def _change(line: Line, figure: dict[str, Any]) -> str:
    if paired := figure["difference"]:
        low, high = (line.shown(paired[end]).removeprefix("× ") for end in ("low", "high"))
        return f"{line.shown(paired['estimate'])} ({low} to {high}){line.unit}"
    try:
        return line.shown(line.change(*figure["values"])) + line.unit
    except (TypeError, ZeroDivisionError):  # one of them was not measured, or is nothing
        return DASH


def _flipped(sides: Sequence[Side], task: str, items: dict[str, Any]) -> list[str]:
    kinds = (items["only_first"], items["only_second"])
    counts = ", ".join(f"{len(kind)} only {side.name} has right" for side, kind in zip(sides, kinds, strict=True))
    title = next(one.title for one in tasks() if one.name == task)
    text = [f"{title}, {items['n']:,} items in both: {counts}"]
    for side, kind in zip(sides, kinds, strict=True):
        text += [row for item in kind[:_SHOWN] for row in wrapped(f"{side.name}  {item}", "  ", "    ")]
    return text
