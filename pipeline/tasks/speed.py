"""Speed and memory, measured in a process of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.runtime import speed
from pipeline.tasks.subject import Subject


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`speed` metrics; never kept from a killed run."""
    del folder
    return speed.measure(subject.folder, subject.suite.speed)
