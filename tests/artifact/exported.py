"""Checkpoints with their exports, from a few thousand weights to tens of millions, and writing artifacts of them.

A module of its own because child processes import it: they write artifacts and are killed while they do.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pipeline.artifact import work, write
from pipeline.artifact.quantizers import Ranges, Search
from pipeline.artifact.rotated import Rotated
from pipeline.artifact.write import Draft, draft, write_artifact
from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import RecipeConfig
from pipeline.engine import Engine, Threads
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.partial import open_partial
from pipeline.planning.recipes import make_plan
from tests.conftest import ROOT
from tests.recipes import load_recipe

PART_BYTES = 100_000  # several parts even for the tiny models


def changed(variant: str, **changes: object) -> RecipeConfig:
    """A recipe of configs/ with other values."""
    return RecipeConfig.model_validate(load_recipe(variant).model_dump() | changes)


@dataclass
class Exported:
    """A checkpoint and its full-precision export, in one folder, with random calibration moments."""

    folder: Path
    architecture: Architecture
    checkpoint: Checkpoint
    model: onnx.ModelProto
    moments: dict[str, np.ndarray] = field(default_factory=dict)

    def rotated(self, recipe: RecipeConfig) -> Exported:
        """The same read in the coordinates of a recipe's rotation."""
        return replace(self, checkpoint=Rotated(self.folder, self.architecture, recipe.rotation))

    def draft(self, recipe: RecipeConfig, part_bytes: int = PART_BYTES) -> Draft:
        """The artifact of `recipe` before its weights."""
        return draft(self.model, make_plan(self.architecture, recipe), "tiny", part_bytes)

    def write(
        self, recipe: RecipeConfig, folder: Path, threads: int | None = None, part_bytes: int = PART_BYTES,
        ranges: Ranges | None = None, engine: Engine | None = None,
    ) -> Draft:  # fmt: skip
        """The artifact in `folder`, grown in `folder`.parent/partial."""
        drafted = self.draft(recipe, part_bytes)
        search = Search(self.moments if recipe.search == "weighted" else None)
        with open_partial(folder.parent / "partial" / folder.name, repr(recipe)) as growing:
            engine = engine or Threads(threads)
            write_artifact(growing, drafted, self.checkpoint, self.folder, search, engine, ranges)
            growing.finish(folder)
        return drafted


def export(folder: Path, context: int = 96) -> Exported:
    """Export the checkpoint in `folder` beside it."""
    architecture, checkpoint = read_architecture(folder / "config.json"), Checkpoint(folder)
    model, rope = build_decoder(architecture, checkpoint, context)
    save_decoder(folder, model, rope, "model.onnx")
    rng = np.random.default_rng(7)
    columns = {matrix.input: matrix.columns for matrix in architecture.matrices}
    moments = {name: np.exp(rng.standard_normal(count)).astype(np.float32) for name, count in columns.items()}
    return Exported(folder, architecture, checkpoint, model, moments)


def make_bfloat16(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint as models are released, in bfloat16: heavy-tailed weights (the same million again and again)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = read_architecture(folder / "config.json").expected_tensors()
    values = np.random.default_rng(0).standard_t(5, 1_000_003).astype(np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    ends = np.cumsum([2 * prod(shape) for shape in shapes.values()]).tolist()
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [end - 2 * prod(shape), end]}
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(ends[-1] // len(pool)):
            file.write(pool)
        file.write(pool[: ends[-1] % len(pool)])
    return folder


PATIENCE = 600.0  # seconds until a test gives up on a child process, which may wait for a busy machine


def child(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """`function` started in a process of its own, forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.artifact.warm"])
    process = context.Process(target=function, args=arguments, daemon=True)
    with chdir(ROOT):  # where the server, started by the first child, finds these modules
        process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    """Its exit status, negative for a signal's number."""
    process.join(PATIENCE)
    return process.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lines(path: Path) -> list[str]:
    """The complete lines of a file; none if there is no file."""
    return path.read_bytes().decode().split("\n")[:-1] if path.exists() else []


def finished_units(journal: Path) -> set[str]:
    """The units that a journal of unfinished work says are finished."""
    return {json.loads(line)[0] for line in lines(journal)} - {""}


def grow(folder: Path, recipe: str, target: Path, log: Path, unit_bytes: int, threads: int | None = None) -> None:
    """Write an artifact of `folder` in units of `unit_bytes`, and append what is computed, line by line, to `log`.

    What a child process runs that is killed at some point.
    """
    spy(log)
    write.units = partial(work.units, unit_bytes=unit_bytes)
    export(folder).write(load_recipe(recipe), target, threads, part_bytes=1 << 23)


def spy(log: Path) -> None:
    """From now on, append the name of each unit that is computed to `log`, and `channels` for each channel order."""
    computing = open(log, "ab", buffering=0)  # noqa: SIM115 (open until the process ends)

    def spied(unit: work.Unit, *rest: Any) -> Any:
        computing.write(f"{unit.name}\n".encode())
        return work.quantize_unit(unit, *rest)

    split_channels = write.split_channels

    def spied_split(*arguments: Any) -> Any:
        computing.write(b"channels\n")
        return split_channels(*arguments)

    write.quantize_unit, write.split_channels = spied, spied_split
