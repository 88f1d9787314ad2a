"""llama.cpp's quantizers (PyPI `cyllama`), evaluated by llama.cpp itself on the same token ids.

The source is our float16 GGUF of the same weights; measured like the others, it shows that the two runtimes compute
the same model. The importance matrix is our calibration's own second moments, E[x²] of each input channel, which is
what llama.cpp's tool collects; like that tool's it covers the layers' matrices, not the table of embedding and head.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from benchmarks.quality.gguf_file import write_gguf
from benchmarks.quality.measure import SPEED, Measured, Text, scored
from benchmarks.quality.peer import Peer
from benchmarks.quality.sizes import MIXTURES, gguf_size
from benchmarks.quality.subjects import Prepared
from benchmarks.searches import Importance, set_imatrix
from pipeline.checkpoint.architecture import Architecture
from pipeline.machine import cores

TOOL, SOURCE = "llama.cpp", "F16"
_FILE = "model.gguf"


class GgufFile:
    """A folder with one GGUF, in llama.cpp."""

    def size(self, folder: Path) -> dict[str, Any]:
        """The file without its tokenizer, and the types of its tensors."""
        return gguf_size(folder / _FILE)

    def score(self, folder: Path, text: Text) -> Measured:
        """All positions of a window in one batch."""
        context = _Context(folder / _FILE, text.vocab, max(map(len, text.windows)))
        return scored(context.logits, text, folder.name)

    def speed(self, folder: Path) -> dict[str, Any]:
        """Greedy decoding, one token at a time, as `pipeline.runtime.speed` does it."""
        (prompt,), new, repeats = SPEED
        context = _Context(folder / _FILE, None, prompt + new)
        found = [context.decode_rate(list(range(100, 100 + prompt)), new) for _ in range(repeats + 1)][1:]
        names = "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"
        return dict(zip(names, (statistics.median(found), min(found), max(found)), strict=True))


def peers() -> list[Peer]:
    """The float16 source; one mixture without an importance matrix, to show what it brings; all with one."""
    kinds = [(SOURCE, False), ("Q4_K_M", False), *((name, True) for name in MIXTURES)]
    code, packages = (Path(__file__), Path(__file__).with_name("gguf_file.py")), ("cyllama", "gguf")
    return [
        Peer(
            TOOL, f"{name}{', imatrix' * imatrix}", {"type": name, "imatrix": imatrix}, make, GgufFile(), code,
            packages, calibrated=imatrix,
        )
        for name, imatrix in kinds
    ]  # fmt: skip


def make(prepared: Prepared, options: Mapping[str, Any], folder: Path) -> None:
    """Convert the checkpoint and, unless the source itself is wanted, quantize it.

    Raises ImportError without cyllama, RuntimeError when it wrote nothing.
    """
    source, target = folder / "source.gguf", folder / _FILE
    write_gguf(source, prepared.reference, prepared.architecture)
    if options["type"] == SOURCE:
        source.rename(target)
        return
    llama = _llama()
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = gguf.LlamaFileType[f"MOSTLY_{options['type']}"].value, cores()
    moments = load_file(prepared.moments)
    importances = _importances(prepared.architecture, moments)
    if options["imatrix"]:
        set_imatrix(params, importances)
    llama.model_quantize(str(source), str(target), params)
    source.unlink()
    if not target.exists():
        raise RuntimeError(f"llama.cpp wrote no {options['type']} file.")


def _importances(architecture: Architecture, moments: Mapping[str, np.ndarray]) -> ctypes.Array[Importance]:
    """Every matrix of the layers with its input's moments, ended by an empty entry. It points into `moments`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, architecture.layers)
    matrices = [matrix for layer in range(architecture.layers) for matrix in architecture.body(layer)]
    entries = (Importance * (len(matrices) + 1))()
    for entry, matrix in zip(entries, matrices, strict=False):
        values = moments[matrix.input]
        name = names.get_name(matrix.name, try_suffixes=(".weight",))
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data, values.size
    return entries


def _llama() -> Any:
    llama = import_module("cyllama.llama.llama_cpp")
    llama.disable_logging()
    llama.ggml_backend_load_all()
    return llama


class _Context:
    """A loaded GGUF with room for `length` tokens."""

    def __init__(self, path: Path, vocab: int | None, length: int):
        self._llama = _llama()
        model = type("Model", (self._llama.LlamaModel,), {"n_vocab": vocab})  # cyllama reads it and never sets it
        params = self._llama.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = -(-length // 256) * 256
        params.n_threads = params.n_threads_batch = cores()
        self._context = self._llama.LlamaContext(model(path_model=str(path)), params)

    def _run(self, ids: Sequence[int], start: int, every: bool) -> None:
        batch = self._llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(int(token), start + place, [0], every or place == len(ids) - 1)
        self._context.decode(batch)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 [len(ids), vocab] of a sequence of its own."""
        self._context.kv_cache_clear()
        self._run(ids, 0, every=True)
        return np.array([self._context.get_logits_ith(place) for place in range(len(ids))], np.float32)

    def decode_rate(self, prompt: Sequence[int], new: int) -> float:
        """Tokens per second after the first one, each depending on nothing but its place: speed is the same."""
        self._context.kv_cache_clear()
        self._run(prompt, 0, every=False)
        start = time.perf_counter()
        for step in range(new - 1):
            self._run([prompt[step % len(prompt)]], len(prompt) + step, every=False)
            self._context.synchronize()
        return (new - 1) / (time.perf_counter() - start)
