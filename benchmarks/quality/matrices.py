"""Held-out output error of single matrices in our formats and in llama.cpp's, where llama.cpp's run as themselves.

    python -m benchmarks.quality.matrices [--model smollm2-512] [--layers 6]

Minutes in place of an hour, and nothing but the quantizer is judged: MLP matrices whose width is a multiple of 256
(others fall back in llama.cpp), 512 rows of each, are quantized under the statistics that the calibrate stage left,
and judged by

    ‖(W − Ŵ)X‖ / ‖WX‖ on the inputs X that it has over held-out text: the root mean square over some layers.

llama.cpp gets the same second moments as an importance matrix and quantizes each matrix to one type. "Hadamard": the
input is rotated in blocks of 128 first; a split matrix orders its channels by importance before. Packed bits are what
a weight takes in memory: in ONNX Runtime its kernels' own copy, in llama.cpp the mapped file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import onnx
from rich.console import Console
from rich.table import Table
from scipy.linalg import hadamard

from benchmarks import machine
from benchmarks.markdown import table
from benchmarks.project import RESULTS, ROOT, SMALL, Project
from benchmarks.quality import measure
from benchmarks.quality.subjects import NATIVE, SUBJECTS, Prepared, prepare
from benchmarks.searches import Importance, alone, set_imatrix
from pipeline.calibrate.results import read_moments, read_products
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.calibration import load_calibration
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.graph.slices import DecoderSlices
from pipeline.planning.recipes import Piece
from pipeline.quantize.descent import descended
from pipeline.quantize.factor import factor
from pipeline.quantize.formats import Quantized, TensorFormat
from pipeline.quantize.gptq import bounds, compensated
from pipeline.quantize.search import nearest, weighted
from pipeline.quantize.split import channel_importance, squared_norms
from pipeline.runtime.stream import LayerStream
from pipeline.tasks.held_out import scored_ids
from pipeline.workspace import MODEL_FILE, Workspace

ROLES = {"gate_proj": "ffn_gate", "down_proj": "ffn_down"}  # what is measured, and llama.cpp's names
WIDTH = 256  # what K- and IQ-quants need a multiple of
ROWS = 512  # of each matrix, evenly spaced: rows are quantized one by one, here and there
ROTATED = 128
# In an ascending order of bits. A split's first format holds the share of the most important channels.
OURS: tuple[tuple[tuple[str, float], ...], ...] = (
    (("w2b64a", 1),), (("w2b64a8", 1),), (("w4b128a", 0.5), ("w2b128a", 0.5)), (("w4b64a8", 0.5), ("w2b64a8", 0.5)),
    (("w4b64a", 0.625), ("w2b64a", 0.375)), (("w4b64a8", 0.7), ("w2b64a8", 0.3)), (("w4b128a", 1),),
    (("w4b64a8", 1),), (("w4b64a", 1),), (("w4b32s8", 1),), (("w4b32a8", 1),), (("w4b32a", 1),), (("w6b64a", 1),),
)  # fmt: skip
# llama_ftype in llama.h whose matrices, all alike (`pure`), have the type of this name.
LLAMA = {
    "Q2_K": 10, "IQ3_XXS": 23, "IQ3_S": 26, "Q3_K": 12, "IQ4_XS": 30, "IQ4_NL": 25, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A matrix and what is known of its inputs.

    Attributes:
        weights: float32 [rows, columns].
        products: E[x·xᵀ] over the calibration text, float32 [columns, columns]; `damping`: what GPTQ adds.
        held: Σ x·xᵀ over held-out text, likewise.
    """

    role: str
    layer: int
    weights: np.ndarray
    products: np.ndarray
    damping: float
    held: np.ndarray

    def error(self, restored: np.ndarray) -> float:
        """‖(W − Ŵ)X‖ / ‖WX‖ of float32 [rows, columns]."""
        lost, whole = (_energy(values, self.held) for values in (self.weights - restored, self.weights))
        return (lost / whole) ** 0.5

    def turned(self, basis: np.ndarray) -> Sample:
        """The same product in another orthonormal basis of its input, float32 [columns, columns]."""
        first, second = (basis.T @ products @ basis for products in (self.products, self.held))
        return Sample(self.role, self.layer, self.weights @ basis, _even(first), self.damping, second)


def _energy(values: np.ndarray, products: np.ndarray) -> float:
    return float(np.einsum("rc,rc->", values @ products, values, dtype=np.float64))


def _even(products: np.ndarray) -> np.ndarray:
    return (products + products.T) / 2


