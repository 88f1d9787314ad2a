"""The report's files: HTML page, plot, data for `dvc plots`, plain text."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from rich.console import Console

from pipeline.bundle.template import render
from pipeline.files import write_bytes, write_json
from pipeline.report import advice, cells, plot, samples
from pipeline.report.columns import WIDTH
from pipeline.report.rows import Report, pareto_points
from pipeline.report.terminal import show


def write(report: Report, directory: Path) -> Path:
    """Write report.html, pareto.png, pareto.json and report.txt into `directory`, each whole or not at all.

    Returns:
        The path of report.html: one file that loads nothing from outside it.
    """
    themes, sizes = {"light": plot.LIGHT, "dark": plot.DARK}, {"wide": plot.WIDE, "narrow": plot.NARROW}
    pictures = {
        f"{theme}_{size}": plot.render(report, colours, inches)
        for theme, colours in themes.items()
        for size, inches in sizes.items()
    }
    page, text = directory / "report.html", io.StringIO()
    write_bytes(directory / "pareto.png", pictures["light_wide"])
    write_json(directory / "pareto.json", pareto_points(report))
    show(report, Console(file=text, width=WIDTH, no_color=True, force_terminal=False))
    write_bytes(directory / "report.txt", text.getvalue().encode())
    encoded = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    template = Path(__file__).with_name("page.html.j2")
    write_bytes(page, render(template, report=report, cells=cells, advice=advice, samples=samples, **encoded))
    return page
