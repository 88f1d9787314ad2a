"""One product in one build of ONNX Runtime. Runs wherever numpy and onnxruntime do.

    python -m benchmarks.product PROBE.onnx X.npy Y.npy TIMES

computes it TIMES times with one thread, writes the product, and prints as JSON the private bytes that loading and
computing took, the seconds of the fastest, and where in memory the code of ONNX Runtime lies.
"""

from __future__ import annotations

import json
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from pipeline.machine import resident_memory


def main(graph: str, x: str, y: str, times: int) -> dict[str, Any]:
    """Load, compute, write."""
    before = resident_memory()[0]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # an arena keeps what it has taken
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {"x": np.load(x)}
    seconds = timeit.repeat(lambda: session.run(["y"], given), number=1, repeat=times)
    private = resident_memory()[0] - before
    np.save(y, session.run(["y"], given)[0])
    return {"private": private, "seconds": min(seconds), "code": _code()}


def _code() -> str:
    """First and last address, in hexadecimal, of ONNX Runtime's instructions."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return next(line.split()[0] for line in lines if "onnxruntime_pybind11_state" in line and " r-xp " in line)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], int(sys.argv[4]))))
