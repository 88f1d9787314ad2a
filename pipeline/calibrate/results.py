"""What the calibrate and sensitivity stages wrote, read again."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file

from pipeline.workspace import Workspace

ERRORS = "errors.safetensors"
ORDER = "order"  # beside the formats in a key of the errors' file: channels of an input by importance


def read_moments(workspace: Workspace) -> dict[str, np.ndarray]:
    """What `run` wrote: input name → float32 [channels]."""
    return load_file(workspace.require(workspace.moments, "calibrate"))


def read_ranges(workspace: Workspace) -> dict[str, np.ndarray]:
    """What `run` wrote: `layers.0.key`, `layers.0.value`, … → float32 [kv_heads · head_dim]."""
    return load_file(workspace.require(workspace.ranges, "calibrate"))
