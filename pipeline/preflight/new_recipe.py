"""new-recipe: a recipe of one's own from another, which plans, has a gate, and says what it takes of each model."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.artifact.plans import SMALLEST
from pipeline.config.models import load_pipeline
from pipeline.config.phones import load_tiers
from pipeline.config.recipes import load_recipe
from pipeline.config.typed_yaml import CONFIGS, known_name
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import write_bytes
from pipeline.judge.policy import gate_row
from pipeline.preflight.configuration import require_name
from pipeline.preflight.footprints import computed, known


def run(name: str, extends: str, size: int | None, tier: str | None) -> None:
    """Write configs/recipes/`name`.yaml, which extends another; with `size` (bytes on disk) or `tier`, under a budget.

    Raises:
        ConfigError: the name is taken or is none, or `extends` or `tier` are not there.
        PipelineError: the recipe cannot be planned for a model of the run, or nothing judges it. Nothing is left then.
    """
    file, base = CONFIGS / "recipes" / f"{name}.yaml", load_recipe(extends)
    require_name(name, "new-recipe")
    if file.exists():
        raise ConfigError(f"{file} is there already. Edit it, or take another name.")
    if tier:
        known_name(tier, [*load_tiers().tiers, SMALLEST], "--tier", "configs/tiers.yaml")
    budget = {key: value for key, value in {"bytes": size, "tier": tier}.items() if value}
    values: dict[str, Any] = {"extends": extends, "title": name, "version": 1, "gate": base.gate or extends}
    if budget:
        values["budget"] = budget | ({"weights": "mapped"} if tier else {})
    write_bytes(file, yaml.safe_dump(values, sort_keys=False).encode())
    try:
        lines = [_planned(model, name) for model in load_pipeline().models]
    except PipelineError:
        file.unlink()
        raise
    print(f"{file}\n{file.read_text(encoding='utf-8')}", *lines, sep="\n")
    print(f'\nEdit it (docs/tuning.md), then: make repro VARIANTS="{" ".join((*load_pipeline().variants, name))}"')


def _planned(model: str, variant: str) -> str:
    """What a variant takes of a model, and which row judges it."""
    row, _ = gate_row(model, variant)
    found = computed(known(model), variant, load_tiers().context)
    size = f"{'at most ' * (found.download.basis == 'bound')}{found.download.bytes:,} bytes"
    return f"{model}: {size}, {found.packed.bytes:,} in the kernels' memory; judged by {row}"
