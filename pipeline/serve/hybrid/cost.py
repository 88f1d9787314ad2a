"""cost: what ways to answer cost a month and when one pays for its set-up; or what the ledger says was spent."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cost import CostConfig, load_cost
from pipeline.config.hybrid import load_hybrid
from pipeline.errors import PipelineError
from pipeline.report.columns import aligned, wrapped
from pipeline.serve.hybrid.ledger import Ledger, Spent


@dataclass(frozen=True)
class Row:
    """One option. Dollars; tokens are the output tokens that the cloud writes in a month.

    Attributes:
        monthly: computed from tokens, prices and what runs besides; claimed: as its source says.
    """

    title: str
    share_local: float
    tokens: float
    setup: float
    tokens_cost: float
    fixed: float
    claimed: float | None
    why: str

    @property
    def monthly(self) -> float:
        """Tokens and what runs besides."""
        return self.tokens_cost + self.fixed


@dataclass(frozen=True)
class BreakEven:
    """After how many months `second`, dearer to set up, has cost less than `first`; None: never."""

    first: str
    second: str
    months: float | None
    claimed: float | None


def rows(parameters: CostConfig) -> list[Row]:
    """The options in their order."""
    found = []
    for option in parameters.options.values():
        share = 1 - option.share_local.value
        read, written = (share * tokens.value for tokens in (parameters.input_tokens, parameters.output_tokens))
        price = parameters.prices[option.price] if option.price else None
        cost = (read * price.input + written * price.output) / 1e6 if price else 0.0
        why = _difference(parameters, option, price.output if price else 0.0, cost + option.fixed)
        about = (option.title, option.share_local.value, written, option.setup, cost, option.fixed, option.claimed)
        found.append(Row(*about, why))
    return found


def _difference(parameters: CostConfig, option: Any, output: float, monthly: float) -> str:
    """Why a claimed cost is not the computed one; "" where it is, or nothing is claimed."""
    if option.claimed is None or abs(option.claimed - monthly) < 0.005:
        return ""
    tokens, share = parameters.output_tokens.value, 1 - option.share_local.value
    said = (
        f"{option.title}: {option.claimed:,.2f} $ a month are claimed, {monthly:,.2f} computed: {tokens:,.0f} output "
        f"tokens × {share:.0%} in the cloud × {output:g} $/M + {option.fixed:g} $ besides."
    )
    for_tokens = option.claimed - option.fixed
    if not output or for_tokens < 0:
        return said
    implied = for_tokens / output * 1e6
    buys = f"{implied:,.0f} tokens at this price, {implied / tokens:.3g} times all of the month"
    if math.isclose(implied, tokens):
        buys = "all tokens of the month at this price: by the claim, the device answers nothing"
    return f"{said} The {for_tokens:,.2f} $ that the claim leaves for tokens buy {buys}."


def break_even(options: Sequence[Row]) -> list[BreakEven]:
    """For every pair, cheaper set-up first: months after which the other has cost less, as computed and as claimed."""
    pairs = itertools.combinations(sorted(options, key=lambda row: row.setup), 2)

    def months(first: Row, second: Row, monthly: Callable[[Row], float]) -> float | None:
        saved = monthly(first) - monthly(second)
        return (second.setup - first.setup) / saved if saved > 0 else None

    return [
        BreakEven(
            first.title, second.title, months(first, second, lambda row: row.monthly),
            months(first, second, lambda row: row.monthly if row.claimed is None else row.claimed),
        )
        for first, second in pairs
    ]  # fmt: skip


def run(parameters: Path | None, ledger: str | None, as_json: bool) -> None:
    """Print the table of `parameters` (None: configs/cost.yaml), or what `ledger` has ("": configs/hybrid.yaml's).

    Raises:
        ConfigError: the parameters cannot be read.
        PipelineError: there is no such ledger.
    """
    if ledger is not None:
        spent = _spent(Path(ledger) if ledger else load_hybrid().ledger)
        print(json.dumps([asdict(one) for one in spent], indent=2) if as_json else "\n".join(_spent_text(spent)))
        return
    config = load_cost(parameters) if parameters else load_cost()
    found = rows(config)
    pairs = break_even(found)
    document = {
        "options": [asdict(row) | {"monthly": row.monthly} for row in found],
        "break_even": [asdict(pair) for pair in pairs],
    }
    print(json.dumps(document, indent=2) if as_json else "\n".join(_text(config, found, pairs)))


def _spent(path: Path) -> list[Spent]:
    if not path.exists():
        raise PipelineError(
            f"there is no ledger {path}: nothing was asked yet. `python -m pipeline serve BUNDLE --hybrid "
            f"configs/hybrid.yaml` writes it; --ledger FILE reads another."
        )
    book = Ledger(path)
    try:
        return book.spent()
    finally:
        book.close()


# --- text ------------------------------------------------------------------------------------------------------------


def _money(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _text(config: CostConfig, options: Sequence[Row], pairs: Sequence[BreakEven]) -> list[str]:
    users, tokens = config.users.value, config.output_tokens.value
    head = (
        "option", "on the device", "cloud tokens", "set-up $", "tokens $", "besides $", "a month $", "cents a user",
        "claimed $",
    )  # fmt: skip
    table = [head] + [
        (
            row.title, f"{row.share_local:.0%}", f"{row.tokens:,.0f}", f"{row.setup:,.0f}", _money(row.tokens_cost),
            _money(row.fixed), _money(row.monthly), f"{100 * row.monthly / users:.3f}",
            _money(row.claimed),
        )
        for row in options
    ]  # fmt: skip
    months = [("cheaper to set up", "cheaper a month", "pays after, months", "as claimed")] + [
        (pair.first, pair.second, *("never" if one is None else f"{one:,.1f}" for one in (pair.months, pair.claimed)))
        for pair in pairs
    ]
    outputs = {price.output for price in config.prices.values()}
    at_prices = ", ".join(f"{tokens * one / 1e6:,.2f} $ at {one:g} $/M" for one in sorted(outputs, reverse=True))
    sentence = (
        f"{users:,.0f} users, {config.input_tokens.value:,.0f} input and {tokens:,.0f} output tokens a month, "
        f"{tokens / users:,.0f} output tokens a user. All output tokens in the cloud: {at_prices}."
    )
    shares = [
        f"{one.title}: {one.share_local.value:.0%} on the device: {one.share_local.source} ({one.share_local.date})."
        for one in config.options.values()
        if 0 < one.share_local.value < 1
    ]
    why = [row.why for row in options if row.why]
    notes = [line for note in (*shares, *why) for line in wrapped(note, "- ")]
    return [*wrapped(sentence), "", *aligned(table, {0}), "", *aligned(months, {0, 1}), *[""] * bool(notes), *notes]


def _spent_text(spent: Sequence[Spent]) -> list[str]:
    head = (
        "month",
        "who",
        "provider",
        "model",
        "attempts",
        "answered",
        "read",
        "written",
        "guessed",
        "disputed",
        "dollars",
    )
    table = [head] + [
        (
            one.month, one.place, one.provider, one.model, f"{one.attempts:,}", f"{one.answered:,}",
            f"{one.prompt_tokens:,}", f"{one.completion_tokens:,}", f"{one.estimated:,}", f"{one.disputed:,}",
            f"{one.cost:,.6f}",
        )
        for one in spent
    ]  # fmt: skip
    lines = aligned(table, {0, 1, 2, 3})
    for month in sorted({one.month for one in spent}):
        own = [one for one in spent if one.month == month]
        answered = sum(one.answered for one in own)
        local = sum(one.answered for one in own if one.place == "device")
        share = (
            f"{local / answered:.1%} of {answered:,} answers came from the device" if answered else "nothing answered"
        )
        lines.append(f"{month}: {share}; {sum(one.cost for one in own):,.6f} $.")
    legend = (
        "guessed: attempts whose tokens no provider reported, counted with the device's tokenizer; disputed: attempts "
        "whose reported usage is far from that count, at the reported cost."
    )
    return [*lines, "", *wrapped(legend)]
