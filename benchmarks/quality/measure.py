"""What is measured of every written file: its bytes, its divergence from the reference on one text, its speed.

A `Runtime` is how a kind of file is loaded. Each measurement runs in a process of its own (`searches.alone`), so its
memory, threads and crashes stay there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import DivergenceConfig, SpeedConfig
from pipeline.evaluate import divergence, speed
from pipeline.evaluate.divergence import Logits
from pipeline.evaluate.runtime import OnnxDecoder
from pipeline.evaluate.statistics import mean_interval, summarise_divergence

# text-wiki judges and never calibrates (configs/calibration.yaml; the calibrate stage refuses shared 13-grams).
TEXT = DivergenceConfig(texts={"text-wiki": 4080}, window=256)
SPEED = SpeedConfig(prompt_tokens=128, new_tokens=32, repeats=3)
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

    def size(self, folder: Path) -> dict[str, int]:
        """`bytes` of weights and graph; other counts beside it."""

    def score(self, folder: Path, text: Text) -> Measured:
        """Divergence, top-1 agreement and perplexity."""

    def speed(self, folder: Path) -> dict[str, Any]:
        """`tokens_per_second` of decoding, its `_low` and `_high`."""


class OnnxFile:
    """A folder with one ONNX graph and its data, as onnxruntime-genai loads it."""

    def size(self, folder: Path) -> dict[str, int]:
        """The graph and its data; not the tokenizer's files."""
        return {"bytes": onnx_bytes(folder)}

    def score(self, folder: Path, text: Text) -> Measured:
        """In ONNX Runtime."""
        (graph,) = folder.glob("*.onnx")
        decoder = OnnxDecoder(graph)
        return scored(lambda ids: decoder.run(ids)[0], text, graph.stem)

    def speed(self, folder: Path) -> dict[str, Any]:
        """In onnxruntime-genai."""
        return rates(speed.measure(folder, SPEED))


def onnx_bytes(folder: Path) -> int:
    """Bytes of the graph and of the data files beside it: what is neither tokenizer nor configuration."""
    kept = (".onnx", ".data")
    return sum(file.stat().st_size for file in folder.iterdir() if any(part in kept for part in file.suffixes))


def rates(measured: Mapping[str, Any]) -> dict[str, float]:
    """Of a speed measurement, what the tables show."""
    return {name: value for name, value in measured.items() if name.startswith("tokens_per_second")}


def record_reference(graph: Path, windows: Sequence[np.ndarray], vocab: int, folder: Path) -> float:
    """Keep the reference's log-probabilities of the windows in `folder`; its perplexity."""
    decoder = OnnxDecoder(graph)
    scores = divergence.record_reference(lambda ids: decoder.run(ids)[0], windows, vocab, folder)
    return math.exp(-float(scores.logprob.mean()))


def scored(logits: Logits, text: Text, name: str) -> Measured:
    """A model compared with the reference on the text."""
    scores, kl = divergence.compare(logits, text.windows, text.reference, name)
    own = divergence.read_reference(text.reference)
    figures = summarise_divergence(kl, scores.top == own.top, scores.logprob, own.logprob, scores.window_id)
    return Measured({name: value for name, value in figures.items() if "detectable" not in name}, kl)


def excess(
    ours: np.ndarray, theirs: np.ndarray, windows: Sequence[np.ndarray], factor: float = 1.0
) -> dict[str, float]:
    """Mean of KL(ours) − factor · KL(theirs), paired by token, with its 90 % interval; below 0 is a win.

    Args:
        ours, theirs: KL divergence of each scored token, float64 [tokens].
        windows: the token windows, the independent units.
    """
    ids = np.repeat(np.arange(len(windows)), [len(window) - 1 for window in windows])
    found = mean_interval(ours - factor * theirs, ids)
    return {"excess": found.estimate, "excess_low": found.low, "excess_high": found.high}
