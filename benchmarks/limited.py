"""A generation as a phone does it, in a process that may be killed at any moment: load, read a prompt, decode.

    python -m benchmarks.limited '{"folder": "…", "overlay": {}, "reserve": 430000000, "prompt_tokens": 512,
                                   "new_tokens": 64, "seconds": 1200}'

prints a JSON object (`Step`) at the end of every step, so that a killed process has said how far it came. Only
onnxruntime-genai and numpy are loaded. `benchmarks.phone` runs it.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines import GenaiEngine, settings
from pipeline.machine import resident_memory

STEPS = ("import", "reserve", "load", "prefill", "decode")


@dataclass(frozen=True)
class Request:
    """What the process does.

    Attributes:
        overlay: laid over the folder's genai_config.json, as an app does for a way.
        reserve: bytes of private memory that the app takes beside the model. Python's own count as a part of them; the
            process allocates the rest and keeps it.
        seconds: after so many the process ends itself by SIGALRM.
    """

    folder: str
    overlay: dict[str, Any]
    reserve: int
    prompt_tokens: int
    new_tokens: int
    seconds: int


@dataclass(frozen=True)
class Step:
    """What a step took, and what the process holds after it.

    Attributes:
        private: bytes that no file backs.
        mapped: bytes of files in memory, the libraries' included.
        model_mapped: of them, the model folder's.
        model_addresses: bytes of the model folder's files that have addresses, in memory or not.
        read: bytes that the step read from storage.
        faults: times that the step waited for a page from storage.
    """

    name: str
    seconds: float
    private: int
    mapped: int
    model_mapped: int
    model_addresses: int
    read: int
    faults: int


def _read_bytes() -> int:
    """Bytes that this process has read from storage, its page faults included."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def mappings(folder: Path) -> tuple[int, int]:
    """(bytes in memory, bytes of addresses) of this process's mappings of files below `folder`."""
    text = Path("/proc/self/smaps").read_text(errors="replace")
    pattern = rf"^[0-9a-f]+-[0-9a-f]+ .* {re.escape(str(folder))}/.*\nSize: +(\d+) kB(?:\n.*)*?\nRss: +(\d+) kB$"
    found = [(int(rss) * 1024, int(size) * 1024) for size, rss in re.findall(pattern, text, re.MULTILINE)]
    return sum(rss for rss, _ in found), sum(size for _, size in found)


@contextmanager
def step(name: str, folder: Path) -> Iterator[None]:
    """Print what the body took."""
    read, faults, start = _read_bytes(), _faults(), time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    grown = _read_bytes() - read, _faults() - faults
    print(json.dumps(asdict(Step(name, seconds, *resident_memory(), *mappings(folder), *grown))), flush=True)


def run(request: Request) -> None:
    """All steps in turn. The prompt is random but seeded."""
    signal.alarm(request.seconds)
    folder = Path(request.folder)
    with step("import", folder):
        import numpy as np
        import onnxruntime_genai  # noqa: F401  (its memory is the app's)
    with step("reserve", folder):
        app = b"\x01" * max(0, request.reserve - resident_memory()[0])
    with step("load", folder):
        engine = GenaiEngine(folder, None, request.overlay)
    ids = np.random.default_rng(0).integers(0, settings(folder)["vocab_size"], request.prompt_tokens).tolist()
    with step("prefill", folder):
        engine.start(ids, len(ids) + 1 + request.new_tokens)
    with step("decode", folder):
        for _ in range(request.new_tokens):
            engine.step()
    del app


if __name__ == "__main__":
    run(Request(**json.loads(sys.argv[1])))
