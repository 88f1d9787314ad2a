"""Bits that kernels keep of each block of a weight beside its codes, by processor: what packed memory is counted with.

    python -m benchmarks.kernels

One product of each format is packed and saved as a phone prepacks it, here and on emulated arm64 processors. Writes
benchmarks/results/kernels.json; `python -m benchmarks.tables` makes the table of benchmarks/README.md.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from benchmarks import probes
from benchmarks.markdown import table
from benchmarks.project import RESULTS
from pipeline.files import scratch_directory, write_json
from pipeline.prepack import device, emulator, make
from pipeline.prepack.slices import packed_entries
from pipeline.quantize.formats import FORMATS, TensorFormat

BITS = (2, 4, 8)  # those of kernels; 6 bits are two of them
WEIGHTS = probes.COLUMNS * probes.OUTPUTS


def kept_bits(save: make.Save, fmt: TensorFormat, folder: Path) -> float:
    """Bits for each block beside its codes, as the processor behind `save` packs a product."""
    (probe, _) = probes.make_probes([fmt], folder)
    model, data = onnx.load(probe.path), f"{probe.path.name}.data"
    onnx.save(model, probe.path, save_as_external_data=True, location=data, size_threshold=0)
    graph, _ = save(probe.path, folder, 0)
    saved = onnx.load(graph, load_external_data=False).graph.initializer
    size = sum(length for tensor in saved for _, pieces in packed_entries(tensor) for _, length in pieces)
    return (8 * size / WEIGHTS - fmt.bits) * fmt.block


def rows(found: dict[str, Any]) -> str:
    """The table: a row for each format."""
    processors = found["processors"]
    lines = [[name, *(f"{bits:.1f}" for bits in own)] for name, own in found["kept"].items()]
    return table(["bits kept of a block", *processors], lines)


def main() -> None:
    """Measure all formats on all processors."""
    emulator.install()
    saves = {"x86-64": device.save_slice}
    for cpu in emulator.CPUS:
        saves[f"arm64, {cpu}"] = partial(make.save_emulated, emulator.Emulator(emulator.place(), cpu))
    kept = {}
    for fmt in [
        FORMATS[bits](block, symmetric)
        for bits in BITS
        for block in FORMATS[bits].blocks
        for symmetric in (False, True)
    ]:
        with scratch_directory(Path(".bench/kernels")) as folder:
            kept[str(fmt)] = [kept_bits(save, fmt, folder) for save in saves.values()]
        print(fmt, *(f"{bits:.1f}" for bits in kept[str(fmt)]), flush=True)
    record = {"onnxruntime": version("onnxruntime"), "processors": list(saves), "kept": kept}
    write_json(RESULTS / "kernels.json", record)


if __name__ == "__main__":
    main()
