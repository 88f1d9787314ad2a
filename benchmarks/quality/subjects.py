"""The models whose files are compared, and the pipeline's stages before quantize, run for each.

The small model's weights lie on Q4_1's grid, which favours a quantizer that finds the same grid again, and its width is
no multiple of 256, so most of llama.cpp's mixtures fall back to other types there. The second is cut from it to widths
where they are themselves (`native`), and is its own reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.project import SMALL, Project
from pipeline import keys
from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import SINGLE
from pipeline.files import read_json, sha256_of, write_json

NATIVE = "smollm2-512"
LARGER_BLOCKS = ("w4b256a8", "w6b128a8")
"""Formats that keep less beside their codes in memory; budgets by memory choose among these too."""


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
        "formats. It is 576 channels wide, so llama.cpp's K- and IQ-quants fall back to Q4_0, Q5_0 and others there.",
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
    if model == NATIVE:
        _add_native(project)
    project.run("download", model)
    project.run("export", model)
    prepared = Prepared(subject, project, read_architecture(project.weights(model) / "config.json"))
    stamp = prepared.root / "calibration" / "made_from.json"
    inputs = {**prepared.identity, **_calibration_inputs(project)}
    if not stamp.exists() or read_json(stamp) != inputs:
        project.run("calibrate", model)
        write_json(stamp, inputs)
    measured = project.read("sensitivity.yaml")
    formats = dict.fromkeys([*measured["formats"], *LARGER_BLOCKS])
    project.write("sensitivity.yaml", measured | {"formats": list(formats)})
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


# --- the subject of native widths -------------------------------------------------------------------------------------


def _add_native(project: Project) -> None:
    """An entry for the model that is cut from the small one, and its checkpoint."""
    from benchmarks.quality import native  # torch, for this subject alone

    folder = project.work / "sources" / NATIVE
    native.make(project.weights(SMALL), folder, Store(project.store), lambda line: click.echo(f"  {line}", err=True))
    _add(project, NATIVE, folder)


def _add(project: Project, model: str, folder: Path) -> None:
    """The small model's entry with another title and note, whose checkpoint lies in `folder`."""
    subject = next(subject for subject in SUBJECTS if subject.model == model)
    entry = project.read(f"models/{SMALL}.yaml") | {"title": subject.title, "note": subject.note}
    project.write(f"models/{model}.yaml", entry)
    project.use_source(model, folder)
