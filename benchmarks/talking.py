"""A small model's function in a large model's shapes: a full-size model that talks.

    python -m benchmarks.synthetic mimo-8b build/talking-mimo --talking artifacts/smollm2-135m/reference
    python -m benchmarks.talking_check talking-mimo smollm2-135m

The first command writes it, the second compares two exported models. Every tensor of the large model holds the small
one's, rounded to bfloat16, and the large model then computes what the rounded small one computes:

=============  =====================================================================================================
residual       n copies of the small one's channels, then at least 64 *ballast* channels that hold a constant. The
               mean of squares is taken over more channels: n·h of H. Products that read the residual make up for
               it, √(n·h/H). The ballast stands for the small model's epsilon, which shrinks by as much.
products       entries of n − 1 copies are rounded to bfloat16, the last copy holds what that left: 2⁻¹⁸ of a value.
               What is written (embedding, o_proj, down_proj) is repeated, and divided by powers of two only.
heads          repeated, their rotary pairs at every k-th of the large model's, whose theta is set to give the same
               frequencies: theta^(P/(k·p)) for p small and P large pairs. The other pairs' queries and keys are zero.
               Queries make up for another root of the head's size. Values lie in a head as often as they fit.
neurons        repeated until there are enough. Biases are zero.
layers         those after the small model's last add zero: their o_proj and down_proj are zero, the rest is synthetic.
vocabulary     the rows after the small one's read nothing but the ballast: -8192 ÷ the root mean square of the last
               hidden state. SmolLM2's lies between 19 and 260, so these logits lie between -430 and -31.
=============  =====================================================================================================

Such a model tests machinery at full size. Its quantized figures say nothing of the large model's quality, nor of the
small one's: each value is held by many weights. So its config.json has a key `talking`
(`architecture.TALKING`), which no published model has.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from pipeline.checkpoint.architecture import TALKING, Architecture, parse_architecture, read_architecture, read_config
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import sha256_of

VERSION = 1  # of the values: raise it when they change
BALLAST = 64  # channels at least: a block of a quantized matrix of their own
_SILENCE = 8192.0
_NEEDED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Index = np.ndarray
"""int64 [large]: which of the small model's rows or columns each of the large one's holds; -1: none."""


class Embedded:
    """One tensor's values in bfloat16, any range of rows, as those of `synthetic.Values`."""

    def __init__(
        self,
        small: Callable[[], np.ndarray],
        rows: Index,
        widen: Callable[[np.ndarray], np.ndarray],
        missing: np.ndarray | float = 0.0,
    ):
        """
        Args:
            small: the small model's rows, float32 [small rows, small columns].
            widen: float32 [n, small columns] to bfloat16 [n, columns].
            missing: the row [columns] where `rows` has none.
        """
        self.rows, self._small, self._widen, self._missing = rows, small, widen, missing

    @cached_property
    def _matrix(self) -> np.ndarray:
        return self._small()

    def make(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as uint16 [rows, columns], bits of bfloat16."""
        rows = self.rows[start:stop]
        wide = self._widen(self._matrix[rows])
        wide[rows < 0] = self._missing
        return wide.view(np.uint16)


class Talking:
    """The tensors, config.json and other files of a large model with a small one's function.

    Attributes:
        config: the large model's config.json, with the small one's theta, epsilon and special tokens, and the mark.
        layers: decoder layers that it needs in order to talk.
        mark: what the weights depend on, in words.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        """
        Args:
            folder: checkpoint and tokenizer of a model of family llama.
            config: the published config.json of the large model, cut or not.

        Raises:
            ConfigError: the small model does not fit into the large one, with every reason.
            CheckpointError: `folder` is not a checkpoint that the pipeline reads, or lacks a file that is copied.
        """
        self.folder, self._checkpoint = folder, Checkpoint(folder)
        self._small = small = read_architecture(folder / "config.json")
        self._wide = wide = parse_architecture(config, folder / "config.json")
        _refuse(small, wide)
        if missing := [name for name in _NEEDED if not (folder / name).exists()]:
            raise CheckpointError(f"{folder}: {', '.join(missing)} must be there, to be copied.")
        self.layers = small.layers
        self._copies = copies = (wide.hidden - BALLAST) // small.hidden
        covered = copies * small.hidden
        self._spare = spare = wide.hidden - covered
        squares = covered * small.epsilon  # what epsilon adds to the sum of squares: in part the ballast does now
        self._constant = 2.0 ** (math.ceil(math.log2(squares / spare) / 2) - 1)
        self._reading = math.sqrt(covered / wide.hidden)
        digests = [sha256_of(folder / file) for file in sorted({ref.file for ref in self._checkpoint.values()})]
        self.mark = f"{small.layers} layers of {small.hidden} channels, sha256 {' '.join(digests)}, version {VERSION}"
        own = read_config(folder / "config.json")
        self.config = config | {
            "rope_theta": _theta(small, wide),
            "rms_norm_eps": (squares - spare * self._constant**2) / wide.hidden,
            **{f"{name}_token_id": own.get(f"{name}_token_id") for name in ("bos", "eos", "pad")},
            TALKING: f"synthetic: the function of another model in these shapes; no measure of quality. {self.mark}",
        }
        self._reads, self._writes = _places(small, wide)

    def values(self, name: str, shape: tuple[int, ...]) -> Embedded | None:
        """A tensor of the large model; None for one that its function does not depend on."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return self._table(name)
        if name == "model.norm.weight":
            signs = np.repeat([1.0, -1.0], [self._spare - self._spare // 2, self._spare // 2])
            return self._vector(name, lambda gain: self._spread(gain * self._reading, signs))
        found = re.fullmatch(r"model\.layers\.(\d+)\.(?:.+\.)?(\w+)\.(weight|bias)", name)
        part, adds_zero = (found[2], int(found[1]) >= self.layers) if found else ("", True)
        if adds_zero and part not in self._writes:
            return None
        if adds_zero or name.endswith("bias"):
            rows = np.full(shape[0] if len(shape) == 2 else 1, -1)
            return Embedded(lambda: np.zeros((1, 1)), rows, lambda x: np.zeros((len(x), shape[-1]), bfloat16))
        if part.endswith("layernorm"):
            return self._vector(name, lambda gain: self._beside(np.tile(gain, self._copies), 1.0))
        return self._writer(name, part) if part in self._writes else self._reader(name, part)

    def copy_files(self, folder: Path) -> None:
        """Copy the tokenizer and the settings of generation."""
        for name in (*_NEEDED, "special_tokens_map.json"):
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)

    @property
    def licence(self) -> bytes:
        """The small model's licence text, or that there is none."""
        texts = sorted(self.folder.glob("LICEN[SC]E*"))
        return texts[0].read_bytes() if texts else b"The source of those weights ships no licence text.\n"

    def _read(self, name: str, factor: float = 1.0) -> np.ndarray:
        """A tensor of the rounded small model times `factor`, float32 [rows, columns]."""
        return np.atleast_2d(rounded(self._checkpoint.rows(name))) * np.float32(factor)

    def _beside(self, copies: np.ndarray, ballast: np.ndarray | float) -> np.ndarray:
        """[rows, n·h] and the ballast channels, in bfloat16."""
        filled = np.broadcast_to(np.asarray(ballast, bfloat16), (len(copies), self._spare))
        return np.concatenate([copies.astype(bfloat16, copy=False), filled], axis=1)

    def _spread(self, values: np.ndarray, ballast: np.ndarray | float = 0.0) -> np.ndarray:
        """Entries that a product sums over the copies: n - 1 equal ones, and what their rounding left."""
        times = self._copies - 1
        equal = (values / times).astype(bfloat16)
        rest = (values - times * equal.astype(np.float32)).astype(bfloat16)
        return self._beside(np.concatenate([np.tile(equal, times), rest], axis=1), ballast)

    def _vector(self, name: str, widen: Callable[[np.ndarray], np.ndarray]) -> Embedded:
        return Embedded(lambda: self._read(name), np.zeros(1, np.int64), widen)

    def _table(self, name: str) -> Embedded:
        """Embedding and head are one table, so that it serves tied models. What the ballast adds to a real id's logit
        is as often positive as negative; the rows after the real ones turn that round."""
        source = self._small.head.name if name == "lm_head.weight" else name
        rows = np.arange(self._wide.vocab)
        silent = np.zeros((1, self._wide.hidden), bfloat16)
        half = self._spare // 2
        silent[0, -2 * half :] = np.repeat([-1.0, 1.0], half) * _SILENCE / (2 * half * self._constant)
        return Embedded(
            lambda: self._read(source),
            np.where(rows < self._small.vocab, rows, -1),
            lambda x: self._beside(np.tile(x, self._copies), self._constant),
            silent,
        )

    def _reader(self, name: str, part: str) -> Embedded:
        parts = {name.replace(part, role): self._reads[role] for role in _PARTS.get(part, (part,))}
        starts = np.cumsum([0, *(self._checkpoint[role].shape[0] for role in parts)])
        placed = zip(parts.values(), starts[:-1], strict=True)
        rows = np.concatenate([np.where(rows < 0, -1, rows + start) for (rows, _), start in placed])

        def small() -> np.ndarray:
            return np.concatenate([self._read(role, self._reading * scale) for role, (_, scale) in parts.items()])

        return Embedded(small, rows, self._spread)

    def _writer(self, name: str, part: str) -> Embedded:
        columns = self._writes[part]
        rows = np.r_[np.tile(np.arange(self._small.hidden), self._copies), np.full(self._spare, -1)]
        shares = _shares(columns)
        return Embedded(lambda: self._read(name), rows, lambda x: (x.take(columns, 1) * shares).astype(bfloat16))


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 values that bfloat16 holds, to nearest, ties to even."""
    return values.astype(bfloat16).astype(np.float32)


def _refuse(small: Architecture, wide: Architecture) -> None:
    """Raise ConfigError, with every reason, unless the small model fits into the large one."""
    sizes = ("heads", "kv_heads", "head_dim", "intermediate", "vocab")
    short = [name for name in sizes if getattr(wide, name) < getattr(small, name)]
    wrong = [f"{name} {getattr(wide, name):,} is less than {getattr(small, name):,}" for name in short]
    if wide.hidden < 2 * small.hidden + BALLAST:
        wrong.append(f"hidden {wide.hidden:,} is less than 2 × {small.hidden:,} + {BALLAST}")
    if wide.heads // wide.kv_heads < small.heads // small.kv_heads:
        wrong.append("fewer heads share a key")
    if small.family != "llama" or small.rope.dims != small.head_dim or small.rope.short_factor:
        wrong.append(f"the small model is of family {small.family}, or not all its channels are rotated plainly")
    if wide.rope.dims < small.rope.dims or set(wide.rope.short_factor or ()) - {1.0}:
        wrong.append(f"{wide.rope.dims} rotated channels are fewer than {small.rope.dims}, or their factors not 1")
    if wide.tied and not small.tied:
        wrong.append("the large model's head is its embedding, the small one's is not")
    if wrong:
        raise ConfigError(f"the function does not fit into these shapes: {'; '.join(wrong)}. Name a smaller model.")


def _places(small: Architecture, wide: Architecture) -> tuple[dict[str, tuple[Index, float]], dict[str, Index]]:
    """Rows, and a factor, of the products that read the residual; columns of those that write to it."""
    rotated, repeated = _rotary(small, wide), np.arange(wide.head_dim) % small.head_dim
    repeated[wide.head_dim // small.head_dim * small.head_dim :] = -1
    slots, group, small_group = np.arange(wide.heads), wide.heads // wide.kv_heads, small.heads // small.kv_heads
    queries = slots // group % small.kv_heads * small_group + slots % group % small_group
    keys = np.arange(wide.kv_heads) % small.kv_heads
    neurons = np.arange(wide.intermediate) % small.intermediate
    root = math.sqrt(wide.head_dim / small.head_dim) / wide.rope.attention_factor**2
    reads = {
        "q_proj": (_channels(queries, rotated, small.head_dim), root),
        "k_proj": (_channels(keys, rotated, small.head_dim), 1.0),
        "v_proj": (_channels(keys, repeated, small.head_dim), 1.0),
        "gate_proj": (neurons, 1.0),
        "up_proj": (neurons, 1.0),
    }
    return reads, {"o_proj": _channels(queries, repeated, small.head_dim), "down_proj": neurons}


def _theta(small: Architecture, wide: Architecture) -> float:
    """Pair k·i of a large head turns as pair i of a small one: theta^(-k·i/P) = small theta^(-i/p)."""
    pairs, small_pairs = wide.rope.dims // 2, small.rope.dims // 2
    return small.rope.theta ** (pairs / (pairs // small_pairs * small_pairs))


def _rotary(small: Architecture, wide: Architecture) -> Index:
    """Channels of a head of queries or keys; channel i turns with channel i + dims/2."""
    pairs, small_pairs = wide.rope.dims // 2, small.rope.dims // 2
    index = np.full(wide.head_dim, -1)
    places = np.arange(small_pairs) * (pairs // small_pairs)
    index[places], index[pairs + places] = np.split(np.arange(2 * small_pairs), 2)
    return index


def _channels(heads: Index, channels: Index, size: int) -> Index:
    """Channels of all heads, from those of one, whose small counterpart has `size` of them."""
    return np.where(channels < 0, -1, heads[:, None] * size + channels).reshape(-1)


def _shares(index: Index) -> np.ndarray:
    """float32 powers of two, 0 where `index` is -1, whose sum over the copies of each channel is 1."""
    order, seen = np.zeros_like(index), np.zeros(index.max() + 1, np.int64)
    for place, channel in enumerate(index):
        if channel >= 0:
            order[place] = seen[channel]
            seen[channel] += 1
    count = seen[index]
    whole = 1 << np.log2(count).astype(np.int64)  # so many shares; the rest come from halving some of them
    shares = np.where(order < 2 * (count - whole), 0.5 / whole, 1.0 / whole)
    return np.where(index < 0, 0, shares).astype(np.float32)
