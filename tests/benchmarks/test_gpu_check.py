"""The check of a GPU, with a device of torch's in its place: it runs every pass, and sees what is not the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu_check import LIMITS, Passes, compared, main
from pipeline.runtime import device
from pipeline.runtime.device import Gpu
from tests.artifact.exported import export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe
from tests.torch_device import choose


def test_all_passes_agree_and_what_does_not_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = export(make_checkpoint(tmp_path / "mimo", CASES["mimo"], dtype="BF16"))
    one.write(load_recipe("q4"), tmp_path / "artifact")
    found = []
    for kind in ("cpu", "gpu"):
        if kind == "gpu":
            choose(monkeypatch, gpu := Gpu("cpu", "torch"))
        (scratch := tmp_path / kind).mkdir()
        found.append(Passes(one.folder, scratch, 3, 48, tmp_path / "artifact").run())
    rows = compared("tiny", *found)
    assert not gpu.fallen
    assert [row["pass"] for row in rows] == list(LIMITS)
    assert all(row["agrees"] for row in rows), rows
    other = {name: values * 1.1 if values.dtype.kind == "f" else values + 1 for name, values in found[1].items()}
    assert not any(row["agrees"] for row in compared("tiny", found[0], other))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")  # and as it was, after the test
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cache in (device._configured, device._device):
        cache.cache_clear()
    done = CliRunner().invoke(main)
    device._configured.cache_clear()
    assert done.exit_code == 1
    assert done.output.startswith("Error: device: cuda: torch ")
