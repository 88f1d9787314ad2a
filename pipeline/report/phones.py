"""What phones get of each model, as lines of at most 118 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.phones import load_devices, load_tiers
from pipeline.report.columns import aligned, wrapped

_VARIANTS = ("variant", "download, bytes", "weights", "activations", "KV cache", "loading", "peak", "basis", "KL, nats")
_TIERS = ("tier", "may use", "gets")
_DEVICES = ("phone", "tier", "GB/s", "at most", "expected", "tokens/s of")
LEGEND = (
    "Peak: the larger of loading, and of weights as loaded, activations and KV cache together; then the runtime. Only "
    "private memory counts against a tier; weights mapped from a prepacked file have to stay in RAM besides (docs/"
    "devices.md).",
    "Basis: measured on the written file in this runtime; computed from shapes; bound: at most so much, because a "
    "recipe with a budget is solved only after the sensitivity stage. Measured figures include the test's own process.",
    "A variant that no gate has judged is chosen by its size, and may still be refused for its quality.",
)
_CHANGES = {
    "prepacked": "weights mapped from a prepacked file",
    "int8-kv": "int8 KV cache",
    "shorter-context": "a shorter context",
}


Record = Mapping[str, Any]
"""A part of the document that the head of `pipeline.report.plan` describes."""


def lines(document: Record) -> list[str]:
    """The whole document for people."""
    efficiency, context = load_devices().efficiency, document["context"]
    text = [f"At {context:,} tokens of context, {document['runtime_bytes']:,} bytes for runtime and app (assumed)."]
    for model, item in document["models"].items():
        text += ["", f"{model}: {item['title']}, {item['parameters']:,} parameters, shapes from {item['shapes']}"]
        text += _variants(item)
        text += [line for one, why in item["forbidden"].items() for line in wrapped(f"  {one}: {why}.", further="    ")]
        text += _tiers(model, item["tiers"], document["tiers"]) + _devices(model, item["devices"])
    speed = (
        f"Tokens/s: memory bandwidth ÷ bytes that a token reads, with a full and an empty cache: a bound. Expected: "
        f"{efficiency.low:.0%} of the first to {efficiency.high:.0%} of the second, no promise ({efficiency.source})."
    )
    sources = [f"{platform}: {source}." for platform, source in load_tiers().sources.items()]
    return [*text, "", *(line for sentence in (*LEGEND, speed, *sources) for line in wrapped(sentence))]


def _variants(item: Record) -> list[str]:
    needs = next(iter(item["tiers"].values()))["needs"]
    rows = [_VARIANTS]
    for variant, found in item["variants"].items():
        need, download = needs[variant], found["download"]
        quality = "not measured" if found["kl_mean"] is None else f"{found['kl_mean']:.3g}"
        quality += f", {found['verdict']}" if found["verdict"] else ""
        parts = [need["parts"][name]["bytes"] for name in ("weights", "activations", "kv_cache", "loading")]
        sizes = map(gigabytes, (*parts, need["private_bytes"]))
        at_most = "≤ " if download["basis"] == "bound" else ""
        rows.append((variant, f"{at_most}{download['bytes']:,}", *sizes, need["basis"], quality))
    return aligned(rows, {0, 7, 8}, "  ")


def _tiers(model: str, decisions: Record, tiers: Record) -> list[str]:
    budgets = {name: tiers[name]["budget_bytes"] for name in decisions}
    title, *heads = aligned([_TIERS[:2], *((name, gigabytes(size)) for name, size in budgets.items())], {0}, "  ")
    text, margin = [f"{title}  {_TIERS[2]}"], " " * (len(title) + 2)
    for head, (name, decision) in zip(heads, decisions.items(), strict=True):
        text += wrapped(f"{head}  {_gets(decision, budgets[name])}", further=f"{margin}  ")
        for suggestion in decision["suggestions"]:
            text += wrapped(f"would fit: {_in_words(suggestion, model, tiers[name])}", margin, f"{margin}  ")
    return text


def _gets(decision: Record, budget: int) -> str:
    variant = decision["variant"] or decision["closest"]
    if variant is None:
        return "nothing: no variant passed its gates"
    need = decision["needs"][variant]
    private, basis = need["private_bytes"], need["basis"]
    if decision["variant"]:
        return f"{variant}: peak {gigabytes(private)} ({basis})"
    return f"nothing: {variant} needs {gigabytes(private)} ({basis}), {gigabytes(private - budget)} too much"


def _in_words(found: Record, model: str, tier: Record) -> str:
    """`q4 with weights mapped from a prepacked file: 1.37 GB private, 6.4 of 6.8 GB with what is mapped`."""
    need, said = found["need"], _CHANGES | {"shorter-context": f"a context of {found['context']:,} tokens"}
    changes = [said[change] for change in found["changes"] if change in said]
    text = f"{_name(found, model)} with {', '.join(changes)}" if changes else _name(found, model)
    text += f": {gigabytes(need['private_bytes'])} private"
    if need["mapped_bytes"]:
        total = need["private_bytes"] + need["mapped_bytes"]
        text += f", {gigabytes(total)} with what is mapped, of {gigabytes(tier['resident_bytes'])}"
    return f"{text} ({need['basis']})"


def _devices(model: str, devices: Record) -> list[str]:
    rows = [_DEVICES]
    for phone in devices.values():
        bound, expected, speed = "–", "–", phone["tokens_per_second"]
        if speed:
            bound = f"{speed['most_full']:.1f}–{speed['most_empty']:.1f}"
            expected = f"{speed['low']:.1f}–{speed['high']:.1f}"
        bandwidth = f"{phone['memory_bandwidth'] / 1e9:.1f}"
        rows.append((phone["title"], phone["tier"], bandwidth, bound, expected, _runs(phone["runs"], model)))
    return aligned(rows, {0, 1, 5}, "  ") if devices else []


def _runs(runs: Record | None, model: str) -> str:
    if runs is None:
        return "nothing fits"
    shorter = {"shorter-context": f"{runs['context']:,} tokens"}
    changes = [shorter.get(change, change) for change in runs["changes"] if change in _CHANGES]
    return ", ".join([_name(runs, model), *changes])


def _name(found: Record, model: str) -> str:
    return found["variant"] if found["model"] == model else f"{found['model']} {found['variant']}"


def gigabytes(count: int) -> str:
    """2.41 GB, decimal."""
    return f"{count / 1e9:.2f} GB"
