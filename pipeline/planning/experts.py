"""The formats in which ONNX Runtime's QMoE multiplies experts on the CPU: the one rule on them.

A layer's experts are one operator with one width and one block, for the matrices that read the hidden states and for
those that give them back. It packs codes, scales and zero points as MatMulNBits does and runs its kernels (measured
with ONNX Runtime 1.31.1 and 1.32.0, x86-64): so a plan counts an expert's bytes and memory as any other matrix's. It
has no sum of two products, so no 6 bits and no split along the channels; and of a row in a single block it reads zero
points in another order, so there are two blocks at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

from pipeline.checkpoint.architecture import Matrix
from pipeline.errors import PlanError
from pipeline.quantize.formats import TensorFormat

GATE, UP, DOWN = ROLES = ("expert_gate", "expert_up", "expert_down")
"""Roles of the matrices of an expert: down(silu(gate(x)) · up(x))."""
BITS = (4, 8)
"""Widths with int8 products on x86-64 and arm64. 2 bits have one on x86-64 alone: emulated arm64 processors take 29
times as long for them as for 4."""


def fitted(fmt: TensorFormat, matrix: Matrix) -> TensorFormat:
    """`fmt` with the largest block that divides both sides of an expert's matrix, at least twice.

    Raises PlanError when none does.
    """
    sides = matrix.rows, matrix.columns
    return replace(fmt, block=min(fmt.block, min(sides) // 2)).fitted(gcd(*sides))


def expert_format(fmt: TensorFormat, matrix: Matrix) -> TensorFormat:
    """`fmt`, as `fitted`, for an expert's matrix in an artifact. Raises PlanError also when QMoE has no fast product of
    this width."""
    if fmt.bits not in BITS:
        raise PlanError(
            f"format {fmt}: experts are multiplied in {' or '.join(map(str, BITS))} bits (QMoE). Name such a format "
            f"for {', '.join(ROLES)}."
        )
    return fitted(fmt, matrix)


def usable(names: Sequence[str]) -> list[str]:
    """Those of a budget's formats that experts can have. Raises PlanError when there are none."""
    found = [name for name in names if TensorFormat.parse(name).bits in BITS]
    if not found:
        raise PlanError(
            f"none of the budget's formats ({', '.join(names)}) can be an expert's (QMoE): allow one of "
            f"{' or '.join(map(str, BITS))} bits."
        )
    return found


def require_alike(formats: Sequence[tuple[Matrix, TensorFormat]]) -> None:
    """Raise PlanError unless the experts of each layer have one format."""
    seen: dict[int, tuple[Matrix, TensorFormat]] = {}
    for matrix, fmt in formats:
        other, first = seen.setdefault(matrix.layer, (matrix, fmt))
        if fmt != first:
            raise PlanError(
                f"tensors {other.name} ({first}) and {matrix.name} ({fmt}) are experts of one layer, which one "
                f"operator multiplies (QMoE): name {', '.join(ROLES)} in one rule, with one format."
            )
