"""calibrate: statistics of every product's input and of the KV cache over the calibration text, layer by layer.

A killed run goes on at the layer where it was: hidden states and statistics so far lie in artifacts/<model>/partial.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file, save

from pipeline import keys, machine
from pipeline.calibrate.correlations import packed
from pipeline.calibrate.rare import experts_inputs, needed, top_up
from pipeline.calibrate.results import DAMPING, TOKENS
from pipeline.calibrate.texts import input_ids
from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.calibration import load_calibration
from pipeline.errors import EvaluationError
from pipeline.files import sha256_of, write_bytes
from pipeline.graph.slices import DecoderSlices
from pipeline.partial import Partial, open_partial
from pipeline.progress import Progress
from pipeline.quantize.factor import held_out_damping
from pipeline.runtime.device import chosen_device
from pipeline.runtime.stream import Beside, LayerStream, Passed, mirror
from pipeline.workspace import MODEL_FILE, Workspace

Statistics = dict[str, np.ndarray]


def run(model: str) -> None:
    """Write artifacts/<model>/calibration: moments.safetensors, E[x²] by input, float32 [channels].

    Beside it ranges.safetensors: what int8 scales of the KV cache need, `layers.0.key` and `layers.0.value` of every
    layer, float32 [kv_heads · head_dim] (`quantize.cache.magnitudes`); and layers.0.safetensors, … for GPTQ: by input
    of a layer, `calibrate.correlations` of its channels and the damping that held-out text asks for, float64 []. In a
    mixture also `layers.0.experts.tokens`, int32 [experts]: how many woke each; what was seen of too few is topped up
    (`calibrate.rare`).
    """
    store, workspace = Store(), Workspace(model)
    folder = workspace.reference(store)
    architecture = read_architecture(folder / "config.json")
    windows = input_ids(load_calibration(), folder, store)
    slices = DecoderSlices(onnx.load(folder / MODEL_FILE, load_external_data=False), architecture, cache=True)
    key = _key(workspace, windows)
    with open_partial(workspace.partial("calibration"), key) as partial:
        found = _measure(slices, folder, windows, partial, workspace)
        counts = {name: found.pop(name) for name in list(found) if name.endswith(TOKENS)}
        moments = {name: found.pop(name) for name in slices.columns} | counts
        for leftover in (*partial.folder.glob("hidden.*"), *partial.folder.glob("statistics.*")):
            leftover.unlink()
        for path, values in ((workspace.moments, moments), (workspace.ranges, found)):
            # Whoever reads this file's digest knows what made the correlations too.
            write_bytes(partial.folder / path.name, save(values, metadata={"key": key}))
        partial.finish(workspace.moments.parent)
    print(f"{model}: second moments of {len(slices.columns)} inputs over {sum(map(len, windows)):,} tokens")
    for line in rare_experts(counts, architecture):
        print(line)


def rare_experts(counts: Statistics, architecture: Architecture) -> list[str]:
    """For people: which experts were calibrated with tokens of others, by the input that lacked them."""
    lines = []
    for kind, channels in {item.kind: item.columns for item in architecture.body(0) if item.expert is not None}.items():
        lacking = {name: np.flatnonzero(seen < needed(channels)).tolist() for name, seen in counts.items()}
        if rare := sum(map(len, lacking.values())):
            least, name = min((int(seen.min()), name) for name, seen in counts.items())
            lines.append(
                f"  input {kind} of experts: {rare:,} of {architecture.experts * architecture.layers:,} saw fewer than "
                f"{needed(channels):,} tokens and got the rest from their layer's others; least: {least:,} "
                f"({name.removesuffix(TOKENS)} {int(counts[name].argmin())})"
            )
    return lines


def _key(workspace: Workspace, windows: list[np.ndarray]) -> str:
    """What decides the statistics, 64 hex digits. The export stands for the weights, as in quantize."""
    inputs = {
        "export": [sha256_of(file) for file in sorted(workspace.export.iterdir())],
        "windows": [hashlib.sha256(ids.tobytes()).hexdigest() for ids in windows],
    }
    return keys.digest([keys.code(__name__), machine.kernel_class(), chosen_device().name, inputs])


def _measure(
    slices: DecoderSlices, folder: Path, windows: list[np.ndarray], partial: Partial, workspace: Workspace
) -> Statistics:
    """Moments and ranges of all layers and the head, those that an earlier run finished included; correlations are
    written.

    What becomes of a layer's products is part of the next layer's run: so workers that share no memory do it beside
    that layer's text. It comes first: before the next layer's hidden states are written, this layer is recorded.
    """
    layers = slices.architecture.layers
    done, found = _resume(partial, layers, workspace)
    with Progress(f"calibrate {workspace.model}", layers + 1, "layers") as progress:
        stream, made = LayerStream(slices, folder, windows, partial.folder, done), Statistics()
        passed = Passed({}, {}, {}, {})

        def take(correlations: Statistics) -> None:
            made.update(correlations)
            if len(made) == 2 * len(slices.inputs(stream.layer - 1)):
                _write(partial, workspace.correlations(f"layers.{stream.layer - 1}").name, made)
                _record(partial, stream, found)
                made.clear()

        progress.advance(stream.layer, kept=True)
        while stream.layer <= layers:
            body = stream.architecture.body(stream.layer) if stream.layer < layers else []
            passed = stream.advance(_correlating(passed), take)
            if seen := [[passed.tokens[one] for one in names] for names in experts_inputs(body)]:
                found[f"layers.{stream.layer - 1}.experts{TOKENS}"] = np.array(seen[0], np.int32)
            for names in experts_inputs(body):
                top_up(passed.products, passed.tokens, names)
            found |= _statistics(passed, workspace.model)
            progress.advance()
    return found


def _statistics(passed: Passed, model: str) -> Statistics:
    """Ranges, and E[x²] of each input."""
    moments = {name: total.diagonal() / passed.tokens[name] for name, total in passed.products.items()}
    found = passed.ranges | moments
    if bad := [name for name, values in found.items() if not np.isfinite(values).all()]:
        raise EvaluationError(
            f"{model}: activations at {bad[0]} overflow on the calibration text; the weights are damaged."
        )
    return found


def _correlating(passed: Passed) -> Iterator[Beside]:
    """A unit for each of a layer's inputs, the widest first. Its products, which are large, end with it."""
    for name in sorted(passed.products, key=lambda one: -len(passed.products[one])):
        yield functools.partial(
            _correlate, name, passed.products.pop(name), passed.samples.pop(name), passed.tokens[name]
        )


