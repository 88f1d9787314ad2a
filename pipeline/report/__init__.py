"""The report of a run: a table for the terminal, an HTML page with the size/KL plot, and data for `dvc plots`."""

from pipeline.report.rows import REFERENCE, Row, build
from pipeline.report.terminal import show
from pipeline.report.write import write

__all__ = ["REFERENCE", "Row", "build", "show", "write"]
