"""Recipes resolved to plans: every matrix of an architecture gets a format, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.checkpoint.architecture import Architecture, Matrix, MtpHead
from pipeline.config.recipes import UNROTATED, KvCache, Recipe, RecipeConfig, Rotation, SplitFormat
from pipeline.errors import PlanError
from pipeline.planning import experts
from pipeline.quantize.formats import TensorFormat

TABLES = frozenset({"embedding", "head"})  # roles of the matrices with a row for every token
_CACHE_BYTES: dict[KvCache, int] = {"float32": 4, "int8": 1}


class Piece(NamedTuple):
    """Some of a matrix's input channels in one format. `columns` counts them."""

    format: TensorFormat
    columns: int


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix and its pieces: one that holds all channels, or a split into two (the most important channels first).

    `rotated`: the input of each piece is rotated when it runs, in blocks of so many channels; 0: it is not.
    """

    matrix: Matrix
    pieces: tuple[Piece, ...]
    rotated: int = 0

    @property
    def split(self) -> bool:
        """Whether the input channels are divided."""
        return len(self.pieces) > 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Input channels of each piece."""
        return tuple(piece.columns for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(piece.format.bytes(self.matrix.rows, piece.columns) for piece in self.pieces)

    @property
    def formats(self) -> str:
        """For people: `w4b64a` or `w4b64a:320+w2b64a:256`."""
        if not self.split:
            return str(self.pieces[0].format)
        return "+".join(f"{piece.format}:{piece.columns}" for piece in self.pieces)


@dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens: `channels` each, in every layer."""

    type: KvCache
    layers: int
    channels: int

    @property
    def names(self) -> list[str]:
        """`layers.0.key`, `layers.0.value`, `layers.1.key`, …"""
        return [f"layers.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    @property
    def bytes(self) -> int:
        """Bytes of one token."""
        return len(self.names) * self.channels * _CACHE_BYTES[self.type]


@dataclass(frozen=True)
class Plan:
    """Formats of all matrices in order of execution: the embedding, the body, the head.

    With a tied head there is one table, planned once as the head. `rotation`: what `body` and the graph have of it.
    """

    embedding: PlannedMatrix
    body: tuple[PlannedMatrix, ...]
    head: PlannedMatrix
    tied: bool
    cache: Cache
    rotation: Rotation = UNROTATED

    @property
    def tables(self) -> tuple[PlannedMatrix, ...]:
        """Every stored matrix, each once, in file order."""
        return (self.head, *self.body) if self.tied else (self.embedding, *self.body, self.head)

    @property
    def tables_alone(self) -> tuple[PlannedMatrix, ...]:
        """The embedding and the head, or the one table that is both."""
        return (self.head,) if self.tied else (self.embedding, self.head)

    @property
    def body_bits(self) -> float:
        """Bits per weight of the body, scales and zero points included."""
        weights = sum(item.matrix.rows * item.matrix.columns for item in self.body)
        return 8 * sum(item.bytes for item in self.body) / weights


class MtpPlan(Plan):
    """Formats of a multi-token head; its embedding and output projection lie in the decoder's files."""

    @property
    def tables(self) -> tuple[PlannedMatrix, ...]:
        """What is stored for the head alone."""
        return self.body


def plan_mtp(head: MtpHead, plan: Plan, chosen: str) -> MtpPlan:
    """The head of a planned decoder, its matrices in one format; what it caches of its one layer stays float32.

    Raises PlanError where the decoder's residual is rotated: the head would read other hidden states.
    """
    if plan.rotation.residual:
        raise PlanError(
            "a recipe with `speculative: head` cannot rotate the residual stream, which the head reads: set "
            "`rotation: residual` to 0."
        )
    body = tuple(apply_format(chosen, matrix) for matrix in head.body(0))
    return MtpPlan(plan.embedding, body, plan.head, plan.tied, cache_of(head, "float32"))


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers that get more bits: the first and last eighth, and every third between.

    Integer division throughout (llama.cpp, src/llama-quant.cpp); onnxruntime-genai's float variant picks other layers.
    """
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def make_plan(architecture: Architecture, recipe: RecipeConfig) -> Plan:
    """Apply a recipe.

    Raises:
        PlanError: a role without a rule, a format without a fast kernel, matrices that share an input but are split
            differently, or experts of a layer that differ.
    """
    layers = architecture.layers
    body = [apply_format(_rule(recipe, matrix, layers), matrix) for matrix in architecture.matrices[:-1]]
    _check_shared_inputs(body)
    experts.require_alike([(item.matrix, item.pieces[0].format) for item in body if item.matrix.expert is not None])
    head = apply_format(recipe.head, architecture.head)
    embedding = apply_format(recipe.head if architecture.tied else recipe.embedding, architecture.embedding)
    cache = cache_of(architecture, recipe.kv_cache)
    return rotated(Plan(embedding, tuple(body), head, architecture.tied, cache), recipe)


def rotated(plan: Plan, recipe: Recipe) -> Plan:
    """A plan with its recipe's rotation. Runs that a product rotates divide each piece of a matrix. What an expert's
    last matrix multiplies is not rotated: it comes into being inside the operator."""
    runs = recipe.rotation.inputs

    def turned(item: PlannedMatrix) -> PlannedMatrix:
        if item.matrix.kind not in runs or item.matrix.role == experts.DOWN:
            return item
        return replace(item, rotated=math.gcd(runs[item.matrix.kind], *item.widths))

    return replace(plan, body=tuple(map(turned, plan.body)), rotation=recipe.rotation)


def cache_of(architecture: Architecture, kv_cache: KvCache) -> Cache:
    """The KV cache of a recipe's type."""
    return Cache(kv_cache, architecture.layers, architecture.cache_channels)


def _rule(recipe: RecipeConfig, matrix: Matrix, layers: int) -> str | SplitFormat:
    for rule in recipe.body:
        if matrix.role in rule.roles and (rule.layers == "all" or use_more_bits(matrix.layer, layers)):
            return rule.format
    raise PlanError(
        f"recipe {recipe.title!r}: no rule of `body` covers role {matrix.role!r} (tensor {matrix.name}, layer "
        f"{matrix.layer} of {layers}). Add the role to a rule with `layers: all`."
    )


def apply_format(chosen: str | SplitFormat, matrix: Matrix) -> PlannedMatrix:
    """A matrix in a format, with the largest block that divides its columns, or split in whole blocks.

    Raises PlanError when neither is possible.
    """
    try:
        if isinstance(chosen, str):
            fmt = TensorFormat.parse(chosen)
            fitted = fmt.fitted(matrix.columns) if matrix.expert is None else experts.expert_format(fmt, matrix)
            return PlannedMatrix(matrix, (Piece(fitted, matrix.columns),))
        if matrix.expert is not None:
            raise PlanError("experts cannot be split (QMoE): name one format for them")
        high, low = TensorFormat.parse(chosen.high), TensorFormat.parse(chosen.low)
        if high.bits <= low.bits:
            raise PlanError(f"high ({high}) needs more bits than low ({low}): it takes what matters most")
        step = max(high.block, low.block)
        columns = round(chosen.high_fraction * matrix.columns / step) * step
        if not 0 < columns < matrix.columns:
            raise PlanError(
                f"a share of {chosen.high_fraction} of {matrix.columns} input channels is {columns} in blocks of "
                f"{step}: nothing is left to split."
            )
        rest = matrix.columns - columns
        return PlannedMatrix(matrix, (Piece(high.fitted(columns), columns), Piece(low.fitted(rest), rest)))
    except PlanError as error:
        raise PlanError(f"tensor {matrix.name} [{matrix.rows}, {matrix.columns}]: {error}") from None


def _check_shared_inputs(body: Sequence[PlannedMatrix]) -> None:
    seen: dict[str, PlannedMatrix] = {}
    for item in body:
        first = seen.setdefault(item.matrix.input, item)
        if item.widths != first.widths:
            raise PlanError(
                f"tensors {first.matrix.name} ({first.formats}) and {item.matrix.name} ({item.formats}) multiply the "
                f"same activations and must be split alike. Give their roles the same split."
            )
