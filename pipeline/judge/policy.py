"""configs/gates.yaml, and the row of it that judges a variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, create_model

from pipeline.config.models import load_model
from pipeline.config.recipes import load_recipe
from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, load
from pipeline.errors import ConfigError
from pipeline.tasks.registry import gates


class Row(Frozen):
    """One row of limits."""

    read_by_name: ClassVar[bool] = True
    opt_in: tuple[Name, ...] | None = Field(
        default=None, description="models that may be released in this row; None: all"
    )

    def permits(self, model: str) -> bool | None:
        """Whether a model may be released in this row at all; None where no permission is needed."""
        return None if self.opt_in is None else model in self.opt_in


# A limit for each gate that has one. A margin of None means: reported, gates nothing.
_fields: dict[str, Any] = {
    gate.limit: (float if gate.allowed.is_required() else float | None, gate.allowed)
    for gate in gates().values()
    if gate.allowed
}
GateLimits = create_model("GateLimits", __base__=Row, **_fields)


class GateClass(Frozen):
    """A class of models that share limits, with the reason for them."""

    reason: str
    parameters: tuple[int, int] = Field(description="least and most that a model judged by it may have")
    talking: bool = Field(
        default=False,
        description="judges models of `benchmarks.synthetic --talking` and no others: they test machinery, and no "
        "release is made of them",
    )
    variants: dict[Name, GateLimits] = Field(  # type: ignore[valid-type]  # a class all the same: made of the tasks' gates
        description="rows by the variant they judge, or the `gate` of its recipe"
    )


class GatesConfig(Frozen):
    """All gate classes by name, and the ratchet."""

    ratchet: float = Field(gt=1, description="most that a mean KL may be of the last release's on the same text")
    classes: dict[Name, GateClass]


def load_gates() -> GatesConfig:
    """configs/gates.yaml"""
    return load(GatesConfig, CONFIGS / "gates.yaml")


def class_rows(model: str) -> Mapping[str, Row]:
    """All rows that may judge a model's variants. Raises ConfigError for a class that configs/gates.yaml has not."""
    classes, gate_class = load_gates().classes, load_model(model).gate_class
    if gate_class not in classes:
        raise ConfigError(
            f"configs/models/{model}.yaml: gate_class {gate_class!r} is not in configs/gates.yaml "
            f"(there: {', '.join(classes)})"
        )
    return classes[gate_class].variants


def gate_row(model: str, variant: str) -> tuple[str, Row]:
    """Class/row of configs/gates.yaml that judges a variant, and its limits. Raises ConfigError when there is none."""
    rows, gate_class = class_rows(model), load_model(model).gate_class
    name = load_recipe(variant).gate or variant
    if name not in rows:
        raise ConfigError(
            f"configs/gates.yaml: class {gate_class!r} of {model} has no limits for {name!r} (there: "
            f"{', '.join(rows)}); a variant without a gate cannot be released. Add a row, or name one as `gate` in "
            f"configs/recipes/{variant}.yaml"
        )
    return f"{gate_class}/{name}", rows[name]
