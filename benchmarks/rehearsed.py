"""Tables of rehearsals: stages beside predictions, kills, what cuts say of the whole, verdicts, what bundles say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.rehearsal import target_of

Record = dict[str, Any]


def everything(records: Sequence[Record]) -> str:
    """All tables of all rehearsals, under a heading for each model: the whole, then what its longest cut showed."""
    parts = []
    for model in sorted({record["model"] for record in records}):
        own = sorted((one for one in records if one["model"] == model), key=lambda one: one["layers"] or math.inf)
        cuts = [one for one in own if one["layers"]]
        for record in [*reversed([one for one in own if not one["layers"]]), *cuts[-1:]]:
            what = f"the first {record['layers']} layers" if record["layers"] else "the whole model"
            parts += [f"### {model}: {what}", stages(record)]
            parts += [render(record) for render, of in _MORE if record.get(of)]
        if len(cuts) > 1:
            parts += [f"### {model}: what its cuts say of the whole", whole(cuts[-2:])]
    return "\n\n".join(parts)


def _ratio(found: float | None, expected: float | None) -> str:
    known = found and expected and not math.isnan(expected)
    return f"{found / expected:.2f}" if known and found and expected else ""


def _seconds(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def _predictions(record: Record) -> dict[str, Any]:
    return {target_of(one, _name(record)): one for one in record["predicted"]}


def _steps(record: Record) -> dict[str, Any]:
    return {step["name"]: step for step in record["steps"]}


def _name(record: Record) -> str:
    return f"talking-{record['model']}" + (f"-{record['layers']}layers" if record["layers"] else "")


def _short(step: str, record: Record) -> str:
    """`quantize q4` for quantize@talking-mimo-8b-q4."""
    return step.replace(f"@{_name(record)}", " ").replace(" -", " ").strip()


def stages(record: Record) -> str:
    """Every step: seconds, memory and disk, beside what preflight said before."""
    head = (
        "stage", "CPU, s", "s", "predicted, s", "÷", "private, GB", "predicted, GB", "÷", "disk grew, GB",
        "predicted, GB", "disk in all, GB",
    )  # fmt: skip
    predicted, rows = _predictions(record), []
    for step, used in _steps(record).items():
        own = predicted.get(step, {})
        disk = own["disk"] + own["store_disk"] if own else None
        memory, peak = used.get("private_bytes"), used.get("disk_growth_bytes")
        rows.append([
            _short(step, record), _seconds(used.get("cpu_seconds")), _seconds(used["wall_seconds"]),
            _seconds(own.get("seconds")), _ratio(used["wall_seconds"], own.get("seconds")),
            _gigabytes(memory), _gigabytes(own.get("memory")),
            _ratio(memory, own.get("memory")), _gigabytes(peak), _gigabytes(disk),
            _gigabytes(None if peak is None else used["disk_before_bytes"] + peak),
        ])  # fmt: skip
    total = sum(used["wall_seconds"] for used in record["steps"])
    lost = sum(kill["after_seconds"] for kill in record["kills"] if kill["killed"])
    peak = max(used.get("disk_before_bytes", 0) + used.get("disk_growth_bytes", 0) for used in record["steps"])
    rate = record["predicted"][0]["products_per_second"] / 1e9
    return (
        f"{table(head, rows)}\n\n{total / 60:,.0f} minutes, and {lost / 60:,.0f} in what was killed; at most "
        f"{peak / 1e9:.1f} GB of disk. Predicted from {rate:.0f} GFLOP/s, measured before the first stage."
    )


def kills(record: Record) -> str:
    """What was killed, and what the next run of the stage took."""
    head = ("killed", "after, s", "then to its end, s", "together ÷ predicted")
    predicted, rows = _predictions(record), []
    for kill in record["kills"]:
        after, then = kill["after_seconds"], _steps(record)[kill["stage"]]["wall_seconds"]
        expected = predicted[kill["stage"]]["seconds"]
        end = [_seconds(then), _ratio(after + then, expected)] if kill["killed"] else ["had ended", ""]
        rows.append([_short(kill["stage"], record), _seconds(after), *end])
    return table(head, rows)


def whole(cuts: Sequence[Record]) -> str:
    """Of two cuts of one model: CPU seconds of a layer, and so of all layers, beside preflight's seconds on all cores.

    CPU seconds, because other programs that take cores change them least.
    """
    fewer, more = sorted(cuts, key=lambda record: record["layers"])
    layers, apart, cores = more["all_layers"], more["layers"] - fewer["layers"], more["machine"]["cores"]
    head = (
        "stage", *(f"{cut['layers']} layers, CPU s" for cut in (fewer, more)), "a layer, CPU s",
        f"{layers} layers, CPU s", f"preflight's s × {cores} cores", "÷",
    )  # fmt: skip
    expected = {(one["stage"], one["variant"]): one["seconds"] for one in more["predicted_whole"]}
    rows = []
    for prediction in more["predicted"]:
        pair = [_steps(cut).get(target_of(prediction, _name(cut)), {}).get("cpu_seconds") for cut in (fewer, more)]
        if None in pair or prediction["stage"] not in ("calibrate", "sensitivity", "quantize"):
            continue
        layer = (pair[1] - pair[0]) / apart
        found = pair[1] + layer * (layers - more["layers"])
        own = cores * expected[prediction["stage"], prediction["variant"]]
        rows.append([
            " ".join(filter(None, (prediction["stage"], prediction["variant"]))), *map(_seconds, pair),
            f"{layer:.1f}", _seconds(found), _seconds(own), _ratio(found, own),
        ])  # fmt: skip
    return table(head, rows)


def answers(record: Record) -> str:
    """What each fetched bundle says."""
    head = ("bundle", "request", "answer", "tokens", "as at full precision", "the reference's margin there, logits")
    rows = []
    for variant, found in record["answers"].items():
        for row in found["rows"]:
            margin = "" if row["margin"] is None else f"{row['margin']:.2f}"
            rows.append([
                variant, _cell(row["request"], 60), _cell(row["bundle"], 120), str(row["tokens"]), str(row["same"]),
                margin,
            ])  # fmt: skip
    return table(head, rows)


def verdicts(record: Record) -> str:
    """The gates' lines of each variant."""
    head = ("variant", "verdict", "gate", "estimate", "interval", "limit", "")
    return table(head, list(_lines(record)))


def _lines(record: Record) -> Iterator[list[str]]:
    for variant, found in record["verdicts"].items():
        for line in found["lines"]:
            ends = [line.get(end) for end in ("low", "high")]
            between = " to ".join("∞" if end is None else f"{end:.4g}" for end in ends) if ends != [None, None] else ""
            figures = ["" if line.get(key) is None else f"{line[key]:.4g}" for key in ("estimate", "limit")]
            yield [variant, found["verdict"], line["name"], figures[0], between, figures[1], line["verdict"]]


def _cell(text: str, most: int) -> str:
    """Text on one line of a table, cut to `most` characters."""
    plain = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


_MORE = ((kills, "kills"), (verdicts, "verdicts"), (answers, "answers"))
"""The tables that a rehearsal may have beside its stages, by what they are made of."""