def samples(prepared: Prepared, layers: int) -> list[Sample]:
    """Of `layers` layers at even distances, every matrix of `ROLES` that llama.cpp's formats fit."""
    architecture = prepared.architecture
    chosen = sorted(set(np.linspace(0, architecture.layers - 1, layers).round().astype(int).tolist()))
    matrices = [matrix for layer in chosen for matrix in architecture.body(layer) if matrix.role in ROLES]
    wanted = [matrix for matrix in matrices if matrix.columns % WIDTH == 0]
    held = _held_out(prepared, {matrix.input for matrix in wanted})
    checkpoint, found = Checkpoint(prepared.reference), []
    with chdir(prepared.project.folder):
        workspace = Workspace(prepared.subject.model)
        moments = read_moments(workspace)
        for matrix in wanted:
            statistics = read_products(workspace, matrix.input, moments[matrix.input])
            rows = np.linspace(0, matrix.rows - 1, min(ROWS, matrix.rows)).astype(int)
            weights = checkpoint.rows(matrix.name)[rows]
            found.append(Sample(matrix.role, matrix.layer, weights, *statistics, held[matrix.input]))
    return found


def _held_out(prepared: Prepared, inputs: set[str]) -> dict[str, np.ndarray]:
    """Σ x·xᵀ of each input over the text that judges files (`measure.TEXT`)."""
    windows = scored_ids(measure.TEXT.by_kind, measure.TEXT.window, prepared.reference, Store(prepared.project.store))
    graph = onnx.load(prepared.reference / MODEL_FILE, load_external_data=False)
    slices, found = DecoderSlices(graph, prepared.architecture), {}
    with tempfile.TemporaryDirectory() as folder:
        stream = LayerStream(slices, prepared.reference, windows, Path(folder))
        while inputs - found.keys():
            found |= {name: sums for name, sums in stream.advance().products.items() if name in inputs}
    return found


# --- ours -------------------------------------------------------------------------------------------------------------


def pieces_of(shares: Sequence[tuple[str, float]], columns: int) -> list[Piece]:
    """Formats with their columns, whole blocks of `ROTATED`; the last one takes the rest."""
    counts = [round(share * columns / ROTATED) * ROTATED for _, share in shares[:-1]]
    formats = [TensorFormat.parse(name) for name, _ in shares]
    return [Piece(*pair) for pair in zip(formats, [*counts, columns - sum(counts)], strict=True)]


def searched(sample: Sample, pieces: Sequence[Piece], search: str) -> list[Quantized]:
    """As the quantize stage does it; channels are in the pieces' order."""
    if search == "gptq":
        found = factor(sample.products, sample.damping)
        return descended(sample.weights, sample.products, found.damping, compensated(sample.weights, found, pieces))
    moments, result = sample.products.diagonal(), []
    for piece, (start, stop) in zip(pieces, bounds(pieces), strict=True):
        weights = sample.weights[:, start:stop]
        plain = search == "nearest"
        result.append(nearest(weights, piece.format) if plain else weighted(weights, moments[start:stop], piece.format))
    return result


