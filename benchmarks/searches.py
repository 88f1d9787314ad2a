"""How fast and how good the searches are, beside ONNX Runtime's quantizers and llama.cpp's, on the same weights.

    python -m benchmarks.searches [--rows 4096] [--out searches.json]

Every tool gets the same seeded bfloat16 values (Student-t with five degrees of freedom, log-normal row and channel
scales) in the widths of MiMo and Phi-4, in a process of its own, and reports:

- CPU seconds of all its threads, and wall seconds, without starting, compiling or loading the input;
- the relative error ‖W − Ŵ‖ / ‖W‖ of what it stored, plain and with each input channel weighted by its second moment.

What is inside the measured call differs, because the tools' interfaces do:

- ours: `pipeline.quantize.search`, from float32 to packed bytes in memory, on one thread; "unweighted" is the weighted
  search with all moments equal, "from bf16" decodes the weights too, piece by piece: what llama.cpp is compared with;
- ONNX Runtime: `MatMulNBitsQuantizer(...).process()` on a model in memory with one MatMul, as its users call it;
- llama.cpp (PyPI `cyllama`): `model_quantize` from one GGUF file to another, so with reading and writing files in the
  page cache. Its file is a share of one MiMo layer, cut by rows into four layers: its recipes then give every type the
  share of the weights that a whole MiMo has. Without an importance matrix, and with the moments as one.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.checkpoint.widen import widen_bfloat16
from pipeline.files import write_json
from pipeline.quantize.formats import Quantized, TensorFormat
from pipeline.quantize.search import nearest, weighted

T = TypeVar("T")
Key = tuple[str, str, int | None]  # tool, format, threads
Result = dict[str, Any]  # what `run` returns and the JSON file holds
WIDTHS = (4096, 5120, 11008)  # MiMo's and Phi-4's hidden sizes, MiMo's MLP
# MiMo's matrices: rows and columns of one layer, by llama.cpp's names.
LAYER = {
    "attn_q": (4096, 4096),
    "attn_k": (1024, 4096),
    "attn_v": (1024, 4096),
    "attn_output": (4096, 4096),
    "ffn_gate": (11008, 4096),
    "ffn_up": (11008, 4096),
    "ffn_down": (4096, 11008),
}
SLICES = 4  # with four layers, use_more_bits chooses two: the half that it chooses of MiMo's 36
OURS = ("w4b32s", "w4b32a", "w4b64a", "w2b64a", "w8b32s")
ONNX_DEFAULT = ("w4b32s", "w4b32a", "w4b64a")
ONNX_KQUANT = ("w4b32a", "w4b64a")  # it has no symmetric form
LLAMA = {"Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12}  # llama_ftype in llama.h
# The formats that our recipe of the same name uses, and their shares of a MiMo body's weights.
COUNTERPART = {
    "Q4_0": {"w4b32s": 1.0},
    "Q4_K_M": {"w4b32a": 0.86, "w8b32s": 0.14},
    "Q3_K_M": {"w4b64a": 0.6, "w2b64a": 0.4},
}


BESIDE = ("nearest", "weighted")  # which of ours the table sets beside each peer


@dataclass(frozen=True)
class Record:
    """One call of one tool. Errors are relative to the norm of the weights; a core does weights_per_s_core."""

    what: str
    shape: str
    format: str
    threads: int | None  # None: as many as the tool likes
    weights: int
    bits_per_weight: float
    cpu_s: float
    wall_s: float
    weights_per_s_core: float
    rel_error: float
    weighted_error: float


@dataclass(frozen=True)
class Timing:
    """CPU seconds of the process's threads together, and wall seconds."""

    cpu_s: float
    wall_s: float


# --- the weights ------------------------------------------------------------------------------------------------------


