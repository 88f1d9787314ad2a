"""Numbers as text: the words of the table, of gate lines and of the sentence on power. No layout here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from pipeline.judge.gates import REPORTED, GateLine
from pipeline.report.rows import REFERENCE, ModelReport, Row, number

DASH = "–"
COLUMNS = (
    # heading of a cell's first and second line
    ("variant", ""),
    ("bytes on disk", "bits/weight"),
    ("mean KL", "(90 %)"),
    ("top-1", "(90 %)"),
    ("MMLU (n)", "(90 %)"),
    ("pass@1 (n)", "(90 %)"),
    ("tokens/s", "/ most"),
    ("first", "token"),
    ("peak", "private"),
    ("verdict", ""),
)
GATE_COLUMNS = ("gate", "n", "estimate", "90 % interval", "limit", "detectable", "verdict")
POWER_LEGEND = (
    "Detectable: the excess over the limit (for accuracy: the drop) that this sample reveals with 80 % power in a "
    "one-sided test at 5 %. Intervals are two-sided 90 %, so each end is a one-sided 95 % bound; a line passes when "
    "its bound does. pass@1 is HumanEval's; (90 %) marks intervals."
)
LOOKS_LEGEND = (
    "MMLU with a margin is judged at looks, which share an error of 5 % (a group-sequential test): its interval holds "
    "at all looks together and is wider than one look's alone. The probability drop is that of the correct answer, in "
    "percentage points: a finer figure of the same questions, which decides nothing."
)
CAVEATS = (
    "Divergence says how far a variant is from its own full-precision model, not which way; MMLU and HumanEval say "
    "what was lost of that model's ability, not how large the ability is.",
    "Everything was measured on the system named above, in the runtime that ships. A phone's kernels round otherwise, "
    "and its speed is its own.",
)
SPEED_LEGEND = (
    "tokens/s: the median after the longest prompt / the most that the memory's bandwidth allows; below it the "
    "repeats' least and most, with ~ where they differ by more than a tenth: something else ran. First token: after a "
    "prompt of as many tokens as stand below it. Peak: the process's memory; below it, what no file backs."
)


def share(value: float) -> str:
    """0.861 as 86.1 %."""
    return f"{100 * value:.1f} %"


def nats(value: float) -> str:
    """Three significant digits, at least three decimals below one."""
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


def memory(value: float) -> str:
    """Bytes as decimal MB or GB."""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.{2 if value < 1e10 else 1}f} GB"


def seconds(value: float) -> str:
    """Milliseconds below one second."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def _maybe(value: float | None, format_: Callable[[float], str]) -> str:
    return DASH if value is None or math.isnan(value) else format_(value)


def _under(value: float | None, format_: Callable[[float], str]) -> str:
    """A second line, empty where there is nothing to say."""
    return "" if value is None else format_(value)


def _range(row: Row, section: str, key: str, format_: Callable[[float], str]) -> str:
    low, high = number(row, section, f"{key}_low"), number(row, section, f"{key}_high")
    return "" if low is None or high is None else f"{format_(low)}–{format_(high)}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _accuracy(row: Row, section: str, key: str) -> tuple[str, str]:
    accuracy, n = number(row, section, key), number(row, section, "n")
    if accuracy is None or n is None:
        return DASH, ""
    return f"{share(accuracy)} ({n:.0f})", _range(row, section, key, _percent)


def _rate(row: Row) -> tuple[str, str]:
    rate, roofline = number(row, "speed", "tokens_per_second"), number(row, "speed", "roofline_tokens_per_second")
    if rate is None:
        return DASH, ""
    noisy = "~" * bool(row.metrics["speed"].get("noisy"))
    decimals = 0 if rate >= 100 else 1 if rate >= 10 else 2
    extremes = _range(row, "speed", "tokens_per_second", _short)
    return f"{rate:.{decimals}f}/{_maybe(roofline, _short)}", noisy + extremes


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def table_cells(row: Row) -> list[tuple[str, str]]:
    """The two lines of each of `COLUMNS` for one row."""
    return [
        (row.variant, ""),
        (
            _maybe(number(row, "size", "bytes_on_disk"), lambda value: f"{value:,.0f}"),
            _maybe(number(row, "size", "bits_per_weight"), lambda value: f"{value:.2f}"),
        ),
        (_maybe(number(row, "divergence", "kl_mean"), nats), _range(row, "divergence", "kl_mean", nats)),
        (_maybe(number(row, "divergence", "top1"), share), _range(row, "divergence", "top1", _percent)),
        _accuracy(row, "mmlu", "accuracy"),
        _accuracy(row, "humaneval", "pass_at_1"),
        _rate(row),
        (
            _maybe(number(row, "speed", "time_to_first_token_seconds"), seconds),
            _under(number(row, "speed", "prompt_tokens"), lambda tokens: f"at {tokens:.0f}"),
        ),
        (
            _maybe(number(row, "speed", "peak_memory_bytes"), memory),
            _under(number(row, "speed", "peak_private_bytes"), memory),
        ),
        (row.verdict.verdict if row.verdict else DASH, ""),
    ]


