"""What one build of ONNX Runtime computes, for comparison with another's. Runs wherever numpy and onnxruntime do.

    python -m benchmarks.foreign REQUEST.json

writes an array file of logits and products, and prints the processor's features as JSON.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pipeline.runtime.session import OnnxDecoder, open_session

_AT_HWCAP, _AT_HWCAP2 = 16, 26
# Bits of the kernel's feature words on arm64 (Linux, arch/arm64/include/uapi/asm/hwcap.h).
_FEATURES = {
    _AT_HWCAP: {"asimdhp": 10, "asimddp": 20, "sve": 22},
    _AT_HWCAP2: {"sve2": 1, "i8mm": 13, "bf16": 14, "sme": 23},
}


@dataclass(frozen=True)
class Request:
    """What to compute. A decoder reads the first `prompt` ids at once and the rest one at a time; a probe is a graph
    from x [1, rows, K] to y [1, rows, N], given `probe_inputs` by its name."""

    target: str
    decoder: str | None = None
    ids: tuple[int, ...] = ()
    prompt: int = 0
    probes: tuple[str, ...] = ()
    probe_inputs: str | None = None


def compute(request: Request) -> dict[str, np.ndarray]:
    """`logits`, float32 [len(ids), vocab], and each probe's product under its path, float32 [rows, N]."""
    found = {}
    if request.probe_inputs:
        with np.load(request.probe_inputs, allow_pickle=False) as inputs:
            for path in request.probes:
                found[path] = open_session(Path(path)).run(["y"], {"x": inputs[path]})[0]
    if request.decoder:
        decoder = OnnxDecoder(open_session(Path(request.decoder)))  # no onnx, which a path would need
        rows, state = decoder.run(request.ids[: request.prompt])
        logits = [rows]
        for token in request.ids[request.prompt :]:
            rows, state = decoder.run([token], state)
            logits.append(rows)
        found["logits"] = np.concatenate(logits)
    return found


def features() -> list[str]:
    """What this processor, real or emulated, says it has; [] on other architectures."""
    if platform.machine() != "aarch64":
        return []
    libc = ctypes.CDLL(None)
    libc.getauxval.restype, libc.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    words = {kind: libc.getauxval(kind) for kind in _FEATURES}
    return [name for kind, bits in _FEATURES.items() for name, bit in bits.items() if words[kind] >> bit & 1]


def main(request: Request) -> dict[str, Any]:
    """Compute, write, and say where it ran."""
    start = time.monotonic()
    np.savez(request.target, **compute(request))
    return {
        "architecture": platform.machine(),
        "features": features(),
        "onnxruntime": onnxruntime.__version__,
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    print(json.dumps(main(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
