"""The report as text that stays readable at 120 columns; colours only on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from pipeline.judge.verdicts import ERROR, FAIL, INCONCLUSIVE, PASS
from pipeline.report import cells
from pipeline.report.rows import ModelReport, Report, Row

WIDTH = 118
_GAP = "  "
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
    lines.append(Text(""))
    read = (*cells.legends(), cells.conditions(model), model.note)
    for sentence in (*cells.power_sentences(model), *cells.notes(model), *read):
        lines += [Text(line) for line in textwrap.wrap(sentence, WIDTH)]
    return [*lines, Text("")]


def _table(model: ModelReport) -> list[Text]:
    """Two lines per row, and the bundle's path or the refusal below them."""
    grid = cells.table(model)
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*grid, strict=True)]
    lines = [_line([cell[part] for cell in grid[0]], widths, "dim") for part in (0, 1)]
    for row, content in zip(model.rows, grid[1:], strict=True):
        lines.append(_line([first for first, _ in content], widths))
        lines.append(_line([second for _, second in content], widths, "dim"))
        lines += [Text(line) for line in _wrapped(cells.delivery(row))]
    return lines


def _line(texts: Sequence[str], widths: Sequence[int], style: str = "") -> Text:
    """First column to the left, the others to the right, the last one (verdict) to the left again."""
    last = len(texts) - 1
    line = Text(style=style)
    for column, (text, width) in enumerate(zip(texts, widths, strict=True)):
        padded = text.ljust(width) if column in (0, last) else text.rjust(width)
        line.append(padded, style=_STYLES.get(text, ""))
        line.append("" if column == last else _GAP)
    line.rstrip()
    return line


def _gates(row: Row, reference: Row) -> list[Text]:
    """One line per gate, then the reasons of those that did not pass."""
    if row.verdict is None:
        return []
    content = [list(cells.GATE_COLUMNS), *(cells.gate_cells(line) for line in row.verdict.lines)]
    widths = [max(len(texts[column]) for texts in content) for column in range(len(cells.GATE_COLUMNS))]
    title = Text(f"gates of {row.model}/{row.variant}: ", style="bold")
    title.append(row.verdict.verdict, style=_STYLES[row.verdict.verdict])
    lines = [title, *_facts(cells.identity(row, reference)), _line(content[0], widths, "dim")]
    lines += [_line(texts, widths) for texts in content[1:]]
    return lines + [Text(line) for reason in cells.reasons(row) for line in _wrapped(reason)]


def _facts(facts: Mapping[str, str]) -> list[Text]:
    """One fact a line, its name padded."""
    wide = max(map(len, facts), default=0)
    return [
        Text(line, style="dim")
        for name, fact in facts.items()
        for line in textwrap.wrap(f"{name.ljust(wide)}  {fact}", WIDTH, subsequent_indent=" " * (wide + 2))
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