def delivery(row: Row) -> str:
    """The bundle's path, or why there is none; "" for the reference."""
    if row.variant == REFERENCE:
        return ""
    return f"bundle: {row.bundle}" if row.bundle else f"no bundle: {row.refusal}"


def identity(row: Row, beside: Row | None = None) -> dict[str, str]:
    """What tells this row's subject from any other, and what ran it, as facts by name; none that `beside` shares."""
    known = identity(beside) if beside else {}
    found = row.metrics.get("identity") or {}
    size = number(row, "size", "bytes_on_disk")
    facts = {
        "source": found.get("revision"),
        "bytes": None if size is None else f"{size:,.0f}",
        "plan": found.get("plan_sha256") and f"sha256 {found['plan_sha256']}",
        "judged as": row.verdict and f"{row.verdict.row} of configs/gates.yaml",
        "measured by": _measured_by(found),
    }
    return {name: fact for name, fact in facts.items() if fact and known.get(name) != fact}


def _measured_by(found: Mapping[str, str]) -> str:
    runtimes = [f"{name} {found[name]}" for name in ("onnxruntime", "onnxruntime-genai") if name in found]
    return f"{', '.join(runtimes)} on {found.get('system', 'an unknown system')}" if runtimes else ""


# --- gates -----------------------------------------------------------------------------------------------------------


def _points(value: float) -> str:
    return f"{value:.1f} points"


# gate → title, format of its numbers, sign of its limit
_GATES: dict[str, tuple[str, Callable[[float], str], str]] = {
    "permission": ("permission to release", nats, ""),
    "parity": ("parity with Optimum", lambda value: f"{value:.1e}", "≤"),
    "kl_mean": ("mean KL", nats, "≤"),
    "kl_p99": ("99th percentile of KL", nats, "≤"),
    "top1": ("top-1 agreement", share, "≥"),
    "perplexity_ratio": ("perplexity ratio", lambda value: f"{value:.3f}", "≤"),
    "kl_ratchet": ("mean KL, ratchet", nats, "≤"),
    "mmlu": ("MMLU drop", _points, "≤"),
    "mmlu_probability": ("MMLU probability drop", lambda value: f"{value:.2f} points", "≤"),
    "humaneval": ("HumanEval drop", _points, "≤"),
}


def gate_cells(line: GateLine) -> list[str]:
    """One line's text for each of `GATE_COLUMNS`."""
    title, format_, sign = _GATES.get(line.name, (line.name, nats, "≤"))
    interval = DASH
    if line.low is not None:
        high = format_(line.high) if line.high is not None else "unbounded"
        interval = f"{format_(line.low).split()[0]} to {high}"
    return [
        title,
        DASH if line.n is None else f"{line.n:,}",
        _maybe(line.estimate, format_),
        interval,
        DASH if line.limit is None else f"{sign} {format_(line.limit)}",
        _gate_number(line, line.detectable),
        "reported" if line.verdict == REPORTED else line.verdict,
    ]


def gate_title(line: GateLine) -> str:
    """The gate's name in words."""
    return _GATES.get(line.name, (line.name,))[0]


def reasons(row: Row) -> list[str]:
    """What the lines of a row's verdict have to say: why one did not pass, which look this was, with numbers."""
    lines = row.verdict.lines if row.verdict else ()
    return [f"{gate_title(line)}: {line.note}." for line in lines if line.note]


