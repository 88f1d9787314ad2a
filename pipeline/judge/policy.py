"""The row of configs/gates.yaml that judges a variant."""

from __future__ import annotations

from pipeline.config.gates import GateLimits, load_gates
from pipeline.config.models import load_model
from pipeline.config.recipes import load_recipe
from pipeline.errors import ConfigError


def gate_row(model: str, variant: str) -> tuple[str, GateLimits]:
    """Class/row of configs/gates.yaml that judges a variant, and its limits. Raises ConfigError when there is none."""
    gates, gate_class = load_gates(), load_model(model).gate_class
    if gate_class not in gates.classes:
        raise ConfigError(
            f"configs/models/{model}.yaml: gate_class {gate_class!r} is not in configs/gates.yaml "
            f"(there: {', '.join(gates.classes)})"
        )
    rows, name = gates.classes[gate_class].variants, load_recipe(variant).gate or variant
    if name not in rows:
        raise ConfigError(
            f"configs/gates.yaml: class {gate_class!r} of {model} has no limits for {name!r} (there: "
            f"{', '.join(rows)}); a variant without a gate cannot be released. Add a row, or name one as `gate` in "
            f"configs/recipes/{variant}.yaml"
        )
    return f"{gate_class}/{name}", rows[name]
