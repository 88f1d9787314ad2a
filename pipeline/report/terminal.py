"""The report as text that stays readable at 120 columns; colours only on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from pipeline.judge.verdicts import ERROR, FAIL, INCONCLUSIVE, PASS
from pipeline.report import advice, cells, samples
from pipeline.report.columns import WIDTH, aligned, wrapped
from pipeline.report.rows import ModelReport, Report, Row

_STYLES = {PASS: "bold green", FAIL: "bold red", INCONCLUSIVE: "bold yellow", ERROR: "bold magenta"}


def show(report: Report, console: Console) -> None:
    """Print the whole report: what to ship, facts, per model the table, every gate line, and what samples detect."""
    lines = [line for model in report.models for line in _advice(model)]
    lines += [*_facts(report.about), Text("")] if report.about else []
    lines += [line for model in report.models for line in _model(model)]
    lines += [Text(line) for caveat in cells.CAVEATS for line in textwrap.wrap(caveat, WIDTH)]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _advice(model: ModelReport) -> list[Text]:
    """What to ship to which phones, and why not the other variants."""
    found = advice.advise(model)
    shown = [Text(f"{model.model}: {found.headline}", style="bold")]
    for phones, variant, way, takes in found.phones:
        shown += map(Text, wrapped(f"{phones}: {variant}; {way}; {takes}.", "  ", "    "))
    verdicts = {row.variant: row.verdict.verdict for row in model.variants if row.verdict}
    for variant, reasons in found.others.items():
        why = f"not {variant}, {verdicts[variant]}: {'; '.join(reasons)}."
        shown += map(_coloured, wrapped(why, "  ", "    "))
    return [*shown, Text("")]


def _sample(model: ModelReport) -> list[Text]:
    """One problem and what each row answered."""
    if not (sample := samples.choose(model)):
        return []
    shown = [Text(""), Text(f"One sample: {sample.title}", style="bold"), *_quoted(sample.prompt)]
    for variant, (text, outcome) in sample.answers.items():
        shown += [*map(Text, wrapped(f"{variant}: {outcome}", "  ", "    ")), *_quoted(text)]
    return shown


def _quoted(text: str) -> list[Text]:
    """A model's text, its lines broken where they are too long."""
    lines = [line[at : at + WIDTH - 6] for line in text.split("\n") for at in range(0, max(1, len(line)), WIDTH - 6)]
    return [Text(f"    | {line}", style="dim") for line in lines]


def _model(model: ModelReport) -> list[Text]:
    lines = [Text(model.model, style="bold underline"), *_facts(cells.identity(model.reference)), *_table(model)]
    for row in model.variants:
        lines += [Text(""), *_gates(row, model.reference)]
    lines += _sample(model)
    read = (*cells.power_sentences(model), *cells.notes(model), *cells.legends(), cells.conditions(model), model.note)
    sentences = [Text(line) for sentence in read for line in textwrap.wrap(sentence, WIDTH)]
    return [*lines, Text(""), *sentences, Text("")]


def _table(model: ModelReport) -> list[Text]:
    """Two lines per row, and the bundle's path or the refusal below them."""
    grid = cells.table(model)
    lines = aligned([[cell[part] for cell in row] for row in grid for part in (0, 1)], {0, 1})
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
    head, *lines = aligned(texts, {0, 1})
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
