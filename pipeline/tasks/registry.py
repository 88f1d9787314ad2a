"""All tasks, found among the modules of this package, and the suites that are made of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, create_model, model_validator

import pipeline.tasks as package
from pipeline.config.typed_yaml import CONFIGS, Frozen, load
from pipeline.tasks.task import Figure, Gate, Task


@cache
def tasks() -> tuple[Task, ...]:
    """Every module's `TASK`, in their order."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    found = [getattr(importlib.import_module(name), "TASK", None) for name in names]
    return tuple(sorted(filter(None, found), key=lambda task: task.place))


def gates() -> dict[str, Gate]:
    """Every task's gates by name, in their order."""
    return {gate.name: gate for task in tasks() for gate in task.gates}


class Suite(Frozen):
    """One evaluation suite: a part for each task that it measures, and how a machine runs the reference through it."""

    read_by_name: ClassVar[bool] = True
    reference: Literal["auto", "memory", "layers"] = Field(
        default="auto",
        description="whole in memory; layer by layer, without speed; auto: in memory where it fits",
    )
    talking: bool = Field(default=False, description="for runs whose models are all of a gate class for talking models")

    @model_validator(mode="after")
    def _asks_enough(self) -> Self:
        reasons = [getattr(part, "shallow", "") for _, part in self.by_task()]
        if any(reasons) and not self.talking:
            raise ValueError(f"{next(filter(None, reasons))}; only a suite with `talking: true` may ask less")
        return self

    def by_task(self) -> list[tuple[Task, Any]]:
        """The tasks that it measures, each with its part."""
        return [(task, part) for task in tasks() if (part := getattr(self, task.part)) is not None]

    def texts(self) -> tuple[str, ...]:
        """Names of the held-out text that judges, sorted."""
        return tuple(sorted({name for _, part in self.by_task() for name in getattr(part, "texts", ())}))


@cache
def suite_type() -> type[Suite]:
    """`Suite` with a field for every task that has a part of its own."""
    fields: dict[str, Any] = {task.name: (task.config | None, None) for task in tasks() if task.config}
    return create_model("EvaluationConfig", __base__=Suite, **fields)


def load_suite(suite: str) -> Suite:
    """configs/evaluation/<suite>.yaml"""
    return load(suite_type(), CONFIGS / "evaluation" / f"{suite}.yaml")


def figures(metrics: Mapping[str, Any], texts: Sequence[str]) -> list[Figure]:
    """What was measured, in a fixed order; what was not is left out. `texts`: names of the held-out text."""
    found = []
    for task in tasks():
        section, (name, hub) = metrics.get(task.name) or {}, task.dataset
        shared = (section.get("tokens", section.get("n")), name or ", ".join(texts), task.detail(section, texts), hub)
        for row in task.measures:
            if (value := section.get(row.key)) is not None:
                low, high = (section.get(f"{row.key}_{end}") for end in ("low", "high"))
                found.append(Figure(row.key, row.title, row.unit, value, low, high, *shared, row.hub))
    return found
