"""Where the emulated machine is unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.prepack import emulator


def test_it_is_unpacked_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path))
    assert emulator.place() == tmp_path / "arm64"
    monkeypatch.delenv("PIPELINE_STORE")
    assert emulator.place() == Path("store/arm64")
