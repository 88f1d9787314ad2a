"""Typed configuration: every YAML file under `configs/`, frozen, with unknown keys refused.

One class per file, in the modules of this package; `load_*` functions read one file and raise `ConfigError` naming the
file, the key, the value and, for a misspelt key, the nearest known one. Nothing here imports another module of ours
except the error types, and nothing is downloaded before the configuration of every selected stage has been read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from pipeline.config.calibration import CalibrationConfig, SensitivityConfig
from pipeline.config.evaluation import EvaluationConfig, ParityConfig
from pipeline.config.gates import GateLimits, GatesConfig, ReleasedConfig
from pipeline.config.models import ModelConfig, PipelineConfig
from pipeline.config.phones import ClaimsConfig, DevicesConfig, ShapesConfig, TiersConfig
from pipeline.config.recipes import BudgetRecipe, Recipe, RecipeConfig
from pipeline.config.signing import SigningConfig
from pipeline.config.sources import DatasetsConfig, HubFile, WheelSource
from pipeline.config.typed_yaml import load, read
from pipeline.errors import ConfigError

CONFIGS = Path("configs")


def load_pipeline() -> PipelineConfig:
    """configs/pipeline.yaml"""
    return load(PipelineConfig, CONFIGS / "pipeline.yaml")


def load_model(name: str) -> ModelConfig:
    """configs/models/<name>.yaml"""
    return load(ModelConfig, CONFIGS / "models" / f"{name}.yaml")


def load_recipe(variant: str) -> Recipe:
    """configs/recipes/<variant>.yaml"""
    path = CONFIGS / "recipes" / f"{variant}.yaml"
    data = read(path)
    return load(BudgetRecipe if isinstance(data, dict) and "budget" in data else RecipeConfig, path)


def has_budget(variants: Iterable[str]) -> bool:
    """Whether any of these recipes is solved for, from what the sensitivity stage measures."""
    return any(isinstance(load_recipe(variant), BudgetRecipe) for variant in variants)


def load_suite(name: str) -> EvaluationConfig:
    """configs/evaluation/<name>.yaml"""
    return load(EvaluationConfig, CONFIGS / "evaluation" / f"{name}.yaml")


def load_datasets() -> DatasetsConfig:
    """configs/datasets.yaml"""
    return load(DatasetsConfig, CONFIGS / "datasets.yaml")


def load_calibration() -> CalibrationConfig:
    """configs/calibration.yaml"""
    return load(CalibrationConfig, CONFIGS / "calibration.yaml")


def load_sensitivity() -> SensitivityConfig:
    """configs/sensitivity.yaml"""
    return load(SensitivityConfig, CONFIGS / "sensitivity.yaml")


def load_gates() -> GatesConfig:
    """configs/gates.yaml"""
    return load(GatesConfig, CONFIGS / "gates.yaml")


def load_released() -> ReleasedConfig:
    """configs/released.yaml"""
    return load(ReleasedConfig, CONFIGS / "released.yaml")


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


def load_tiers() -> TiersConfig:
    """configs/tiers.yaml"""
    return load(TiersConfig, CONFIGS / "tiers.yaml")


def load_devices() -> DevicesConfig:
    """configs/devices.yaml, with every device in the highest class of its platform that its RAM reaches.

    Raises ConfigError for one that is not.
    """
    path, tiers = CONFIGS / "devices.yaml", load_tiers().tiers
    loaded = load(DevicesConfig, path)
    for name, device in loaded.devices.items():
        known_name(device.tier, tiers, f"{path}: devices.{name}.tier", "configs/tiers.yaml")
        own = tiers[device.tier]
        reached = {key: tier for key, tier in tiers.items() if tier.platform == own.platform}
        reached = {key: tier for key, tier in reached.items() if tier.ram_bytes <= device.ram_bytes}
        best = max(reached, key=lambda key: reached[key].ram_bytes, default=None)
        if best != device.tier:
            raise ConfigError(
                f"{path}: devices.{name}: {device.ram_bytes:,} bytes of RAM are tier {best or 'none'!r} of "
                f"{own.platform}, not {device.tier!r}, which begins at {own.ram_bytes:,}."
            )
    return loaded


def load_shapes() -> ShapesConfig:
    """configs/shapes.yaml"""
    return load(ShapesConfig, CONFIGS / "shapes.yaml")


def load_claims() -> ClaimsConfig:
    """configs/claims.yaml"""
    return load(ClaimsConfig, CONFIGS / "claims.yaml")


def load_signing() -> SigningConfig:
    """configs/signing.yaml"""
    return load(SigningConfig, CONFIGS / "signing.yaml")


def load_parity() -> ParityConfig:
    """configs/parity.yaml"""
    return load(ParityConfig, CONFIGS / "parity.yaml")


def model_names() -> list[str]:
    """Every entry of configs/models, sorted."""
    return sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))


def known_name(name: str, known: Iterable[str], what: str, where: str) -> None:
    """Raise ConfigError, with the nearest, for a name that is not among those in `where`."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what}: {name!r} is not in {where}.{hint} There: {', '.join(names) or 'nothing'}.")


def needed_datasets() -> dict[str, HubFile | WheelSource]:
    """Entries of configs/datasets.yaml that the selected run reads. Raises ConfigError for an absent one."""
    suite, datasets = load_suite(load_pipeline().suite), load_datasets().datasets
    texts = {*suite.divergence.texts, *load_calibration().datasets, *load_sensitivity().datasets}
    needed = {"mmlu", "humaneval", *texts, *["mmlu-dev"] * (suite.mmlu.exemplars == "dev")}
    if unknown := sorted(needed - set(datasets)):
        raise ConfigError(f"configs/datasets.yaml: no entry for {', '.join(unknown)}")
    return {name: source for name, source in datasets.items() if name in needed}


def check_all() -> None:
    """Load everything that the selected run will read, so that a typo fails before the first download."""
    pipeline = load_pipeline()
    for model in pipeline.models:
        for variant in pipeline.variants:
            gate_row(model, variant)
    needed_datasets()
    load_released()
    load_devices()
    load_shapes()
    load_signing()
    load_parity()