def conditions(model: ModelReport) -> str:
    """How the accuracy tasks were run, as recorded with the reference."""
    mmlu, humaneval = (model.reference.metrics.get(name) or {} for name in ("mmlu", "humaneval"))
    asked = [mmlu.get("mode", "unknown"), *(f"{key} {mmlu[key]}" for key in ("exemplars", "think") if key in mmlu)]
    samples, temperature = humaneval.get("samples", 1), humaneval.get("temperature", 0)
    solutions = f"{samples:,} sampled at temperature {temperature:g}" if temperature else "one greedy solution"
    where = humaneval.get("isolation", "unknown isolation")
    return (
        f"MMLU questions asked in mode {', '.join(asked)} (chance {100 * mmlu.get('chance', 0.25):.0f} %); "
        f"HumanEval: pass@1 of {solutions} each, prompt {humaneval.get('prompt', 'unknown')}, run under {where}"
        f"{'' if humaneval.get('contained', True) else ', which does not contain hostile code'}."
    )


def solution_sentences(model: ModelReport) -> list[str]:
    """Of HumanEval's solutions: how each variant reads those of the reference, and how many limits cut short."""
    agreements = [
        f"{row.variant} {share(value)} ({_range(row, 'agreement', 'top1', _percent)})"
        for row in model.variants
        if (value := number(row, "agreement", "top1")) is not None
    ]
    tokens = number(model.reference, "agreement", "tokens") or 0
    cuts = [text for row in model.rows if (text := _cuts(row))]
    found = {
        f"Agreement with the reference on the {tokens:,.0f} tokens of its own HumanEval solutions": agreements,
        "HumanEval solutions cut short by their limit of tokens": cuts,
    }
    return [f"{what}: {', '.join(parts)}." for what, parts in found.items() if parts]


def _cuts(row: Row) -> str:
    answers, thinking = (number(row, "humaneval", f"cut_{part}") or 0 for part in ("answers", "thinking"))
    if not answers and not thinking:
        return ""
    return f"{row.variant} {answers:.0f}" + (f" and {thinking:.0f} while thinking" if thinking else "")


def power_sentences(model: ModelReport) -> list[str]:
    """What this run's sample sizes can and cannot detect: one sentence on tokens, one per accuracy task."""
    sentences = [_divergence_power(model), _accuracy_power(model, "mmlu"), _accuracy_power(model, "humaneval")]
    return [sentence for sentence in sentences if sentence]


def _lines(model: ModelReport, name: str) -> list[GateLine]:
    """One gate's line of every variant."""
    return [line for row in model.variants if row.verdict for line in row.verdict.lines if line.name == name]


def _least_known(model: ModelReport, name: str) -> GateLine | None:
    """A gate's line in the variant where the detectable effect is largest."""
    return max(
        (line for line in _lines(model, name) if line.detectable is not None),
        key=lambda line: line.detectable or 0.0,
        default=None,
    )


def _divergence_power(model: ModelReport) -> str:
    lines = [line for name in ("kl_mean", "top1", "perplexity_ratio") if (line := _least_known(model, name))]
    if not lines:
        return ""
    sides = {"top1": "below"}
    effects = ", ".join(
        f"{gate_title(line)} {_gate_number(line, line.detectable)} {sides.get(line.name, 'above')} its limit"
        for line in lines
    )
    return f"{lines[0].n:,} tokens can detect: {effects}; a smaller excess can go unseen."


def _accuracy_power(model: ModelReport, name: str) -> str:
    line = _least_known(model, name)
    if line is None:
        return ""
    what, items = {"mmlu": ("MMLU", "questions"), "humaneval": ("HumanEval", "problems")}[name]
    text = f"{line.n:,} {what} {items} can detect a drop of {_gate_number(line, line.detectable)} and nothing smaller"
    if line.verdict == REPORTED:
        return f"{text}: {what} gates nothing here."
    margins = sorted({other.limit for other in _lines(model, name) if other.limit is not None})
    return f"{text}; its margins: {', '.join(f'{margin:g}' for margin in margins)} points."


def _gate_number(line: GateLine, value: float | None) -> str:
    """`value` in the unit of the line's gate; a difference of shares is points, not per cent."""
    if line.name == "top1" and value is not None:
        return _points(100 * value)
    return _maybe(value, _GATES.get(line.name, ("", nats))[1])
