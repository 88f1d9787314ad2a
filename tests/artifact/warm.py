"""Imported by the server that test processes are forked from: the kernels are then loaded in all of them."""

from __future__ import annotations

import numpy as np

from pipeline.checkpoint import widen
from pipeline.quantize.formats import TensorFormat
from pipeline.quantize.search import weighted
from tests.artifact import exported  # noqa: F401 (and what it imports)
from tests.stages import crashing  # noqa: F401

_ROW = np.ones((1, 64), np.float32)
weighted(_ROW, _ROW[0], TensorFormat.parse("w4b32a"))
widen.widen_bfloat16(np.ones(1, np.uint16), np.empty(1, np.uint32))
