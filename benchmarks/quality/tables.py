"""quality.json as pages show it: what it says in sentences, and the tables that the sentences rest on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.markdown import table
from pipeline.tasks.statistics import ALPHA, WINDOW_LOOKS

Record = Mapping[str, Any]
_AT = {"bytes": "download", "memory": "memory"}
_KINDS = {"prose": "prose", "chat": "chat", "code": "code", "languages": "other languages"}


def _compared(subject: Record) -> list[Record]:
    """Files of llama.cpp with an importance matrix, those of most bits first."""
    found = [row for row in subject["rows"] if row["tool"] == "llama.cpp" and row["name"].endswith("imatrix")]
    return sorted(found, key=lambda row: -row["body_bits"])


def _full(result: Record) -> list[Record]:
    """Subjects whose widths llama.cpp's formats fit, so that all files are compared."""
    return [subject for subject in result["subjects"] if not subject["brief"]]


# --- sentences --------------------------------------------------------------------------------------------------------


def claim(result: Record) -> str:
    """What the comparison with llama.cpp found, in a few sentences for each subject: wins and losses."""
    return "\n".join(
        f"On {subject['title']}, whose widths llama.cpp's formats fit, {_outcome(subject, 'bytes')} "
        f"There, {_outcome(subject, 'memory')} In brackets: our KL over theirs."
        for subject in _full(result)
    )


def _outcome(subject: Record, by: str) -> str:
    """The sentence about the same download, or the same memory."""
    groups: dict[str, list[str]] = {"less KL than": [], "no measurably other KL than": [], "more KL than": []}
    for row in _compared(subject):
        if (ours := row["ours"][by]) is not None:
            name = row["name"].removesuffix(", imatrix")
            groups[_verdict(ours)].append(f"{name} ({_share(ours, row):.2f} ×)")
    parts = [f"{words} {_listed(names)}" for words, names in groups.items() if names]
    return f"at the same {_AT[by]}, our files have {'; '.join(parts) or 'no file to compare'}."


def _verdict(gap: Record) -> str:
    if gap["excess_high"] < 0:
        return "less KL than"
    return "more KL than" if gap["excess_low"] > 0 else "no measurably other KL than"


def _share(ours: Record, row: Record) -> float:
    """Our KL over the peer's."""
    return 1 + ours["excess"] / row["kl_mean"]


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def summary(result: Record) -> str:
    """The claim, how it stands on each kind of text, ONNX Runtime's tools, how many targets are met, what fell back."""
    lines = [f"- {line}" for line in claim(result).splitlines()]
    for subject in _full(result):
        lines += [f"- {_by_kind(subject)}", f"- {_onnx(subject)}"]
        met = sum(found["met"] for found in subject["targets"])
        lines.append(f"- Of {len(subject['targets'])} targets on {subject['title']}, {met} are met.")
    return "\n".join([*lines, *(f"- {line}" for subject in result["subjects"] for line in _fallbacks(subject))])


def _by_kind(subject: Record) -> str:
    """How many of llama.cpp's files lose more than ours on each kind of text."""
    pairs = [row["ours"]["bytes"]["kinds"] for row in _compared(subject) if row["ours"]["bytes"]]
    counts = [
        f"{title} {sum(kinds[kind]['excess_high'] < 0 for kinds in pairs)}"
        for kind, title in _KINDS.items()
    ]  # fmt: skip
    return f"At the same download ours has less KL than so many of these {len(pairs)} files: {', '.join(counts)}."


def _onnx(subject: Record) -> str:
    """The range of our share of the KL of ONNX Runtime's tools."""
    rows = [row for row in subject["rows"] if row["tool"].startswith("onnxruntime") and row["ours"]["bytes"]]
    if not rows:
        return "No file of ONNX Runtime's tools was there to compare."
    shares = [_share(row["ours"]["bytes"], row) for row in rows]
    return (
        f"In no more bytes than the {len(rows)} files of ONNX Runtime's tools, ours has {min(shares):.2f} to "
        f"{max(shares):.2f} times their KL."
    )


