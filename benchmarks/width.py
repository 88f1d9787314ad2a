"""What calibration in proportion to width pays: GPTQ's output error on held-out text, by tokens a channel and damping.

    python -m benchmarks.width [--layer 10] [--layers 7]

SmolLM2's own down_proj (1,536 channels, 2.7 times its width, as in MiMo), or a wide one made of the neurons of several
neighbouring layers, which all read one layer's input (7: 10,752 channels, MiMo has 11,008). Calibration text in windows
of 512; eight windows are held out. 128 rows are quantized to 4 bits in blocks of 64, with GPTQ and coordinate descent
under several dampings; each line says what is left of the error of the plain search, and which damping the calibrate
stage's own rule picks. Run it where the calibrate stage of the demo has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx

from benchmarks.project import SMALL
from pipeline.calibrate.texts import input_ids
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.calibration import load_calibration
from pipeline.graph.slices import DecoderSlices
from pipeline.quantize.descent import descended
from pipeline.quantize.factor import factor, held_out_damping
from pipeline.quantize.formats import Quantized, TensorFormat
from pipeline.quantize.gptq import compensated
from pipeline.quantize.search import weighted
from pipeline.runtime.session import open_slice
from pipeline.workspace import MODEL_FILE, Workspace

FORMAT = TensorFormat.parse("w4b64a")
ROWS, HELD_OUT, SAMPLE = 128, 8, 2
MULTIPLES = (0.67, 1, 2, 4, 8, 16)
DAMPINGS = (0.03, 0.1, 0.3, 1, 3, 10)


class WideLayer:
    """An MLP made of some layers' neurons.

    Attributes:
        weights: of some rows of its down_proj, float32 [rows, channels].
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, layers: int):
        first = layer - layers // 2
        names = [f"model.layers.{number}" for number in range(first, first + layers)]
        own = self._norm(checkpoint, f"model.layers.{layer}")
        gains = [self._norm(checkpoint, name) / own for name in names]
        self._gate, self._up = (
            np.concatenate(
                [checkpoint.rows(f"{name}.mlp.{part}.weight") * gain for name, gain in zip(names, gains, strict=True)]
            )
            for part in ("gate_proj", "up_proj")
        )
        self.weights = np.hstack([checkpoint.rows(f"{name}.mlp.down_proj.weight", 0, ROWS) for name in names])

    @staticmethod
    def _norm(checkpoint: Checkpoint, layer: str) -> np.ndarray:
        return checkpoint.rows(f"{layer}.post_attention_layernorm.weight").reshape(-1)

    def inputs(self, hidden: np.ndarray) -> np.ndarray:
        """Of down_proj: float32 [tokens, hidden] → [tokens, channels]."""
        gate = hidden @ self._gate.T
        return gate / (1 + np.exp(-gate)) * (hidden @ self._up.T)


def normed(folder: Path, layer: int, windows: list[np.ndarray]) -> Iterator[np.ndarray]:
    """What the MLP of a layer reads of each window, float32 [tokens, hidden]."""
    architecture = read_architecture(folder / "config.json")
    slices = DecoderSlices(onnx.load(folder / MODEL_FILE, load_external_data=False), architecture)
    parts = [slices.embedding(), *map(slices.layer, range(layer + 1))]
    wanted = [part.target for part in parts[:-1]] + [parts[-1].taps[f"layers.{layer}.mlp"]]
    runs = [open_slice(part.model, folder) for part in parts]
    for ids in windows:
        states = ids[None]
        for part, run, name in zip(parts, runs, wanted, strict=True):
            (states,) = run(
                [name], {"attention_mask": np.ones((1, len(ids)), np.int64), part.source or "input_ids": states}
            )
        yield states[0]


@click.command()
@click.option("--layer", default=10, show_default=True, help="whose input is read")
@click.option("--layers", default=1, show_default=True, help="whose neurons make the MLP")
def main(layer: int, layers: int) -> None:
    """Print a line for each number of tokens."""
    folder = Workspace(SMALL).reference(Store())
    wide = WideLayer(Checkpoint(folder), layer, layers)
    channels = wide.weights.shape[1]
    multiples = [multiple for multiple in MULTIPLES if multiple * channels <= 50_000]
    needed = round(max(multiples) * channels / 512) + HELD_OUT
    text = load_calibration().model_copy(update={"per_channel": 0, "chats": {}})
    text = text.model_copy(update={"per_channel": 512 * needed / channels}).grown(channels)
    windows = input_ids(text, folder, Store())
    order = np.random.default_rng(0).permutation(len(windows))[:needed]
    states = normed(folder, layer, [windows[index] for index in order])
    judging = np.concatenate([wide.inputs(next(states)) for _ in range(HELD_OUT)])
    judge = judging.T @ judging
    products, samples, read = np.zeros((channels, channels), np.float32), list[np.ndarray](), 0
    for multiple in multiples:
        while read < round(multiple * channels / 512):
            values = wide.inputs(next(states))
            products, read = products + values.T @ values, read + 1
            samples = [*samples, values][:SAMPLE]
        print(line(wide.weights, products, np.concatenate(samples), 512 * read, judge), flush=True)


def line(weights: np.ndarray, products: np.ndarray, sample: np.ndarray, tokens: int, judge: np.ndarray) -> str:
    """What each damping leaves, in per cent of the plain search's error under `judge`, Σ x·xᵀ of held-out text."""
    channels = len(products)

    def error(pieces: list[Quantized]) -> float:
        lost = weights - pieces[0].dequantize()
        return float(np.einsum("rc,rc->", lost @ judge, lost))

    plain = error([weighted(weights, products.diagonal(), FORMAT)])
    told = [f"{channels:,} channels, {tokens:,} tokens ({tokens / channels:.2f} each):"]
    chosen = held_out_damping(products.copy(), sample, tokens)
    for damping in sorted({*DAMPINGS, chosen}):
        found = factor(products, damping)
        pieces = descended(weights, products, found.damping, compensated(weights, found, [(FORMAT, channels)]))
        told.append(f"{damping:.3g}{' (chosen)' if damping == chosen else ''} {error(pieces) / plain:.1%},")
    return " ".join(told)


if __name__ == "__main__":
    main()
