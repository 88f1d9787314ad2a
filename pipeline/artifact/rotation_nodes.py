"""The nodes of a rotation that no weight could take in: reshapes, and products with constants that layers share."""

from __future__ import annotations

import numpy as np

from pipeline.graph.nodes import GraphWriter
from pipeline.quantize.rotation import factors, hadamard, rotate

_SIDE = 64  # channels that a Hadamard matrix mixes at a time: a larger one is a Kronecker product of two


def rotate_blocks(graph: GraphWriter, x: str, channels: int, block: int, output: str) -> str:
    """x · R of every `block` of float32 [batch, sequence, channels]."""
    matrix = graph.constant(f"rotation.{block}", rotate(np.eye(block, dtype=np.float32), block))
    blocks = _reshape(graph, x, [channels // block, block], f"{output}/blocks")
    return _reshape(graph, graph.node("MatMul", [blocks, matrix], f"{output}/product"), [channels], output)


def rotate_states(graph: GraphWriter, x: str, channels: int, run: int, output: str) -> str:
    """x · R of every `run` of float32 [batch, sequence, channels]."""
    signs, mix, _ = factors(run)
    signed = graph.constant("rotation.signs", np.tile(signs, channels // run))
    signed = graph.node("Mul", [x, signed], f"{output}/signed")
    return _mixed(graph, signed, channels, run, "rotation.mix", mix.T, output)


def rotate_states_back(graph: GraphWriter, x: str, channels: int, run: int, output: str) -> str:
    """x · Rᵀ before its last step: the channels of `output` are still to be multiplied with R's signs."""
    return _mixed(graph, x, channels, run, "rotation.mix.back", factors(run).mix, output)


def _mixed(graph: GraphWriter, x: str, channels: int, run: int, name: str, mix: np.ndarray, output: str) -> str:
    """Channels that are numbered [run, point, place], places again as two digits, mixed along one axis after the
    other."""
    order = factors(run).order
    inner = min(order, _SIDE)
    before = channels // run
    for label, side in ((name, mix), *((f"hadamard.{size}", hadamard(size)) for size in (order // inner, inner))):
        if (size := len(side)) > 1:
            tall = _reshape(graph, x, [before, size, channels // before // size], f"{output}/{before}")
            x = graph.node("MatMul", [graph.constant(label, side), tall], f"{output}/{before}/product")
        before *= size
    return _reshape(graph, x, [channels], output)


def _reshape(graph: GraphWriter, x: str, last: list[int], output: str) -> str:
    """Batch and sequence stay."""
    shape = graph.constant(f"shape.{'.'.join(map(str, last))}", np.array([0, 0, *last], np.int64))
    return graph.node("Reshape", [x, shape], output)
