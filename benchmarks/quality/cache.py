"""What was measured, by what decides it: a peer's file is neither made nor measured again when only ours changed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.measure import Measured
from pipeline.files import read_json, write_bytes, write_json


class Cache:
    """A folder of measurements."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, inputs: Mapping[str, Any], make: Callable[[], Measured]) -> Measured:
        """What `inputs` gave before, or `make()`. `inputs` are plain values: all that the result depends on."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        figures, tokens = self.folder / f"{key}.json", self.folder / f"{key}.npy"
        if not figures.exists():
            found = make()
            buffer = io.BytesIO()
            np.save(buffer, found.kl)
            write_bytes(tokens, buffer.getvalue())
            write_json(figures, found.figures)  # last: its existence means that both are there
        return Measured(read_json(figures), np.load(tokens, allow_pickle=False))
