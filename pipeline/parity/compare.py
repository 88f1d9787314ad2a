"""Parity: our full-precision graph against an independent one of the same checkpoint, on logits: Optimum's export, or a
reference of our own where it has none.

Optimum holds a whole model in float32 several times over. A checkpoint too large for the memory allowed is compared
on its first layers, and if need be on its first token ids: real weights, the real embedding and head, every operator
of the family. Our side of the cut refers to the same bytes of the same files, only fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.tensors import TensorRef
from pipeline.errors import EvaluationError, ResourceError
from pipeline.parity.optimum_export import run_alone
from pipeline.runtime.session import OnnxDecoder

EXPORTER = "optimum-onnx"
NEAR_TIE = 2e-4
"""Margin of a near-tie, relative to the largest logit: two logits that each moved by the usual limit, 1e-4."""
_EXPORTER_BYTES = 16  # peak bytes of an Optimum export for each float32 parameter, measured
_MIN_VOCAB = 1024  # fewer token ids would say little about embedding and head


def cut(architecture: Architecture, memory_bytes: int) -> Architecture:
    """The largest part of a model that Optimum exports within `memory_bytes`: its first layers, and the first rows of
    embedding and head.

    All of it; else fewer layers with the whole vocabulary; else two layers, or one, with as many token ids as fit.

    Raises:
        ResourceError: one layer with 1,024 token ids is too large.
    """

    def part(layers: int, vocab: int) -> Architecture:
        return replace(architecture, layers=layers, vocab=vocab)

    def peak(layers: int, vocab: int) -> int:
        return _EXPORTER_BYTES * part(layers, vocab).parameters

    one = peak(1, 1)
    layer, row = peak(2, 1) - one, peak(1, 2) - one
    layers = 1 + (memory_bytes - peak(1, architecture.vocab)) // layer
    if layers >= 1:
        return part(min(layers, architecture.layers), architecture.vocab)
    least = min(_MIN_VOCAB, architecture.vocab)
    for layers in range(min(2, architecture.layers), 0, -1):
        vocab = 1 + (memory_bytes - peak(layers, 1)) // row
        if vocab >= least:
            return part(layers, vocab)
    raise ResourceError(
        f"parity: Optimum's export of one {architecture.family} layer of width {architecture.hidden:,} with {least:,} "
        f"token ids peaks at {peak(1, least):,} bytes; memory_bytes in configs/parity.yaml allows {memory_bytes:,}. "
        f"Raise it if this machine has more memory free, or run the stage on a larger one."
    )


def cut_references(smaller: Architecture, checkpoint: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """References to a cut model's tensors: what `build_decoder` takes. No byte is read or moved."""
    refs = {}
    for name, shape in smaller.expected_tensors().items():
        ref = checkpoint[name]
        # Rows lie one after another, so the first rows are a prefix of the tensor's bytes.
        refs[name] = replace(ref, shape=shape, length=ref.length // ref.shape[0] * shape[0])
    return refs


class Reference(NamedTuple):
    """What our graph is compared with: `name` for people, `logits` of ids [tokens], of which the first so many are the
    prompt, float32 [tokens, vocab]."""

    name: str
    logits: Callable[[np.ndarray, int], np.ndarray]


def optimums(path: Path, architecture: Architecture) -> Reference:
    """An export of Optimum's."""
    return Reference(
        f"{EXPORTER} {version(EXPORTER)}", lambda ids, prompt: cached_logits(path, architecture, ids, prompt)
    )


def own(weights: Path, part: Architecture, folder: Path) -> Reference:
    """Our own reference of a cut model, in a process of its own; files that it talks through lie in `folder`."""

    def logits(ids: np.ndarray, prompt_tokens: int) -> np.ndarray:
        given, found = folder / "ids.npy", folder / "logits.npy"
        np.save(given, ids)
        run_alone("pipeline.parity.phimoe", weights, part.layers, part.vocab, given, prompt_tokens, found)
        return np.load(found)

    return Reference(f"a reference of our own, torch {version('torch')}", logits)


def compare(
    ours: Path, theirs: Reference, architecture: Architecture, prompt_tokens: int, decode_steps: int, *, seed: int
) -> dict[str, Any]:
    """Run both with their KV caches on the same random token ids, one after the other.

    `architecture` is the cut one. Tracing freezes LongRoPE's choice of factors at the short ones, so Optimum's export
    is right up to `rope.original_max_position` tokens only; stay below. Returns `judge`'s figures and the exporter.

    Raises:
        EvaluationError: a file does not load, or gives logits that are not finite or of another shape.
    """
    ids = np.random.default_rng(seed).integers(0, architecture.vocab, prompt_tokens + decode_steps)
    mine, reference = cached_logits(ours, architecture, ids, prompt_tokens), theirs.logits(ids, prompt_tokens)
    return {
        **judge(mine, reference),
        "prompt_tokens": prompt_tokens,
        "decode_steps": decode_steps,
        "exporter": theirs.name,
    }


def judge(mine: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """How far two arrays of logits, float32 [positions, vocab], are apart.

    `max_relative_error` is max|mine − reference| / max|reference|. At each position the largest logits' ids are equal
    (`top1_equal` is their share), or a near-tie (the reference's two logits differ by at most `NEAR_TIE` of the largest
    logit), or a mismatch.
    """
    scale = float(np.abs(reference).max())
    top_mine, top = mine.argmax(axis=1), reference.argmax(axis=1)
    positions = np.arange(len(reference))
    near = reference[positions, top] - reference[positions, top_mine] <= NEAR_TIE * scale
    different = top_mine != top
    return {
        "max_relative_error": float(np.abs(mine - reference).max()) / scale,
        "top1_equal": float(1 - different.mean()),
        "near_ties": int((different & near).sum()),
        "mismatches": int((different & ~near).sum()),
    }


def cached_logits(path: Path, architecture: Architecture, ids: np.ndarray, prompt_tokens: int) -> np.ndarray:
    """Logits, float32 [len(ids), vocab]: the first `prompt_tokens` ids at once, then one at a time with the KV cache.

    Raises:
        EvaluationError: the file does not load, or gives logits that are not finite or of another shape.
    """
    decoder, state, rows = OnnxDecoder(path), None, []
    for step in np.split(ids, range(prompt_tokens, len(ids))):
        found, state = decoder.run(step.tolist(), state)
        rows.append(found)
    logits = np.concatenate(rows)
    bad = int((~np.isfinite(logits)).sum())
    if bad or logits.shape != (len(ids), architecture.vocab):
        raise EvaluationError(
            f"{path}: logits of shape {list(logits.shape)}, {bad:,} of them not finite; expected are finite values of "
            f"shape [{len(ids)}, {architecture.vocab}]. The export is broken."
        )
    return logits
