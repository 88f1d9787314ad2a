"""All that can be known of a run before anything is downloaded: its configuration, whole."""

from __future__ import annotations

from pipeline.config.calibration import load_calibration, load_sensitivity
from pipeline.config.gates import load_released
from pipeline.config.models import load_pipeline
from pipeline.config.parity import load_parity
from pipeline.config.phones import load_devices, load_shapes
from pipeline.config.signing import load_signing
from pipeline.config.sources import HubFile, WheelSource, load_datasets
from pipeline.errors import ConfigError
from pipeline.judge.policy import gate_row
from pipeline.tasks.registry import load_suite


def needed_datasets() -> dict[str, HubFile | WheelSource]:
    """Entries of configs/datasets.yaml that the selected run reads. Raises ConfigError for an absent one."""
    suite, datasets = load_suite(load_pipeline().suite), load_datasets().datasets
    needed = {name for task, part in suite.by_task() for name in task.datasets(part)}
    needed |= {*load_calibration().datasets, *load_sensitivity().datasets}
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
