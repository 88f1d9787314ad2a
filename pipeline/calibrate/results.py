"""What the calibrate and sensitivity stages wrote, read again."""

from __future__ import annotations

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.calibrate.correlations import unpacked
from pipeline.workspace import Workspace

DAMPING = "damping"  # beside an input's name in a file of correlations: the share that GPTQ adds
TOKENS = ".tokens"  # behind `layers.0.experts` among the moments: how many woke each expert
ERRORS = "errors.safetensors"
ORDER = "order"  # beside the formats in a key of the errors' file: channels of an input by importance


def read_moments(workspace: Workspace) -> dict[str, np.ndarray]:
    """What `run` wrote: input name → float32 [channels]; of a mixture also how many tokens woke each expert."""
    return load_file(workspace.require(workspace.moments, "calibrate"))


def read_products(workspace: Workspace, name: str, moments: np.ndarray) -> tuple[np.ndarray, float]:
    """E[x·xᵀ] of a layer's input, float32 [channels, channels], whose diagonal is `moments`; and its damping."""
    with safe_open(workspace.require(workspace.correlations(name), "calibrate"), "numpy") as file:
        return unpacked(file.get_tensor(name), moments), float(file.get_tensor(f"{name}.{DAMPING}"))


def read_ranges(workspace: Workspace) -> dict[str, np.ndarray]:
    """What `run` wrote: `layers.0.key`, `layers.0.value`, … → float32 [kv_heads · head_dim]."""
    return load_file(workspace.require(workspace.ranges, "calibrate"))
