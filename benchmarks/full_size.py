"""The price of a release of MiMo and Phi-4: hours of every stage, by suite and machine, into docs/full-size.md.

python -m benchmarks.full_size

The hours are preflight's own, computed from shapes and from the rate of this machine's matrix products, measured now.
Other machines are so many of this machine's cores, with the memory that they usually come with.
"""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.markdown import fill, table
from pipeline import machine
from pipeline.preflight.chance import FLIPS, MORE_FLIPS, chance, forbidden
from pipeline.preflight.machine import stage_needs
from pipeline.preflight.needs import Rates

PAGE = Path("docs/full-size.md")
MODELS, SUITES, VARIANTS = ("mimo-8b", "phi-4"), ("smoke", "release"), ("q4", "q4_k_m")
MACHINES = ((2, 24), (16, 128), (64, 256))
"""Cores, and GB of memory."""


def hours(seconds: float) -> str:
    """`0.4` or `21`, or a dash for what no rate foretells."""
    return "\N{EN DASH}" if math.isnan(seconds) else f"{seconds / 3600:.{0 if seconds >= 36000 else 1}f}"


def price(model: str, suite: str, per_core: float) -> str:
    """A row for each stage, a column for each machine, the sum at the end."""
    needs = [
        list(stage_needs(model, VARIANTS, gigabytes * 10**9, Rates(cores * per_core, cores), suite))
        for cores, gigabytes in MACHINES
    ]
    rows = [
        [f"{stage.stage} {stage.variant or ''}".strip(), *(hours(one.seconds) for one in same)]
        for stage, *same in zip(needs[0], *needs, strict=True)
        if not math.isnan(stage.seconds) and stage.seconds > 180
    ]
    sums = [sum(one.seconds for one in column if not math.isnan(one.seconds)) for column in needs]
    rows.append(["all stages", *map(hours, sums)])
    head = [f"{model}, `{suite}`: hours", *(f"{cores} cores, {memory} GB" for cores, memory in MACHINES)]
    return table(head, rows)


def chances() -> str:
    """What each suite can decide."""
    rows = []
    for model in MODELS:
        for suite in SUITES:
            for variant in (*VARIANTS, "q3"):
                if forbidden(model, variant):
                    cells = ["only FAIL: not in `opt_in`", "", ""]
                else:
                    found = [chance(model, variant, suite, flips) for flips in (FLIPS, MORE_FLIPS)]
                    asked = found[0].items.get("mmlu", 0)
                    cells = [*(f"{one.passes:.0%}" for one in found), f"{asked:,.0f}"]
                rows.append([f"{model} {variant}, `{suite}`", *cells])
    head = ["", f"passes, {FLIPS:.1%} of solutions flip", f"passes, {MORE_FLIPS:.0%} flip", "MMLU questions, mean"]
    return table(head, rows)


def main() -> None:
    """Fill the page's marked places."""
    per_core = machine.product_rate() / machine.cores()
    parts = {"rate": f"{per_core / 1e9:.0f} GFLOP/s a core", "chances": chances()}
    parts |= {f"{model}-{suite}": price(model, suite, per_core) for model in MODELS for suite in SUITES}
    fill(PAGE, parts)


if __name__ == "__main__":
    main()
