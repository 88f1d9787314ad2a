"""The report's files: HTML page, plot, data for `dvc plots`, plain text."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from rich.console import Console

from pipeline.files import write_bytes, write_json
from pipeline.report import cells, plot
from pipeline.report.rows import Report, pareto_points
from pipeline.report.terminal import WIDTH, show


def write(report: Report, directory: Path) -> Path:
    """Write report.html, pareto.png, pareto.json and report.txt into `directory`, each whole or not at all.

    Returns:
        The path of report.html: one file without links to anything outside it.
    """
    light, text = plot.render(report), io.StringIO()
    page = directory / "report.html"
    write_bytes(directory / "pareto.png", light)
    write_json(directory / "pareto.json", pareto_points(report))
    show(report, Console(file=text, width=WIDTH, no_color=True, force_terminal=False))
    write_bytes(directory / "report.txt", text.getvalue().encode())
    write_bytes(page, _html(report, light, plot.render(report, plot.DARK)).encode())
    return page


def _html(report: Report, light: bytes, dark: bytes) -> str:
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        report=report, cells=cells, light=base64.b64encode(light).decode(), dark=base64.b64encode(dark).decode()
    )
