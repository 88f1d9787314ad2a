"""Fixtures shared by all tests. Everything comes from this machine: loopback servers, pinned wheels, seeded weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The same examples every time, so that no suite fails by chance; HYPOTHESIS_PROFILE=explore looks for new ones. No test
# asserts on a time, and the first call compiles.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
# A shell lets its background jobs ignore Control-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]


SLOW = (
    "artifact/test_cache", "artifact/test_memory", "artifact/test_resume", "artifact/test_write", "benchmarks/",
    "bundle/test_signing", "bundle/test_trust", "calibrate/", "checkpoint/test_hostile", "confine/", "door/",
    "graph/test_genai", "graph/test_optimum", "graph/test_parity", "learn/", "parity/", "planning/test_shipped",
    "preflight/", "publish/", "quantize/test_descent", "quantize/test_gptq", "runtime/", "serve/", "stages/",
    "tasks/test_humaneval_judging",
    "test_cli", "test_dvc", "test_keys", "test_smollm2", "phone/",
)  # fmt: skip
"""What `make check` leaves to `make test`: whole models, DVC, sandboxes, other languages, loops to be compiled."""


FIRST = ("test_dvc", "stages/test_quantize", "stages/", "test_keys", "test_cli", "benchmarks/", "serve/", "door/")
"""Files that take longest, in the order in which workers begin them: none is left with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and put FIRST first."""

    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT / "tests").as_posix()
        if name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        return next((place for place, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def _project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run from the project's root, as the pipeline does, whatever directory pytest was started in."""
    monkeypatch.chdir(ROOT)


def dataset(name: str) -> Path:
    """A pinned dataset file, fetched into the store on first use."""
    from pipeline.checkpoint.blobs import Store
    from pipeline.checkpoint.sources import fetch_dataset
    from pipeline.config.sources import load_datasets

    return fetch_dataset(load_datasets().datasets[name], Store())


@pytest.fixture(scope="session")
def humaneval_path() -> Path:
    """The original HumanEval.jsonl.gz."""
    return dataset("humaneval")


@pytest.fixture(scope="session")
def mmlu_path() -> Path:
    """MMLU's official test split as JSON lines."""
    return dataset("mmlu")
