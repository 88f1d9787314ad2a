"""The project around which this room's tests ask what may run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model's configuration and checkpoint, with a store; the current directory. Nothing has run."""
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    return tmp_path