def _correlate(name: str, products: np.ndarray, sample: np.ndarray, tokens: int) -> Statistics:
    """An input's correlations and their damping."""
    whole = mirror(np.require(products, requirements="W"))  # what came from elsewhere is read-only
    found = packed(whole)
    return {name: found, f"{name}.{DAMPING}": np.array(held_out_damping(whole, sample, tokens))}


def _write(partial: Partial, name: str, values: Statistics) -> None:
    data = save(values)
    write_bytes(partial.folder / name, data)
    partial.record(name, hashlib.sha256(data).hexdigest())


def _statistics_file(layer: int) -> str:
    return f"statistics.{layer}.safetensors"


def _record(partial: Partial, stream: LayerStream, found: Statistics) -> None:
    """Note that everything before the stream's layer is finished. States are not flushed: digests tell what a power
    cut lost."""
    _write(partial, _statistics_file(stream.layer), found)
    partial.record(stream.states_file(stream.layer), stream.digest)
    for name in (_statistics_file(stream.layer - 1), stream.states_file(stream.layer - 1)):
        (partial.folder / name).unlink(missing_ok=True)


def _resume(partial: Partial, layers: int, workspace: Workspace) -> tuple[int | None, Statistics]:
    """The layer to go on at, None for the start, and the statistics before it: the last that is whole on the disk."""
    whole = 0
    while whole < layers and partial.whole(workspace.correlations(f"layers.{whole}").name):
        whole += 1
    for layer in range(whole, 0, -1):
        if all(map(partial.whole, (LayerStream.states_file(layer), _statistics_file(layer)))):
            return layer, load_file(partial.folder / _statistics_file(layer))
    return None, {}
