"""quality.json as README.md's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import table

Record = Mapping[str, Any]


def files(result: Record) -> str:
    """Every subject's files, the smallest first, with ours at the same bytes beside each peer's."""
    return "\n\n".join(_subject(subject) for subject in result["subjects"])


def _subject(subject: Record) -> str:
    head = (
        "file", "bytes", "bits/weight", "mean KL (90 %)", "99th percentile", "top-1", "perplexity ÷ reference's",
        "decode, tokens/s", "ours at its bytes: KL", "ours − its (90 %)",
    )  # fmt: skip
    rows = sorted(subject["rows"], key=lambda row: row["bytes"])
    lines = [_row(row, rows) for row in rows]
    perplexity = f"The reference's own perplexity on this text is {subject['reference_perplexity']:.2f}."
    missing = [f"- not there: {name} ({why})" for name, why in subject["missing"].items()]
    parts = [f"### {subject['title']}", f"{subject['note']} {perplexity}", table(head, lines), "\n".join(missing)]
    return "\n\n".join(filter(None, parts))


def _row(row: Record, rows: list[Record]) -> list[str]:
    speed = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""
    ours = next((budget for budget in rows if row["name"] in budget.get("beside", {})), None)
    beside = ["", ""] if ours is None else [f"{ours['kl_mean']:.4f}", _gap(ours["beside"][row["name"]])]
    return [
        f"{row['tool']}: {row['name']}", f"{row['bytes']:,}", f"{row['bits_per_weight']:.2f}",
        f"{row['kl_mean']:.4f} ({row['kl_mean_low']:.4f}–{row['kl_mean_high']:.4f})", f"{row['kl_p99']:.2f}",
        f"{row['top1']:.1%}", f"{row['perplexity_ratio']:.3f}", speed, *beside,
    ]  # fmt: skip


def _gap(gap: Record) -> str:
    return f"{gap['excess']:+.4f} ({gap['excess_low']:+.4f} to {gap['excess_high']:+.4f})"


def targets(result: Record) -> str:
    """What is claimed, and whether each figure meets it."""
    head = ("target", "subject", "ours", "beside", "KL", "limit", "difference (90 %)", "")
    lines = []
    for subject in result["subjects"]:
        for found in subject["targets"]:
            bits = f", body {found['body_bits']:.2f} bits/weight" if "body_bits" in found else ""
            gap = _gap(found) if "excess" in found else f"{found['kl'] - found['limit']:+.4f}"
            lines.append([
                found["target"], subject["title"], found["ours"] + bits, found["beside"], f"{found['kl']:.4f}",
                f"{found['limit']:.4f}", gap, "met" if found["met"] else "**not met**",
            ])  # fmt: skip
    return table(head, lines)


TABLES = {"quality": files, "quality-targets": targets}