def synthetic(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights as bfloat16 bits, uint16 [rows, columns], and second moments of the inputs, float32 [columns]."""
    rng = np.random.default_rng([seed, columns])
    channels = np.exp(0.3 * rng.standard_normal(columns, np.float32))
    moments = np.exp(rng.standard_normal(columns, np.float32))
    bits = np.empty((rows, columns), np.uint16)
    for start in range(0, rows, 256):
        part = bits[start : start + 256]
        tails = np.sqrt(np.float32(2.5) / rng.standard_gamma(2.5, part.shape, np.float32))
        scale = 0.02 * np.exp(0.3 * rng.standard_normal((len(part), 1), np.float32)) * channels
        values = rng.standard_normal(part.shape, np.float32) * tails * scale
        part[:] = (values.view(np.uint32) + np.uint32(0x8000)) >> 16
    return bits, moments


def decode(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16, to float32 of the same shape, as the pipeline does it."""
    values = np.empty(bits.shape, np.float32)
    widen_bfloat16(bits.reshape(-1), values.view(np.uint32).reshape(-1))
    return values


def errors(weights: np.ndarray, restored: np.ndarray, moments: np.ndarray) -> tuple[float, float]:
    """‖W − Ŵ‖ / ‖W‖ over float32 [rows, columns], plain and with channels weighted by moments [columns]."""
    lost, whole = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for start in range(0, len(weights), 256):
        part = weights[start : start + 256]
        delta = part - restored[start : start + 256]
        lost += np.einsum("ij,ij->j", delta, delta)
        whole += np.einsum("ij,ij->j", part, part)
    return float(np.sqrt(lost.sum() / whole.sum())), float(np.sqrt(lost @ moments / (whole @ moments)))


# --- measuring --------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], T]) -> tuple[T, Timing]:
    """The call's result and what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, Timing(time.process_time() - cpu, time.perf_counter() - wall)


def measured(call: Callable[[], T]) -> tuple[T, Timing]:
    """`timed`, up to three times, a run of a second not again: the first result, the timing with the least CPU time."""
    result, timing = timed(call)
    timings = [timing]
    while len(timings) < 3 and timings[-1].wall_s < 1:
        timings.append(timed(call)[1])
    return result, min(timings, key=lambda timing: timing.cpu_s)


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function of this module in a fresh process: its memory, threads and crashes stay there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quiet) as pool:
        return pool.submit(function, *arguments).result()


def quiet() -> None:
    """Drop what this process prints: the peers report every tensor."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def record(tool: Key, shape: Sequence[int], stored: int, timing: Timing, error: tuple[float, float]) -> Record:
    """A Record of `tool`, which kept a matrix of `shape` in `stored` bytes."""
    count, size = math.prod(shape), "x".join(map(str, shape))
    what, fmt, threads = tool
    rate = count / timing.cpu_s
    return Record(what, size, fmt, threads, count, 8 * stored / count, timing.cpu_s, timing.wall_s, rate, *error)


# --- ours -------------------------------------------------------------------------------------------------------------


def stream(bits: np.ndarray, search: Callable[[np.ndarray], Quantized]) -> list[Quantized]:
    """Decode and search some rows at a time, as a conversion that never holds a matrix does."""
    return [search(decode(bits[start : start + 256])) for start in range(0, len(bits), 256)]


def ours(path: Path, names: tuple[str, ...] = OURS) -> list[Record]:
    """Round to nearest and the weighted search, on one thread, for each format."""
    bits, moments = load(path)
    weights, records = decode(bits), []
    for name in names:
        fmt = TensorFormat.parse(name)
        searches: dict[str, Callable[[np.ndarray], Quantized]] = {
            "nearest": lambda part, fmt=fmt: nearest(part, fmt),
            "unweighted": lambda part, fmt=fmt: weighted(part, np.ones_like(moments), fmt),
            "weighted": lambda part, fmt=fmt: weighted(part, moments, fmt),
        }
        for what, search in searches.items():
            search(weights[:1])  # compiles
            found, timing = measured(lambda search=search: search(weights))
            stored = found.codes.nbytes + found.scales.nbytes + found.zeros.nbytes
            error = errors(weights, found.dequantize(), moments)
            records.append(record((f"ours, {what}", name, 1), bits.shape, stored, timing, error))
            if what in BESIDE:
                timing = measured(lambda search=search: stream(bits, search))[1]
                records.append(record((f"ours, {what} from bf16", name, 1), bits.shape, stored, timing, error))
    return records


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def onnx_runtime(path: Path, kquant: bool, name: str) -> list[Record]:
    """Its default quantizer or KQuant, on a model with one MatMul. Raises ImportError without onnxruntime."""
    quantizer = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    fmt, (bits, moments) = TensorFormat.parse(name), load(path)
    weights = decode(bits)
    if kquant:
        config = quantizer.KQuantWeightOnlyQuantConfig()
    else:
        config = quantizer.DefaultWeightOnlyQuantConfig(fmt.block, fmt.symmetric, bits=fmt.bits)
    model = one_matmul(weights)
    process = quantizer.MatMulNBitsQuantizer(model, fmt.bits, fmt.block, fmt.symmetric, algo_config=config)
    timing = timed(process.process)[1]  # it consumes its model: once, however short
    codes, scales, *zeros = (part.reshape(len(weights), -1) for part in matmul_nbits(process.model.model))
    found = Quantized(fmt, codes, scales, zeros[0] if zeros else codes[:, :0])
    stored = sum(part.nbytes for part in (codes, scales, *zeros))
    tool = ("onnxruntime, KQuant", name, 1) if kquant else ("onnxruntime, default", name, None)
    return [record(tool, bits.shape, stored, timing, errors(weights, found.dequantize(), moments))]


def one_matmul(weights: np.ndarray) -> Any:
    """x · Wᵀ as an ONNX ModelProto, W float32 [rows, columns] as MatMul's second input."""
    onnx = import_module("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    rows, columns = weights.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
        "one",
        [helper.make_tensor_value_info("x", kind, [1, columns])],
        [helper.make_tensor_value_info("y", kind, [1, rows])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weights.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def matmul_nbits(model: Any) -> list[np.ndarray]:
    """The stored inputs of the model's MatMulNBits: codes, scales and, unless symmetric, zeros."""
    onnx = import_module("onnx")
    (node,) = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [arrays[name] for name in node.input[1:]]


# --- llama.cpp --------------------------------------------------------------------------------------------------------


class Importance(ctypes.Structure):
    """llama_model_imatrix_data of llama.h."""

    _fields_: ClassVar = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Parameters(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_: ClassVar = [
        ("nthread", ctypes.c_int),
        ("ftype", ctypes.c_int),
        ("types", ctypes.c_int * 2),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p * 3),
    ]


def slices(square: int) -> Iterator[tuple[str, int, slice]]:
    """The GGUF's tensors: name, width, and which rows of that width's weights, where a square matrix has `square`."""
    used = {4096: 0, 11008: 0}
    for layer in range(SLICES):
        for name, (full, width) in LAYER.items():
            rows = max(2, full * square // 4096 // (8 * SLICES))
            yield f"blk.{layer}.{name}.weight", width, slice(used[width], used[width] + rows)
            used[width] += rows


def write_gguf(path: Path, sources: dict[int, np.ndarray]) -> None:
    """A Llama of MiMo's widths without embeddings, made of the rows of `sources`, bfloat16 bits by width."""
    gguf = import_module("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SLICES)
    writer.add_context_length(32768)
    writer.add_embedding_length(4096)
    writer.add_feed_forward_length(11008)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, width, rows in slices(len(sources[4096])):
        writer.add_tensor(name, sources[width][rows].view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(gguf: Path, paths: dict[int, Path], name: str, threads: int, imatrix: bool) -> list[Record]:
    """llama.cpp's quantizer from the file `gguf`. Raises ImportError without cyllama, RuntimeError when it fails."""
    llama = import_module("cyllama.llama.llama_cpp")
    llama.ggml_backend_load_all()
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = LLAMA[name], threads
    sources = {width: load(path) for width, path in paths.items()}
    importances = imatrix_of(sources)
    if imatrix:
        set_imatrix(params, importances)
    target = gguf.with_stem(name)
    _, timing = measured(lambda: llama.model_quantize(str(gguf), str(target), params))
    shape, stored, error = read_back(target, sources)
    tool = "llama.cpp, imatrix" if imatrix else "llama.cpp"
    return [record((tool, name, threads), shape, stored, timing, error)]


def imatrix_of(sources: dict[int, tuple[np.ndarray, np.ndarray]]) -> ctypes.Array[Importance]:
    """The moments of every tensor of the GGUF, ended by an empty entry. It points into `sources`: keep both."""
    tensors = list(slices(len(sources[4096][0])))
    entries = (Importance * (len(tensors) + 1))()
    for entry, (name, width, _) in zip(entries, tensors, strict=False):
        moments = sources[width][1]
        entry.name, entry.data, entry.size = name.encode(), moments.ctypes.data, moments.size
    return entries


def set_imatrix(params: Any, importances: ctypes.Array[Importance]) -> None:
    """Set the one field of llama.cpp's parameters that cyllama has no setter for, in the struct inside its object.

    Raises RuntimeError unless the object ends with that struct, holding the values set before.
    """
    start = type(params).__basicsize__ - ctypes.sizeof(Parameters)
    fields = Parameters.from_address(id(params) + start)
    if start < object.__basicsize__ or (fields.nthread, fields.ftype) != (params.nthread, params.ftype):
        raise RuntimeError("this version of cyllama lays its parameters out differently.")
    fields.imatrix = ctypes.addressof(importances)


def read_back(
    target: Path, sources: dict[int, tuple[np.ndarray, np.ndarray]]
) -> tuple[tuple[int], int, tuple[float, float]]:
    """What a quantized GGUF holds of `sources`: number of weights, bytes, errors over all its tensors together."""
    gguf = import_module("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    parts, stored = [], 0
    for name, width, rows in slices(len(sources[4096][0])):
        bits, moments = sources[width]
        found = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        parts.append((decode(bits[rows]).ravel(), found.ravel(), np.tile(moments, len(found))))
        stored += int(tensors[name].n_bytes)
    # Tensors of two widths have one common shape: a row of all weights, each with its own moment.
    weights, found, moments = (np.concatenate(column) for column in zip(*parts, strict=True))
    return weights.shape, stored, errors(weights[None], found[None], moments)


# --- the run ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `prepared` wrote: bfloat16 bits and moments."""
    return np.load(path, mmap_mode="r"), np.load(path.with_suffix(".moments.npy"))


@contextmanager
def prepared(rows: int) -> Iterator[tuple[Path, dict[int, Path]]]:
    """A temporary folder with the weights of each width, [rows, width], and their paths by width."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {width: folder / f"{width}.npy" for width in WIDTHS}
        for width, path in paths.items():
            bits, moments = synthetic(rows, width)
            np.save(path, bits)
            np.save(path.with_suffix(".moments.npy"), moments)
        yield folder, paths


def attempt(result: Result, tool: str, function: Callable[..., list[Record]], *arguments: Any) -> None:
    """Add what a peer measures to `result`, or why it is missing: not installed, refused, or its process died."""
    if tool in result["missing"]:
        return
    try:
        result["records"].extend(asdict(each) for each in alone(function, *arguments))
    except (ImportError, RuntimeError) as error:  # a dead process is a RuntimeError, BrokenProcessPool
        result["missing"][tool] = f"{type(error).__name__}: {error}"


def run(rows: int, report: Callable[[str], None]) -> Result:
    """Measure every tool on `rows` rows of each width: {"records": [Record …], "missing": {tool: why}}."""
    result: Result = {"rows": rows, "records": [], "missing": {}}
    with prepared(rows) as (folder, paths):
        for width, path in paths.items():
            report(f"ours and onnxruntime, {rows} rows of {width}")
            result["records"].extend(asdict(each) for each in alone(ours, path))
            for name in ONNX_DEFAULT:
                attempt(result, "onnxruntime, default", onnx_runtime, path, False, name)
            # KQuant takes most of the time of the whole run: its second block size on one width only.
            for name in ONNX_KQUANT[: None if width == WIDTHS[0] else 1]:
                attempt(result, "onnxruntime, KQuant", onnx_runtime, path, True, name)
        gguf = folder / "source.gguf"
        write_gguf(gguf, {width: load(path)[0] for width, path in paths.items()})
        for name in LLAMA:
            report(f"llama.cpp, {name}")
            for threads in (1, 2):
                attempt(result, "llama.cpp", llama_cpp, gguf, paths, name, threads, False)
                attempt(result, "llama.cpp, imatrix", llama_cpp, gguf, paths, name, threads, True)
    return result


def pooled(records: list[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """All shapes of a (tool, format, threads) as one: total rates, root-mean-square errors, mean bits."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for each in records:
        groups.setdefault((each["what"], each["format"], each["threads"]), []).append(each)
    table = {}
    for key, group in groups.items():
        count = np.array([each["weights"] for each in group])
        column = {name: np.array([each[name] for each in group]) for name in group[0] if name.endswith(("_s", "error"))}
        table[key] = {
            "per_core": count.sum() / column["cpu_s"].sum(),
            "per_second": count.sum() / column["wall_s"].sum(),
            "bits": np.average([each["bits_per_weight"] for each in group], weights=count),
            "rel_error": np.sqrt(np.average(column["rel_error"] ** 2, weights=count)),
            "weighted_error": np.sqrt(np.average(column["weighted_error"] ** 2, weights=count)),
        }
    return table


def ratio(table: dict[Key, dict[str, float]], what: str, peer: Key) -> float:
    """Our weights per core-second ÷ a peer's, for the formats that do the same job."""
    tool, name, _ = peer
    source = f"ours, {what} from bf16" if tool.startswith("llama.cpp") else f"ours, {what}"
    shares = COUNTERPART.get(name, {name: 1.0})
    seconds = sum(share / table[source, fmt, 1]["per_core"] for fmt, share in shares.items())
    return 1 / seconds / table[peer]["per_core"]


def show(result: Result, console: Console) -> None:
    """Print the pooled figures and what was missing."""
    table = pooled(result["records"])
    grid = Table(title="Quantizers on the same weights (Mw: 1e6 weights; ratios: weights per core-second)", box=None)
    for heading in ("tool", "format", "threads", "bits", "Mw/core-s", "Mw/s", "error", "weighted error"):
        grid.add_column(heading, justify="left" if heading in {"tool", "format"} else "right", no_wrap=True)
    for what in BESIDE:
        grid.add_column(f"our {what} ÷ it", justify="right", no_wrap=True)
    for key, row in table.items():
        figures = (f"{row['bits']:.2f}", f"{row['per_core'] / 1e6:.1f}", f"{row['per_second'] / 1e6:.1f}")
        quality = (f"{row['rel_error']:.5f}", f"{row['weighted_error']:.5f}")
        beside = () if key[0].startswith("ours") else (f"{ratio(table, what, key):.2f}" for what in BESIDE)
        grid.add_row(key[0], key[1], str(key[2] or "any"), *figures, *quality, *beside)
    console.print(grid)
    for tool, why in result["missing"].items():
        console.print(f"missing: {tool} ({why})", markup=False)


def main() -> None:
    """Measure, print a table, and write the records as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searches", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=4096, help="rows of each matrix, at least 128 (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the records")
    arguments = parser.parse_args()
    if arguments.rows < 128:
        parser.error(f"--rows {arguments.rows}: the slices of a layer need at least 128.")
    console = Console(width=150)
    result = run(arguments.rows, lambda line: console.print(line, markup=False, highlight=False))
    if arguments.out:
        write_json(arguments.out, result)
    show(result, console)


if __name__ == "__main__":
    main()
