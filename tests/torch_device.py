"""A device of torch's in the place of a GPU: all that a GPU would compute, on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from pipeline.runtime import device
from pipeline.runtime.device import Gpu
from pipeline.runtime.session import SliceRun

GIVEN_OUT = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"


class Failing(Gpu):
    """Opens `good` slices; from then on its memory is full."""

    def __init__(self, good: int):
        super().__init__("cpu", "failing")
        self.good = good

    def open(self, model: onnx.ModelProto, folder: Path) -> SliceRun:
        self.good -= 1
        if self.good < 0:
            raise RuntimeError(GIVEN_OUT)
        return super().open(model, folder)


def choose(monkeypatch: pytest.MonkeyPatch, where: Gpu) -> None:
    """Make it the configured device."""
    monkeypatch.setattr(device, "_device", lambda wanted: where)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Chosen for what the test runs."""
    found = Gpu("cpu", "torch")
    choose(monkeypatch, found)
    return found
