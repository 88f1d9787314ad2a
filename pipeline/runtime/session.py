"""Written models in ONNX Runtime: the logits of token sequences, with a reusable cache.

This is the runtime that ships; nothing here simulates quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from pipeline.errors import EvaluationError
from pipeline.machine import cores

if TYPE_CHECKING:
    import onnx  # what only runs models need not have it: benchmarks.foreign

ort.set_default_logger_severity(3)
_HEADROOM = 4 / 3  # on top of weights in float32
_DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def runtimes() -> dict[str, str]:
    """Versions of what runs a model here, by distribution."""
    return {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")}


def widened_bytes(weight_bytes: int, parameters: int) -> int:
    """Memory that a full-precision graph takes with its weights held in float32 beside their mapped file."""
    return weight_bytes + 4 * parameters


def memory_needed(weight_bytes: int, parameters: int) -> int:
    """Bytes that must be available for a full-precision graph to be held whole: a quarter of them stays free for
    activations and everyone else."""
    return round(_HEADROOM * widened_bytes(weight_bytes, parameters))


def runs_layered(reference: str, weight_bytes: int, parameters: int, memory: int) -> bool:
    """Whether a full-precision model runs layer by layer where `memory` bytes are available.

    `reference` is the suite's: "memory", "layers" or "auto".
    """
    return reference == "layers" or (reference == "auto" and memory_needed(weight_bytes, parameters) > memory)


def open_session(path: Path) -> ort.InferenceSession:
    """Load a model on the CPU with all cores.

    Raises EvaluationError when ONNX Runtime refuses the file, and CheckpointError as `check_weights`.
    """
    check_weights(path, path.parent)
    return _open(path, path, ort.SessionOptions())


SliceRun = Callable[[Sequence[str], Mapping[Any, np.ndarray]], list[np.ndarray]]
"""Names of outputs, and arrays by name, of which a slice takes what it needs → these outputs."""


def open_graph(model: onnx.ModelProto, folder: Path, threads: int = 0) -> ort.InferenceSession:
    """As `open_session`, for a graph that is in no file; the data files that it refers to lie in `folder`.

    `threads`: of one run; 0 for all cores. Stored weights are packed when they are loaded, and their products have the
    same bits for any number of threads. Products with weights that a run is fed have not: where those must be equal
    on all machines, give 1 and run the session from many threads, which it allows.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    check_weights(model, folder)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return _open(model.SerializeToString(), folder, options)


def open_slice(model: onnx.ModelProto, folder: Path, threads: int = 0) -> SliceRun:
    """`open_graph` as a function, which many threads may call.

    Where a past is not among the arrays, [batch, …] all of them, there is none.
    """
    session = open_graph(model, folder, threads)
    inputs = session.get_inputs()

    def run(outputs: Sequence[str], arrays: Mapping[Any, np.ndarray]) -> list[np.ndarray]:
        feeds = {value.name: arrays[value.name] for value in inputs if value.name in arrays}
        for value in inputs:
            if value.name.startswith("past_key_values.") and value.name not in feeds:
                empty = (len(arrays["attention_mask"]), value.shape[1], 0, value.shape[3])
                feeds[value.name] = np.zeros(empty, np.float32)
        return session.run(outputs, feeds)

    return run


def check_weights(model: Path | onnx.ModelProto, folder: Path) -> None:
    """Compare the weights that a graph refers to with the digests of what was downloaded, before a runtime maps them.

    A graph beside which there are no such digests, a quantized one, refers to no downloaded file.

    Raises CheckpointError naming blob and tensor.
    """
    if not any(folder.glob("*.blake3")):
        return
    import onnx

    from pipeline.checkpoint.tensors import Checkpoint

    graph = onnx.load(model, load_external_data=False) if isinstance(model, Path) else model
    checkpoint = Checkpoint(folder)

    def check(tensor: onnx.TensorProto) -> None:
        place = {item.key: item.value for item in tensor.external_data}
        if place.get("location", "").endswith(".safetensors"):
            checkpoint.check(tensor.name, int(place["offset"]), int(place["length"]))

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(check, graph.graph.initializer))


def _open(model: Path | bytes, where: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    options.intra_op_num_threads = options.intra_op_num_threads or cores()
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no public base class
        raise EvaluationError(f"{where}: ONNX Runtime {ort.__version__} cannot load it: {error}") from None


def _open_every_token(path: Path) -> ort.InferenceSession:
    """As `open_session`, with the logits of every token."""
    import onnx
    from google.protobuf.message import DecodeError

    from pipeline.graph.last_token import LAST_TOKEN, every_token

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return open_session(path)  # which says what is wrong
    shortened = any(node.name == LAST_TOKEN for node in model.graph.node)
    return open_graph(every_token(model), path.parent) if shortened else open_session(path)


@dataclass(frozen=True)
class State:
    """Keys and values of `length` tokens. Never modified, so one prefix serves many continuations."""

    length: int
    values: tuple[Any, ...]


class OnnxDecoder:
    """A decoder graph as a function from tokens to logits: a file's, which it opens with the logits of every token, or
    one that is open.

    It feeds the inputs that the graph declares: Optimum's exports take position_ids, ours do not.
    """

    def __init__(self, model: Path | ort.InferenceSession):
        self.session = _open_every_token(model) if isinstance(model, Path) else model
        inputs = self.session.get_inputs()
        self._places = any(value.name == "position_ids" for value in inputs)
        cache = [value for value in inputs if value.name.startswith("past_key_values.")]
        self._names = [value.name for value in cache]
        self._outputs = [value.name for value in self.session.get_outputs()]
        empty = [np.zeros((1, value.shape[1], 0, value.shape[3]), _DTYPES[value.type]) for value in cache]
        self._empty = State(0, tuple(ort.OrtValue.ortvalue_from_numpy(value) for value in empty))

    def run(self, ids: Sequence[int], past: State | None = None) -> tuple[np.ndarray, State]:
        """Logits, float32 [len(ids), vocab], of `ids` after the tokens in `past`; and the state after them."""
        past = past or self._empty
        length = past.length + len(ids)
        feeds = {"input_ids": np.asarray([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        if self._places:
            feeds["position_ids"] = np.arange(past.length, length)[None]
        values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        values |= zip(self._names, past.values, strict=True)
        logits, *present = self.session.run_with_ort_values(self._outputs, values)
        return logits.numpy()[0], State(length, tuple(present))
