"""The whole configuration of a run, checked at minute 0: entries, recipes, gates, suite, data, tiers, signing."""

from __future__ import annotations

from pipeline.config.calibration import load_calibration, load_parity, load_sensitivity
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.phones import load_devices, load_shapes, load_tiers
from pipeline.config.signing import load_released, load_signing
from pipeline.config.sources import HubFile, WheelSource, load_datasets
from pipeline.config.typed_yaml import Frozen, Name, check
from pipeline.errors import ConfigError
from pipeline.judge.policy import gate_row, load_gates
from pipeline.keys.commit import require_committed
from pipeline.tasks.registry import load_suite


def check_all() -> None:
    """Load everything that the selected run will read, so that a typo, or a variant that nothing judges, fails before
    the first stage that runs, whichever that is."""
    pipeline = load_pipeline()
    require_suite()
    require_committed(load_signing())
    for model in pipeline.models:
        for variant in pipeline.variants:
            gate_row(model, variant)
    for load in (needed_datasets, load_released, load_tiers, load_devices, load_shapes, load_signing, load_parity):
        load()


class _Named(Frozen):
    name: Name


def require_name(name: str, what: str) -> None:
    """Raise ConfigError unless `name` can be that of a file in configs/: small letters, digits, '_' and '-'."""
    check(_Named, {"name": name}, what)


def require_suite() -> None:
    """Refuse a suite for talking models where a model of the run is a real one. Raises ConfigError."""
    run, classes = load_pipeline(), load_gates().classes
    talking = {name for name, one in classes.items() if one.talking}
    real = [model for model in run.models if load_model(model).gate_class not in talking]
    if real and load_suite(run.suite).talking:
        raise ConfigError(
            f"configs/evaluation/{run.suite}.yaml decides for talking models only, which test machinery, and "
            f"{', '.join(real)} would be judged by it. Name another `suite` in configs/pipeline.yaml."
        )


def needed_datasets() -> dict[str, HubFile | WheelSource]:
    """Entries of configs/datasets.yaml that the selected run reads. Raises ConfigError for an absent one."""
    suite, datasets = load_suite(load_pipeline().suite), load_datasets().datasets
    needed = {name for task, part in suite.by_task() for name in task.datasets(part)}
    needed |= {*load_calibration().datasets, *load_sensitivity().datasets}
    if unknown := sorted(needed - set(datasets)):
        raise ConfigError(f"configs/datasets.yaml: no entry for {', '.join(unknown)}")
    return {name: source for name, source in datasets.items() if name in needed}