def _fallbacks(subject: Record) -> list[str]:
    found = [row for row in subject["rows"] if row.get("fallback")]
    names = [f"{row['name'].removesuffix(', imatrix')} {row['fallback']:.0%}" for row in found]
    if not names:
        return []
    return [
        f"{subject['title']} has widths that are no multiple of 256, so llama.cpp gave other types than a file's name "
        f"says to a share of its weights: {_listed(names)}. A comparison there says nothing about the format."
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def pairs(result: Record) -> str:
    """Each peer's file beside the best of ours that is no larger, by download and by memory."""
    return "\n\n".join(
        f"{subject['title']}, same {what}\n\n{_pairs(subject, by)}"
        for subject in _full(result)
        for by, what in _AT.items()
    )


def _pairs(subject: Record, by: str) -> str:
    head = (
        "peer's file", f"{_AT[by]}, MB", "its mean KL", "ours", f"{_AT[by]}, MB", "mean KL", "÷ its",
        "difference (90 %)", *(f"{title}, ÷ its" for title in _KINDS.values()),
    )  # fmt: skip
    rows = {row["name"]: row for row in subject["rows"]}
    peers = [row for row in subject["rows"] if row["tool"] != "ours" and row["name"] != "F16" and row["ours"][by]]
    return table(head, [_pair(row, rows, by) for row in sorted(peers, key=lambda row: row[by])])


def _pair(row: Record, rows: Mapping[str, Record], by: str) -> list[str]:
    gap = row["ours"][by]
    ours = rows[gap["name"]]
    kinds = [f"{1 + gap['kinds'][kind]['excess'] / row[f'{kind}_kl_mean']:.2f}" for kind in _KINDS]
    return [
        f"{row['tool']}: {row['name']}", _megabytes(row[by]), f"{row['kl_mean']:.4f}", ours["name"],
        _megabytes(ours[by]), f"{ours['kl_mean']:.4f}", f"{_share(gap, row):.2f}", _gap(gap), *kinds,
    ]  # fmt: skip


def files(result: Record) -> str:
    """Every subject's files, the smallest first."""
    return "\n\n".join(_subject(subject) for subject in result["subjects"])


def _subject(subject: Record) -> str:
    level = 1 - 2 * WINDOW_LOOKS.get(subject["rows"][0]["windows"], ALPHA)
    head = (
        "file", "download, MB", "memory, MB", "bits/weight", "layers, bits", "fell back", f"mean KL ({level:.0%})",
        *_KINDS.values(), "99th percentile", "top-1", "perplexity ÷ reference's", "decode, tokens/s",
    )  # fmt: skip
    lines = [_row(row) for row in sorted(subject["rows"], key=lambda row: row["bytes"])]
    own = ", ".join(f"{subject['reference_perplexity'][kind]:.1f} on {name}" for kind, name in _KINDS.items())
    perplexity = f"The reference's own perplexity is {own}."
    missing = [f"- not there: {name} ({why})" for name, why in subject["missing"].items()]
    parts = [f"### {subject['title']}", f"{subject['note']} {perplexity}", table(head, lines), "\n".join(missing)]
    return "\n\n".join(filter(None, parts))


def _row(row: Record) -> list[str]:
    return [
        f"{row['tool']}: {row['name']}", _megabytes(row["bytes"]), _megabytes(row["memory"]),
        f"{row['bits_per_weight']:.2f}", f"{row['body_bits']:.2f}" if "body_bits" in row else "",
        f"{row['fallback']:.0%}" if row.get("fallback") else "",
        f"{row['kl_mean']:.4f} ({row['kl_mean_low']:.4f}–{row['kl_mean_high']:.4f})",
        *(f"{row[f'{kind}_kl_mean']:.4f}" for kind in _KINDS), f"{row['kl_p99']:.2f}", f"{row['top1']:.1%}",
        f"{row['perplexity_ratio']:.3f}", f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "",
    ]  # fmt: skip


def types(result: Record) -> str:
    """What llama.cpp's files really hold: the share of the weights by type."""
    head = ("subject", "file", "types, share of the weights", "layers in the promised type", "fell back")
    return table(head, [
        [subject["title"], row["name"], ", ".join(f"{name} {share:.0%}" for name, share in row["types"].items()),
         f"{row['promised']:.0%}", f"{row['fallback']:.0%}"]
        for subject in result["subjects"] for row in subject["rows"] if "types" in row
    ])  # fmt: skip


def _gap(gap: Record) -> str:
    return f"{gap['excess']:+.4f} ({gap['excess_low']:+.4f} to {gap['excess_high']:+.4f})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def targets(result: Record) -> str:
    """What is claimed, and whether each figure meets it."""
    head = ("target", "subject", "beside", "at, MB", "ours", "KL", "limit", "KL − limit (90 %)", "")
    return table(head, [
        [found["target"], subject["title"], found["beside"], _megabytes(found["size"]), *_judged(found)]
        for subject in result["subjects"] for found in subject["targets"]
    ])  # fmt: skip


def _judged(found: Record) -> list[str]:
    verdict = "met" if found["met"] else "**missed**"
    if found["ours"] is None:
        return ["none so small", "", f"{found['limit']:.4f}", "", verdict]
    return [found["ours"], f"{found['kl']:.4f}", f"{found['limit']:.4f}", _gap(found), verdict]


TABLES = {
    "quality-summary": summary, "quality-targets": targets, "quality-pairs": pairs, "quality": files,
    "quality-types": types,
}  # fmt: skip