def ordered(sample: Sample, split: bool, rotated: bool) -> Sample:
    """Channels by falling importance if they are split, then rotated in blocks."""
    basis = np.eye(len(sample.products), dtype=np.float32)
    if split:
        importance = channel_importance(sample.products.diagonal(), [squared_norms(sample.weights)])
        basis = basis[:, np.argsort(-importance, kind="stable")]
    if rotated:
        blocks = np.kron(np.eye(len(basis) // ROTATED), hadamard(ROTATED) / ROTATED**0.5)
        basis = basis @ blocks.astype(np.float32)
    return sample.turned(basis) if split or rotated else sample


def our_rows(taken: Sequence[Sample], search: str, rotated: bool, formats: Iterable = OURS) -> Iterator[dict[str, Any]]:
    """A row for each format."""
    plain = {split: [ordered(sample, split, rotated) for sample in taken] for split in (False, True)}
    for shares in formats:
        errors: dict[str, list[float]] = {}
        bits = packed = weights = 0
        for sample in plain[len(shares) > 1]:
            pieces, rows = pieces_of(shares, sample.weights.shape[1]), len(sample.weights)
            restored = np.hstack([piece.dequantize() for piece in searched(sample, pieces, search)])
            errors.setdefault(sample.role, []).append(sample.error(restored))
            bits += 8 * sum(piece.format.bytes(rows, piece.columns) for piece in pieces)
            packed += 8 * sum(piece.format.packed_bytes(rows * piece.columns) for piece in pieces)
            weights += sample.weights.size
        name = "+".join(f"{name}:{share:.0%}" if share < 1 else name for name, share in shares)
        yield _row(f"ours, {search}{', Hadamard' * rotated}", name, bits / weights, packed / weights, errors)


def _row(tool: str, name: str, bits: float, packed: float, errors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    means = {role: float(np.mean(np.square(values)) ** 0.5) for role, values in errors.items()}
    return {"tool": tool, "format": name, "bits": bits, "packed_bits": packed, "error": means}


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_rows(taken: Sequence[Sample], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each type: all matrices in one file, quantized by llama.cpp, restored by its `gguf` package."""
    source, target = folder / "source.gguf", folder / "quantized.gguf"
    names = [f"blk.{number}.{ROLES[sample.role]}.weight" for number, sample in enumerate(taken)]
    _write_source(source, dict(zip(names, taken, strict=True)))
    moments = {name: sample.products.diagonal().copy() for name, sample in zip(names, taken, strict=True)}
    for kind, number in LLAMA.items():
        alone(quantize, source, target, number, moments)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
        errors: dict[str, list[float]] = {}
        if wrong := {tensor.tensor_type.name for tensor in tensors.values()} - {kind}:
            raise RuntimeError(f"llama.cpp wrote {', '.join(sorted(wrong))} in place of {kind}.")
        for name, sample in zip(names, taken, strict=True):
            restored = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
            errors.setdefault(sample.role, []).append(sample.error(restored))
        bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors.values()) / sum(each.weights.size for each in taken)
        yield _row("llama.cpp, imatrix", kind, bits, bits, errors)


def _write_source(path: Path, taken: Mapping[str, Sample]) -> None:
    """A Llama of nothing but these matrices, one a layer, in float32."""
    widths = {sample.role: sample.weights.shape[1] for sample in taken.values()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(len(taken))
    writer.add_context_length(2048)
    writer.add_embedding_length(widths.get("gate_proj", WIDTH))
    writer.add_feed_forward_length(widths["down_proj"])
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, sample in taken.items():
        writer.add_tensor(name, sample.weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: int, moments: Mapping[str, np.ndarray]) -> None:
    """Every matrix of a GGUF to one type of `llama_ftype`, `moments` as its importance matrix. Raises ImportError
    without cyllama."""
    llama = import_module("cyllama.llama.llama_cpp")
    llama.disable_logging()
    llama.ggml_backend_load_all()
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread, params.pure = kind, 1, True
    entries = (Importance * (len(moments) + 1))()
    for entry, (name, values) in zip(entries, moments.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data, values.size
    set_imatrix(params, entries)
    llama.model_quantize(str(source), str(target), params)


# --- the run ----------------------------------------------------------------------------------------------------------


def measured(taken: Sequence[Sample]) -> list[dict[str, Any]]:
    """All rows."""
    rows = [row for rotated in (False, True) for row in our_rows(taken, "gptq", rotated)]
    rows += our_rows(taken, "weighted", False)
    with tempfile.TemporaryDirectory() as folder:
        rows += llama_rows(taken, Path(folder))
    return sorted(rows, key=lambda row: row["bits"])


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of its table."""
    roles = [role for role in ROLES if any(role in row["error"] for row in result["rows"])]
    head = ["tool", "format", "bits/weight", "packed bits", *(f"error, {role}" for role in roles)]
    lines = [
        [row["tool"], row["format"], f"{row['bits']:.2f}", f"{row['packed_bits']:.2f}",
         *(f"{row['error'][role]:.4f}" for role in roles)]
        for row in result["rows"]
    ]  # fmt: skip
    return head, lines


def markdown(result: Mapping[str, Any]) -> str:
    """The table of README.md."""
    tokens = f"{result['matrices']} matrices, calibrated on {result['tokens']:,} tokens"
    return f"{result['subject']}; {tokens}.\n\n{table(*cells(result))}"


TABLES = {"matrices": markdown}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".bench" / "quality", help="Scratch folder.")
@click.option("--model", type=click.Choice([subject.model for subject in SUBJECTS]), default=NATIVE)
@click.option("--layers", default=6, show_default=True, help="How many layers' matrices, at even distances.")
def main(work: Path, model: str, layers: int) -> None:
    """Write benchmarks/results/matrices.json."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        project = Project(work.resolve())
        project.seed_store()
        subject = next(subject for subject in SUBJECTS if subject.model == model)
        if model == NATIVE:
            project.run("download", SMALL)  # it is made of that
        prepared = prepare(project, subject)
        taken = samples(prepared, layers)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    result = {
        "machine": machine.describe(), "model": model, "subject": subject.title, "matrices": len(taken),
        "tokens": load_calibration().grown(prepared.architecture.widest).tokens, "rows": measured(taken),
    }  # fmt: skip
    write_json(RESULTS / "matrices.json", result)
    head, lines = cells(result)
    grid = Table(*head, box=None)
    for line in lines:
        grid.add_row(*line)
    Console(width=120).print(grid)


if __name__ == "__main__":
    main()
