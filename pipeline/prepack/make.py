"""What a bundle carries for prepacking: the slices' graphs, and a merged graph for each kernel class.

A merged graph names packed bytes by their hash, so it is made where these bytes are: for phones on one, or in the arm64
build of ONNX Runtime under emulation. Slices are cut here and saved there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx

from pipeline import machine
from pipeline.errors import BundleError
from pipeline.files import link_or_copy, read_json, scratch_directory, sha256_of, write_bytes
from pipeline.prepack import device, emulator
from pipeline.prepack.device import PREPACK_FILE, PREPACKED, Kernels, Packed, Prepacking
from pipeline.prepack.slices import LIMIT, Merging, cut, stored_files

_GENAI_CONFIG = "genai_config.json"


def prepare(folder: Path, limit: int = LIMIT) -> Prepacking:
    """Cut the model in `folder`: write its slices' graphs and prepack.json, without any class yet, beside it.

    Raises BundleError when the folder holds no written model.
    """
    graph = graph_name(folder)
    model = onnx.load(folder / graph, load_external_data=False)
    for stale in (*folder.glob("*.slice.*.onnx"), *folder.glob("*.mapped.*.onnx")):
        stale.unlink()
    slices = cut(model, limit)
    names = [f"{Path(graph).stem}.slice.{number}.onnx" for number in range(len(slices))]
    for name, part in zip(names, slices, strict=True):
        write_bytes(folder / name, part.SerializeToString(deterministic=True))
    made = Prepacking(graph, stored_files(model), names, limit, {})
    made.write(folder)
    return made


Save = Callable[[Path, Path, int], tuple[Path, Path]]
"""As `device.save_slice`: opens a slice on some processor, which saves it."""


def add_class(folder: Path, name: str, save: Save = device.save_slice) -> Prepacking:
    """Write the merged graph of a kernel class, as `save` saves slices, and enter the class in prepack.json.

    The disk holds what one slice saves at a time.

    Raises BundleError when the runtime refuses a slice.
    """
    made = Prepacking.read(folder)
    merging = Merging(onnx.load(folder / made.graph, load_external_data=False), made.limit)
    slices = []
    with scratch_directory(folder / ".saved") as saved:
        for number, part in enumerate(made.slices):
            graph, raw = save(folder / part, saved, number)
            kept = merging.add(onnx.load(graph, load_external_data=False), f"{PREPACKED}/{number}.data")
            slices.append(_packed(graph, raw, kept))
            raw.unlink()
    kernels = Kernels(f"{Path(made.graph).stem}.mapped.{name.replace(' ', '-')}.onnx", slices)
    write_bytes(folder / kernels.graph, merging.merged().SerializeToString(deterministic=True))
    made = replace(made, classes={**made.classes, name: kernels})
    made.write(folder)
    return made


def add_classes(folder: Path, classes: Iterable[str]) -> Prepacking:
    """Add kernel classes to a prepared folder: `here` is this machine's, others are processors that QEMU emulates.

    Raises:
        ResourceError: QEMU cannot be set up here.
        EvaluationError: an emulated process fails.
        BundleError: as `add_class`.
    """
    for name in classes:
        if name == emulator.HERE:
            add_class(folder, machine.kernel_class())
        else:
            emulator.install()
            add_class(folder, f"aarch64 {name}", partial(save_emulated, emulator.Emulator(emulator.place(), name)))
    return Prepacking.read(folder)


def save_emulated(machine: emulator.Emulator, source: Path, target: Path, number: int) -> tuple[Path, Path]:
    code = Path(__file__).resolve().parents[2]
    arguments = ["-m", "pipeline.prepack.device", str(source.resolve()), str(target.resolve()), str(number)]
    machine.run(arguments, [code])
    return device.saved_files(target, number)


def _packed(graph: Path, raw: Path, kept: list[tuple[int, int, int]]) -> Packed:
    digest, size = hashlib.sha256(), 0
    for piece in device.kept_bytes(raw, kept):
        digest.update(piece)
        size += len(piece)
    return Packed(sha256_of(graph), raw.stat().st_size, kept, size, digest.hexdigest())


def prepack_files(folder: Path) -> list[Path]:
    """What a bundle must carry beside the model so that phones can prepack it: prepack.json and the graphs."""
    made = Prepacking.read(folder)
    graphs = [*made.slices, *(kernels.graph for kernels in made.classes.values())]
    return [folder / name for name in (PREPACK_FILE, *graphs)]


def link_model(source: Path, target: Path) -> None:
    """Give every file of a model folder a second name in `target`; what the machine made for itself stays behind."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not ((target / file.name).exists() and file.samefile(target / file.name)):
            link_or_copy(file, target / file.name)


def graph_name(folder: Path) -> str:
    """The model's graph by genai_config.json. Raises BundleError when there is none."""
    try:
        name = read_json(folder / _GENAI_CONFIG)["model"]["decoder"]["filename"]
        if not (folder / name).is_file():
            raise FileNotFoundError(name)
        return str(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{folder}: no written model ({error!r}). Run the quantize stage, or fetch a bundle."
        ) from None
