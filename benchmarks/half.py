"""Whether activations and scales in float16 pay on phones: memory, error and work of one product, beside float32's.

    python -m benchmarks.half

Products run here and on an emulated Cortex-A76. An emulator says nothing about speed, so its instructions are counted:
QEMU logs every block of ONNX Runtime's code that it runs. Writes benchmarks/results/half.json, for
`python -m benchmarks.tables`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.machine import describe
from benchmarks.markdown import table
from benchmarks.probes import Probe, Product, make_probe
from benchmarks.project import RESULTS, ROOT
from pipeline.errors import EvaluationError
from pipeline.files import scratch_directory, write_json
from pipeline.prepack import emulator
from pipeline.prepack.emulator import Emulator
from pipeline.quantize.formats import TensorFormat

FORMATS = ("w4b64a", "w8b32s", "w2b64a")
WAYS = {
    "float32, int8": Product(),
    "float16, int8": Product(half=True),
    "float16, float16": Product(half=True, level=2),
}
"""Activations, and what kernels multiply: accuracy_level 4 asks for int8, 2 for float16."""
CPU = "cortex-a76"
_LARGE = {"columns": 4096, "outputs": 4096}
_DEEP = {"columns": 14336, "outputs": 64}  # the longest sum in a model of 8 billion parameters
_ROWS = 32
_TIMES = 20
_TRIES = 5

Run = Callable[[Probe, Path, int], dict[str, Any]]
"""What `benchmarks.product` says of a probe computed so many times."""


def arguments(probe: Probe, folder: Path, times: int) -> list[str]:
    """Of Python, for `benchmarks.product`; its product lies in y.npy of `folder`."""
    np.save(folder / "x.npy", probe.x)
    return ["-m", "benchmarks.product", str(probe.path), str(folder / "x.npy"), str(folder / "y.npy"), str(times)]


def here(probe: Probe, folder: Path, times: int) -> dict[str, Any]:
    """On this machine."""
    command = [sys.executable, *arguments(probe, folder, times)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def emulated(machine: Emulator, probe: Probe, folder: Path, times: int) -> dict[str, Any]:
    """In the arm64 build."""
    return dict(json.loads(machine.run(arguments(probe, folder, times), [ROOT])))


def instructions(machine: Emulator, probe: Probe, folder: Path, times: int) -> int:
    """Instructions of ONNX Runtime that an emulated process takes, loading included.

    Raises EvaluationError when it fails, or when its code lies elsewhere each time.
    """
    command = ["setarch", "-R", *machine.command(arguments(probe, folder, times), [ROOT])]  # mostly the same addresses
    code = json.loads(subprocess.check_output(command, text=True))["code"]
    for _ in range(_TRIES):
        first, last = code.split("-")
        traced = [*command[:3], "-d", "in_asm,exec,nochain", "-dfilter", f"0x{first}..0x{last}", *command[3:]]
        pipe = subprocess.PIPE
        with subprocess.Popen(traced, stdout=pipe, stderr=pipe, text=True, errors="replace") as process:
            assert process.stdout and process.stderr
            found, said = count(process.stderr), process.stdout.read()
        if process.returncode:
            raise EvaluationError(f"{probe.name}, traced: failed with status {process.returncode}.")
        if code == (code := json.loads(said)["code"]):
            return found
    raise EvaluationError(f"{probe.name}: another address in each of {_TRIES} runs; nothing could be counted.")


def count(log: Iterable[str]) -> int:
    """Instructions run by QEMU's log, which lists those of a block when it translates it, and names a block whenever it
    runs."""
    lengths: dict[int, int] = {}
    total, block = 0, 0
    for line in log:
        if line.startswith("Trace"):
            total += lengths[int(line.split("/")[1], 16)]
        elif line.startswith("IN:"):
            block = 0
        elif line.startswith("0x"):
            if not block:
                block = int(line.split(":")[0], 16)
                lengths[block] = 0  # it may be translated again
            lengths[block] += 1
    return total


def measure(fmt: TensorFormat, way: Product, run: Run, folder: Path) -> dict[str, Any]:
    """Private bits of a weight, and errors of a short and of a long sum."""
    probes = [external(make_probe(fmt, 1, folder, replace(way, **shape))) for shape in ({}, _DEEP, _LARGE)]
    found, errors = [], []
    for probe in probes:
        found.append(run(probe, folder, 1))
        errors.append(float(np.linalg.norm(np.load(folder / "y.npy")[0] - probe.exact) / np.linalg.norm(probe.exact)))
    weights = probes[2].x.size * probes[2].exact.size - probes[0].x.size * probes[0].exact.size
    return {"private_bits": 8 * (found[2]["private"] - found[0]["private"]) / weights, "errors": errors[:2]}


def seconds(fmt: TensorFormat, way: Product, folder: Path) -> list[float]:
    """Of the large product here, with one row and with many."""
    probes = [external(make_probe(fmt, rows, folder, replace(way, **_LARGE))) for rows in (1, _ROWS)]
    return [here(probe, folder, _TIMES)["seconds"] for probe in probes]


def work(fmt: TensorFormat, way: Product, machine: Emulator, folder: Path) -> list[float]:
    """Instructions of a weight, and of a weight and row where there are many rows."""
    found = []
    for rows, times in ((1, 4), (_ROWS, 1)):
        probe = make_probe(fmt, rows, folder, way)
        once, more = (instructions(machine, probe, folder, count) for count in (1, 1 + times))
        found.append((more - once) / times / rows / (way.columns * way.outputs))
    return found


def external(probe: Probe) -> Probe:
    """The same with its weights in a file beside it, which ONNX Runtime maps."""
    model, data = onnx.load(probe.path), f"{probe.path.name}.data"
    probe.path.with_name(data).unlink(missing_ok=True)
    onnx.save(model, probe.path, save_as_external_data=True, location=data, size_threshold=0)
    return probe


def rows(found: dict[str, Any]) -> str:
    """The table: a row for each format and way."""
    head = (
        "weights", "activations, kernels", "private bits per weight: x86-64", "arm64",
        "error of 1,024 channels: x86-64", "arm64", "of 14,336: x86-64", "arm64", "ms on x86-64: 1 row", "32 rows",
        "arm64 instructions per weight: 1 row", "per weight and row: 32 rows",
    )  # fmt: skip
    return table(head, [_row(record) for record in found["records"]])


def _row(record: dict[str, Any]) -> list[str]:
    both = record["x86-64"], record["arm64"]
    return [
        record["format"],
        record["way"],
        *(f"{one['private_bits']:.2f}" for one in both),
        *(f"{one['errors'][length]:.1e}" for length in (0, 1) for one in both),
        *(f"{1000 * value:.2f}" for value in record["seconds"]),
        *([f"{value:.2f}" for value in record["instructions"]] or ["", ""]),
    ]


def main() -> None:
    """Measure every format in every way."""
    emulator.install()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back
    phone = Emulator(emulator.place(), CPU)
    records = []
    for name in FORMATS:
        for way, product in WAYS.items():
            with scratch_directory(Path(".bench/half")) as scratch:
                fmt, folder = TensorFormat.parse(name), scratch.resolve()
                record: dict[str, Any] = {"format": name, "way": way}
                for processor, run in (("x86-64", here), ("arm64", partial(emulated, phone))):
                    record[processor] = measure(fmt, product, run, folder)
                record["seconds"] = seconds(fmt, product, folder)
                record["instructions"] = work(fmt, product, phone, folder) if name == FORMATS[0] else []  # minutes
            records.append(record)
            print(*_row(record), flush=True)
    found = {"onnxruntime": version("onnxruntime"), "cpu": CPU, "machine": describe(), "records": records}
    write_json(RESULTS / "half.json", found)


if __name__ == "__main__":
    main()
