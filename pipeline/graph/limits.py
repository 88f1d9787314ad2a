"""What a graph of an architecture can be asked for, known before it is built."""

from __future__ import annotations

from pipeline.checkpoint.architecture import Architecture
from pipeline.errors import GraphError


def longest_context(architecture: Architecture) -> int:
    """Tokens that a model was trained for, where all of them see each other."""
    return min(architecture.max_position, architecture.sliding_window or architecture.max_position)


def check_context(architecture: Architecture, context: int) -> None:
    """Raise GraphError when the context exceeds what the model was trained for, or its rotation has no kernel."""
    if context > (limit := longest_context(architecture)):
        raise GraphError(
            f"context {context:,} exceeds {limit:,} tokens (max_position_embeddings {architecture.max_position:,}, "
            f"sliding window {architecture.sliding_window}). Lower `context` in the model's entry."
        )
    if architecture.rope.dims % 16:
        raise GraphError(
            f"rotary dimension {architecture.rope.dims} is not a multiple of 16, which GroupQueryAttention needs "
            f"(head_dim {architecture.head_dim} × partial_rotary_factor)."
        )
