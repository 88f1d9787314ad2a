"""The models whose files are compared, and the pipeline's stages before quantize, run for each.

The small model's weights lie on Q4_1's grid, which favours a quantizer that finds the same grid again. So the second
subject is the same model with seeded Gaussian noise of 0.4 grid steps on every weight, compared with itself alone: at
this size the density of the weights within a step varies by 8 % (2·exp(−2π²·0.4²)), and round-to-nearest leaves the
same relative error as on Gaussian weights to 3 %. It is a worse model (its perplexity is reported), not a wrong one.

The third is cut from it to widths that are multiples of 256 (`native`), its own reference too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.project import SMALL, Project
from pipeline import keys
from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import SINGLE, read_header
from pipeline.files import atomic_directory, read_json, sha256_of, write_json

NOISY, NATIVE = f"{SMALL}-noise", "smollm2-512"
GRID_BLOCK = 32
NOISE_STEPS = 0.4  # standard deviation, in steps of a block's grid
_SEED = 20_240_801


@dataclass(frozen=True)
class Subject:
    """A model that is compared. `model` names its entry in the project's configs/models."""

    model: str
    title: str
    note: str


SUBJECTS = (
    Subject(
        SMALL,
        "SmolLM2-135M",
        "Its weights lie on a 4-bit grid (Q4_1, block 32; the embedding on Q8_0's): compare blocks of 64 and symmetric "
        "formats.",
    ),
    Subject(
        NOISY,
        "SmolLM2-135M with seeded noise",
        f"The same weights with Gaussian noise of {NOISE_STEPS} grid steps, which dissolves the grid; it is its own "
        "reference.",
    ),
    Subject(
        NATIVE,
        "SmolLM2 cut to 512 channels",
        "512 of 576 channels and 8 of 9 heads, keys and values for each, repaired by a short distillation: every "
        "matrix is a multiple of 256 wide, and no weight lies on a grid. It is its own reference.",
    ),
)


@dataclass(frozen=True)
class Prepared:
    """A subject whose reference and calibration are there."""

    subject: Subject
    project: Project
    architecture: Architecture

    @property
    def root(self) -> Path:
        """The model's folder of artifacts."""
        return self.project.folder / "artifacts" / self.subject.model

    @property
    def reference(self) -> Path:
        """The full-precision model: graph, weights, tokenizer."""
        return self.project.weights(self.subject.model)

    @property
    def export(self) -> Path:
        """Graph and tokenizer, without weights."""
        return self.root / "export"

    @property
    def moments(self) -> Path:
        """Second moments of every product's input over the calibration text."""
        return self.root / "calibration" / "moments.safetensors"

    @property
    def identity(self) -> dict[str, str]:
        """What the reference is made of: SHA-256 of weights and graph."""
        files = {file["name"]: file["sha256"] for file in read_json(self.root / "source.json")["files"]}
        return {"weights": files[SINGLE], "graph": sha256_of(self.export / "model.onnx")}


def prepare(project: Project, subject: Subject) -> Prepared:
    """Run download, export, calibrate and sensitivity, each only if what it reads has changed."""
    model = subject.model
    if model == NOISY:
        _add_noisy(project)
    elif model == NATIVE:
        _add_native(project)
    project.run("download", model)
    project.run("export", model)
    prepared = Prepared(subject, project, read_architecture(project.weights(model) / "config.json"))
    stamp = prepared.root / "calibration" / "made_from.json"
    inputs = {**prepared.identity, **_calibration_inputs(project)}
    if not stamp.exists() or read_json(stamp) != inputs:
        project.run("calibrate", model)
        write_json(stamp, inputs)
    project.run("sensitivity", model)  # keeps by itself what the same inputs gave before
    return prepared


def _calibration_inputs(project: Project) -> dict[str, str]:
    return {
        "calibration": json.dumps(project.read("calibration.yaml"), sort_keys=True),
        "code": keys.code("pipeline.stages.calibrate"),
    }


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files in this order."""
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


# --- the subject with noise -------------------------------------------------------------------------------------------


def _add_noisy(project: Project) -> None:
    """An entry for the noisy model, and its checkpoint made of the small model's."""
    folder, source = project.work / "sources" / NOISY, project.weights(SMALL)
    wanted = {"weights": _weights_digest(project), "steps": str(NOISE_STEPS), "seed": str(_SEED)}
    if not folder.is_dir() or read_json(folder / "made_from.json") != wanted:
        with atomic_directory(folder) as made:
            for file in source.iterdir():
                if file.suffix in {".json", ".safetensors"} and file.name != "genai_config.json":
                    shutil.copyfile(file, made / file.name)
            blur(made / SINGLE)
            write_json(made / "made_from.json", wanted)
    _add(project, NOISY, folder)


def _add(project: Project, model: str, folder: Path) -> None:
    """The small model's entry with another title and note, whose checkpoint lies in `folder`."""
    subject = next(subject for subject in SUBJECTS if subject.model == model)
    entry = project.read(f"models/{SMALL}.yaml") | {"title": subject.title, "note": subject.note}
    project.write(f"models/{model}.yaml", entry)
    project.use_source(model, folder)


def _weights_digest(project: Project) -> str:
    files = read_json(project.folder / "artifacts" / SMALL / "source.json")["files"]
    return next(file["sha256"] for file in files if file["name"] == SINGLE)


def blur(path: Path) -> None:
    """Add the noise to every matrix of a float32 safetensors file, in place. The same file gives the same bytes."""
    for number, ref in enumerate(read_header(path).values()):
        if len(ref.shape) == 2:
            values = np.memmap(path, np.float32, "r+", ref.offset, ref.shape)
            generator = np.random.default_rng([_SEED, number])
            noise = generator.standard_normal(values.shape, np.float32)
            values += np.float32(NOISE_STEPS) * grid_steps(values, symmetric="embed" in ref.name) * noise
            values.flush()


def grid_steps(weights: np.ndarray, symmetric: bool) -> np.ndarray:
    """The step of each weight's grid, float32 [rows, columns]: of Q4_1 (a block's range in 15), or, `symmetric`, of
    Q8_0 (its largest size in 127), blocks of 32. https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c"""
    blocks = weights.reshape(len(weights), -1, GRID_BLOCK)
    size = np.abs(blocks).max(-1) / 127 if symmetric else (blocks.max(-1) - blocks.min(-1)) / 15
    return np.repeat(size.astype(np.float32), GRID_BLOCK, axis=1)


# --- the subject of native widths -------------------------------------------------------------------------------------


def _add_native(project: Project) -> None:
    """An entry for the model that is cut from the small one, and its checkpoint."""
    from benchmarks.quality import native  # torch, for this subject alone

    folder = project.work / "sources" / NATIVE
    native.make(project.weights(SMALL), folder, Store(project.store), lambda line: click.echo(f"  {line}", err=True))
    _add(project, NATIVE, folder)
