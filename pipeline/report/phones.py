"""What phones get of each model, as lines of at most 118 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.phones import load_devices, load_tiers
from pipeline.report.columns import aligned, wrapped

_VARIANTS = ("variant", "download, bytes", "token", "weights", "KV cache", "private", "mapped", "basis", "KL, nats")
_TIERS = ("tier", "private", "resident", "gets", "at, takes")
_DEVICES = ("phone", "tier", "GB/s", "at most", "expected", "tokens/s of")
LEGEND = (
    "Token: GB that decoding one reads of the download, its keys and values aside; of a mixture the experts that it "
    "wakes.",
    "Private: the peak of an app that loads the download; mapped: private + mapped, once the phone has prepacked the "
    "weights (docs/devices.md). Both at the context, with chunks of 16 tokens. Private memory counts against what an "
    "app may use; private and mapped together have to stay in RAM.",
    "Basis: measured on the written file in this runtime; computed from shapes; bound: at most so much, because a "
    "recipe with a budget is solved only after the sensitivity stage. Measured figures include the test's own process.",
    "A variant that no gate has judged is chosen by its size, and may still be refused for its quality.",
)


Record = Mapping[str, Any]
"""A part of the document that the head of `pipeline.report.plan` describes."""


def lines(document: Record) -> list[str]:
    """The whole document for people."""
    efficiency, context = load_devices().efficiency, document["context"]
    text = [f"At {context:,} tokens of context, {document['runtime_bytes']:,} bytes for runtime and app (assumed)."]
    for model, item in document["models"].items():
        title = f"{model}: {item['title']}, {item['parameters']:,} parameters, shapes from {item['shapes']}"
        text += ["", *wrapped(title)]
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
    rows = [_VARIANTS]
    for variant, found in item["variants"].items():
        private, mapped = (found["ways"][weights] for weights in ("private", "mapped"))
        quality = "not measured" if found["kl_mean"] is None else f"{found['kl_mean']:.3g}"
        quality += f", {found['verdict']}" if found["verdict"] else ""
        read = found["read"]["bytes"] if found["read"] else 0
        sizes = [found["weights"]["bytes"], private["parts"]["kv_cache"]["bytes"], private["private_bytes"]]
        both = f"{mapped['private_bytes'] / 1e9:.2f} + {mapped['mapped_bytes'] / 1e9:.2f}"
        at_most = "≤ " if found["download"]["basis"] == "bound" else ""
        download = f"{at_most}{found['download']['bytes']:,}"
        rows.append((variant, download, f"{read / 1e9:.2f}", *map(gigabytes, sizes), both, private["basis"], quality))
    return aligned(rows, {0, 7, 8}, "  ") + [
        line for one, found in item["variants"].items() for line in _speculative(one, found)
    ]


def _speculative(variant: str, found: Record) -> list[str]:
    """What speculative decoding adds, and where there is room for it."""
    if (added := found["speculative"]) is None:
        return []
    held, size = ", ".join(added["tiers"]) or "none", gigabytes(added["private_bytes"])
    return wrapped(
        f"  {variant}: speculative decoding adds {size} private. Tiers that hold it: {held}.", further="    "
    )


def _tiers(model: str, decisions: Record, tiers: Record) -> list[str]:
    rows: list[tuple[str, ...]] = [_TIERS]
    for name, decision in decisions.items():
        sizes = (gigabytes(tiers[name][key]) for key in ("budget_bytes", "resident_bytes"))
        rows.append((name, *sizes, *_gets(decision, model)))
    return aligned(rows, {0, 3, 4}, "  ")


def _gets(decision: Record, model: str) -> tuple[str, str]:
    """What a tier gets and what that takes, or what it lacks."""
    if runs := decision["chosen"]:
        need = runs["need"]
        way, mapped = need["way"], need["mapped_bytes"]
        takes = (
            f"{need['private_bytes'] / 1e9:.2f} + {mapped / 1e9:.2f}" if mapped else gigabytes(need["private_bytes"])
        )
        return _runs(runs, model), f"{way['context']:,} tokens, {takes} ({need['basis']})"
    instead = f"nothing; {_runs(decision['instead'], model)}" if decision["instead"] else "nothing"
    if (closest := decision["closest"]) is None:
        return instead, "no variant passed its gates"
    return instead, f"{_runs(closest, model)} lacks {gigabytes(decision['lacks_bytes'])}"


def _devices(model: str, devices: Record) -> list[str]:
    rows = [_DEVICES]
    for phone in devices.values():
        bound, expected, speed = "–", "–", phone["tokens_per_second"]
        if speed:
            bound = f"{speed['most_full']:.1f}–{speed['most_empty']:.1f}"
            expected = f"{speed['low']:.1f}–{speed['high']:.1f}"
        bandwidth = f"{phone['memory_bandwidth'] / 1e9:.1f}"
        rows.append((phone["title"], phone["tier"], bandwidth, bound, expected, _runs(phone["runs"], model)))
    found = [_measured(phone["title"], row) for phone in devices.values() for row in phone["measured"]]
    return [*(aligned(rows, {0, 1, 5}, "  ") if devices else []), *found]


def _measured(title: str, row: Record) -> str:
    rates = f"{row['tokens_per_second']:.1f} tokens/s, {row['sustained_tokens_per_second']:.1f} at the end"
    throttled = row["throttled_after_seconds"]
    slow = "never throttled" if throttled is None else f"throttled after {throttled:.0f} s"
    return f"  measured, {title}: {row['variant']} {row['weights']}, {rates} of {row['seconds']:.0f} s, {slow}"


def _runs(runs: Record | None, model: str) -> str:
    if runs is None:
        return "nothing fits"
    return f"{_name(runs, model)} {runs['need']['way']['weights']}"


def _name(found: Record, model: str) -> str:
    return found["variant"] if found["model"] == model else f"{found['model']} {found['variant']}"


def gigabytes(count: int) -> str:
    """2.41 GB, decimal."""
    return f"{count / 1e9:.2f} GB"
