"""What is measured of every written file: its size, its divergence from the reference on four kinds of text, its speed.

A `Runtime` is how a kind of file is loaded. Each measurement runs in a process of its own (`searches.alone`), so its
memory, threads and crashes stay there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.quality.sizes import onnx_size
from pipeline.errors import EvaluationError
from pipeline.runtime import speed
from pipeline.runtime.session import OnnxDecoder
from pipeline.tasks import divergence_scores as divergence
from pipeline.tasks.divergence import DivergenceConfig
from pipeline.tasks.divergence_scores import Logits
from pipeline.tasks.statistics import summarise_divergence

# Text that judges and never calibrates (configs/calibration.yaml; the calibrate stage refuses shared 13-grams): a
# quarter of each kind, as the shipped suites have it.
TEXT = DivergenceConfig(
    prose={"text-wiki": 8},
    chat={"chat-mt-bench": 8},
    code={"text-bottle": 8},
    languages={"text-vietnamese": 4, "text-chinese": 4},
    window=256,
)
SPEED = ((128,), 32, 3)  # prompt lengths, new tokens, repeats
REFERENCE_GRAPH = "model.onnx"


@dataclass(frozen=True)
class Text:
    """Held-out windows, int64 [tokens] each, and the folder where the reference's log-probabilities of them lie."""

    windows: Sequence[np.ndarray]
    reference: Path
    vocab: int


@dataclass(frozen=True)
class Measured:
    """A file's figures, plain numbers, and its KL divergence at every scored token, float64 [tokens]."""

    figures: Mapping[str, Any]
    kl: np.ndarray


class Runtime(Protocol):
    """How a kind of file is loaded."""

    def size(self, folder: Path) -> dict[str, Any]:
        """`bytes` of weights and graph on disk, `memory` that the weights take as products read them, both in bytes;
        other counts beside them."""

    def score(self, folder: Path, text: Text) -> Measured:
        """Divergence, top-1 agreement and perplexity."""

    def speed(self, folder: Path) -> dict[str, Any]:
        """`tokens_per_second` of decoding, its `_low` and `_high`; or `speed_missing`, why there is none."""


class OnnxFile:
    """A folder with one ONNX graph and its data, as onnxruntime-genai loads it."""

    def size(self, folder: Path) -> dict[str, Any]:
        """The graph and its data; not the tokenizer's files."""
        return onnx_size(folder)

    def score(self, folder: Path, text: Text) -> Measured:
        """In ONNX Runtime."""
        (graph,) = folder.glob("*.onnx")
        decoder = OnnxDecoder(graph)
        return scored(lambda ids: decoder.run(ids)[0], text, graph.stem)

    def speed(self, folder: Path) -> dict[str, Any]:
        """In onnxruntime-genai."""
        try:
            found = speed.measure(folder, *SPEED)
        except EvaluationError as error:
            return {"speed_missing": str(error)}
        return {name: found[name] for name in ("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")}


def record_reference(graph: Path, windows: Sequence[np.ndarray], folder: Path) -> dict[str, float]:
    """Keep the reference's log-probabilities of the windows in `folder`; its perplexity by kind of text."""
    decoder = OnnxDecoder(graph)
    scores = divergence.record_reference(lambda ids: decoder.run(ids)[0], windows, folder)
    kinds = np.array([kind for kind, _ in TEXT.windows])[scores["window_id"]]
    return {str(kind): math.exp(-float(scores["logprob"][kinds == kind].mean())) for kind in np.unique(kinds)}


def scored(logits: Logits, text: Text, name: str) -> Measured:
    """A model compared with the reference on the text, in all and by kind."""
    with tempfile.TemporaryDirectory() as folder:
        scores = divergence.compare(logits, text.windows, text.reference, Path(folder), name)
    own = divergence.read_scores(text.reference)
    figures = summarise_divergence(
        scores["kl"], scores["top"] == own["top"], scores["logprob"], own["logprob"], scores["window_id"], TEXT.windows
    )
    return Measured({name: value for name, value in figures.items() if "detectable" not in name}, scores["kl"])
