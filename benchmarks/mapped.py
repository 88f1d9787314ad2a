"""Mapped weights in the arm64 build of ONNX Runtime, under emulation: prepacking as on a phone, memory of both ways.

    python -m benchmarks.mapped artifacts/smollm2-135m/variants/q4 --to .bench/mapped --out mapped.json

For each emulated processor the slices are saved there once, to make the merged graph of its kernel class; then the
folder is prepacked as a phone prepacks it, and loaded both ways. Bytes are those of the emulator's process less what it
takes with ONNX Runtime imported and nothing loaded (`idle`). An emulator says nothing about speed.

    python -m benchmarks.mapped GRAPH.onnx

is the emulated process that loads a graph and continues a few token ids; `-` loads none.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.machine import resident_memory
from pipeline.runtime.session import OnnxDecoder

ROOT = Path(__file__).resolve().parents[1]
_IDS, _NEW = range(1000, 1032), 8


def load(graph: str) -> dict[str, Any]:
    """Memory, (private, mapped) bytes, after loading and after use; greedy tokens; SHA-256 of all logits."""
    idle = resident_memory()
    if graph == "-":
        return {"idle": idle}
    decoder = OnnxDecoder(Path(graph))
    loaded, digest, tokens = resident_memory(), hashlib.sha256(), list[int]()
    rows, state = decoder.run(_IDS)
    for _ in range(_NEW):
        digest.update(rows.tobytes())
        tokens.append(int(rows[-1].argmax()))
        rows, state = decoder.run(tokens[-1:], state)
    return {"idle": idle, "loaded": loaded, "used": resident_memory(), "tokens": tokens, "logits": digest.hexdigest()}


def measure(folder: Path, cpu: str) -> dict[str, Any]:
    """Add the kernel class of an emulated processor to a prepared folder, prepack there, load both ways.

    Raises EvaluationError when a process fails, the class does not fit itself, or logits differ.
    """
    from pipeline.errors import EvaluationError
    from pipeline.prepack import make
    from pipeline.prepack.device import PREPACKED
    from pipeline.prepack.emulator import Emulator, place
    from pipeline.runtime.speed import watch

    machine, here = Emulator(place(), cpu), str(folder.resolve())

    def run(*arguments: str) -> tuple[dict[str, Any], int]:
        said, looks = watch(machine.command(arguments, [ROOT]), f"emulated {cpu}")
        return json.loads(said), max(look.private for look in looks)

    idle, base = run("-m", "benchmarks.mapped", "-")
    work = make.add_classes(folder, [cpu])
    outcome, peak = run("-m", "pipeline.prepack.device", here)
    if outcome["kernels"] is None:
        raise EvaluationError(f"emulated {cpu}: {outcome['why']}. Saved slices are not the same twice: do not ship it.")
    found: dict[str, Any] = {"cpu": cpu, "class": outcome["kernels"], "prepack_peak_private_bytes": peak - base}
    found["prepacked_bytes"] = sum(file.stat().st_size for file in (folder / PREPACKED).iterdir())
    for name, graph in (("private", work.graph), ("mapped", outcome["graph"])):
        seen, peak = run("-m", "benchmarks.mapped", f"{here}/{graph}")
        own = {key: [of - less for of, less in zip(seen[key], idle["idle"], strict=True)] for key in ("loaded", "used")}
        found[name] = own | {"peak_private_bytes": peak - base, "logits": seen["logits"], "tokens": seen["tokens"]}
    if found["private"]["logits"] != found["mapped"]["logits"]:
        raise EvaluationError(f"emulated {cpu}: mapped weights give other logits than private ones. Do not ship it.")
    return found


def main(arguments: list[str]) -> None:
    """Measure artifacts, or load a graph."""
    import argparse

    from pipeline.files import write_json
    from pipeline.prepack import emulator, make
    from pipeline.prepack.slices import LIMIT

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--slice-bytes", type=int, default=LIMIT)
    parser.add_argument("--cpu", action="append")
    asked = parser.parse_args(arguments)
    emulator.install()
    asked.to.mkdir(parents=True, exist_ok=True)
    make.link_model(asked.folder, asked.to)
    work = make.prepare(asked.to, asked.slice_bytes)
    records = [measure(asked.to, cpu) for cpu in asked.cpu or emulator.CPUS]
    report = {"model": work.graph, "slices": len(work.slices), "emulator": emulator.release(), "records": records}
    print(json.dumps(report, indent=2))
    if asked.out:
        write_json(asked.out, report)


if __name__ == "__main__":
    if len(sys.argv) == 2 and (sys.argv[1] == "-" or sys.argv[1].endswith(".onnx")):
        print(json.dumps(load(sys.argv[1])))
    else:
        main(sys.argv[1:])
