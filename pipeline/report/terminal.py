"""The report as text that stays readable at 120 columns; colours only on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from pipeline.judge.verdicts import ERROR, FAIL, INCONCLUSIVE, PASS
from pipeline.report import cells
from pipeline.report.columns import WIDTH, aligned, wrapped
from pipeline.report.rows import ModelReport, Report, Row

_STYLES = {PASS: "bold green", FAIL: "bold red", INCONCLUSIVE: "bold yellow", ERROR: "bold magenta"}


def show(report: Report, console: Console) -> None:
    """Print the whole report: facts, per model the table, every gate line, and what samples can detect."""
    lines = [*_facts(report.about), Text("")] if report.about else []
    lines += [line for model in report.models for line in _model(model)]
    lines += [Text(line) for caveat in cells.CAVEATS for line in textwrap.wrap(caveat, WIDTH)]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _model(model: ModelReport) -> list[Text]:
    lines = [Text(model.model, style="bold underline"), *_facts(cells.identity(model.reference)), *_table(model)]
    for row in model.variants:
        lines += [Text(""), *_gates(row, model.reference)]
    read = (*cells.power_sentences(model), *cells.notes(model), *cells.legends(), cells.conditions(model), model.note)
    sentences = [Text(line) for sentence in read for line in textwrap.wrap(sentence, WIDTH)]
    return [*lines, Text(""), *sentences, Text("")]


def _table(model: ModelReport) -> list[Text]:
    """Two lines per row, and the bundle's path or the refusal below them."""
    grid = cells.table(model)
    lines = aligned([[cell[part] for cell in row] for row in grid for part in (0, 1)], {0, len(grid[0]) - 1})
    shown = [Text(line, style="dim") for line in lines[:2]]
    for row, first, second in zip(model.rows, lines[2::2], lines[3::2], strict=True):
        shown += [_coloured(first), Text(second, style="dim"), *map(Text, wrapped(row.delivery, "  ", "    "))]
    return shown


def _coloured(line: str, style: str = "") -> Text:
    """A line whose verdicts have their colours."""
    text = Text(line, style=style)
    for verdict, colour in _STYLES.items():
        text.highlight_words([verdict], colour)
    return text


def _gates(row: Row, reference: Row) -> list[Text]:
    """One line per gate, then the reasons of those that did not pass."""
    if row.verdict is None:
        return []
    texts = [cells.GATE_COLUMNS, *map(cells.gate_cells, row.verdict.lines)]
    head, *lines = aligned(texts, {0, len(cells.GATE_COLUMNS) - 1})
    title = _coloured(f"gates of {row.model}/{row.variant}: {row.verdict.verdict}", "bold")
    shown = [title, *_facts(cells.identity(row, reference)), Text(head, style="dim"), *map(_coloured, lines)]
    return shown + [Text(line) for reason in cells.reasons(row) for line in wrapped(reason, "  ", "    ")]


def _facts(facts: Mapping[str, str]) -> list[Text]:
    """One fact a line, its name padded."""
    wide = max(map(len, facts), default=0)
    return [
        Text(line, style="dim")
        for name, fact in facts.items()
        for line in textwrap.wrap(f"{name.ljust(wide)}  {fact}", WIDTH, subsequent_indent=" " * (wide + 2))
    ]
