"""The figures of a variant that `dvc metrics diff` and `dvc exp show` compare, of the hundreds that were measured.

Two files, because git tracks one of them: what the same recipe gives on every machine, in four digits, so that a run
changes the file only where a result differs; and the speed, which belongs to the machine.
"""

from __future__ import annotations

from typing import Any

from pipeline.tasks.registry import tasks
from pipeline.tasks.task import Metrics, number

_SIZES = ("bytes_on_disk", "bits_per_weight", "packed_bytes")
_INTERVAL = "kl_mean"  # of the figure that decides, the interval too
_SPEEDS = ("tokens_per_second",)
_DIGITS = 4


def results(measured: Metrics, verdict: str) -> dict[str, Any]:
    """The size, each task's figures that the model card's index has, and the verdict."""
    wanted: dict[str, list[str]] = {"size": [*_SIZES]}
    for task in tasks():
        wanted[task.name] = [row.key for row in task.measures if row.hub]
        if _INTERVAL in wanted[task.name]:
            wanted[task.name] += [f"{_INTERVAL}_low", f"{_INTERVAL}_high"]
    return {name: found for name, keys in wanted.items() if (found := _chosen(measured, name, keys))} | {
        "verdict": verdict
    }


def speeds(measured: Metrics) -> dict[str, Any]:
    """What of the speed is compared."""
    return _chosen(measured, "speed", _SPEEDS)


def _chosen(measured: Metrics, name: str, keys: Any) -> dict[str, float]:
    section = measured.get(name) or {}
    found = {key: value for key in keys if (value := number(section, key)) is not None}
    return {key: value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}") for key, value in found.items()}
