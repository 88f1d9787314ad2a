"""Greedy texts with and without drafts, and how far a pass over several tokens rounds otherwise than one token's.

Drafts are judged by the model itself, so they change no text but where two tokens lie nearer to each other than such a
pass rounds: kernels of quantized products round one row otherwise than several.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

from pipeline.runtime.generate import GREEDY, load
from pipeline.runtime.session import OnnxDecoder


@dataclass(frozen=True)
class Greedy:
    """A greedy text: its `ids` without the prompt's and without an end-of-text token, the `seconds` that writing them
    took, and the drafted tokens that were looked at and accepted."""

    ids: tuple[int, ...]
    seconds: float
    evaluated: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second, the end-of-text token not counted."""
        return len(self.ids) / self.seconds


class Greedily:
    """A folder's model under settings of `pipeline.graph.speculative`: `ngram` or `mtp` → what is laid over
    genai_config.json. Without any it decodes plainly.

    Raises as `generate.load`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None):
        self._head: genai.Model | None = None
        if settings and (both := settings.get("mtp")):
            self._model, self._head = (load(folder, both[name]) for name in ("decoder", "head"))
        else:
            self._model = load(folder, (settings or {}).get("ngram"))

    def write(self, prompt: Sequence[int], new: int, stops: Iterable[int] = ()) -> Greedy:
        """At most `new` tokens after a prompt's ids."""
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt) + new, **GREEDY)
        if self._head:
            generator = genai.MtpGenerator(self._model, self._head, params)
        else:
            generator = genai.Generator(self._model, params)
        generator.append_tokens(np.asarray(prompt, np.int32))
        start = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        sequence = generator.get_sequence() if self._head else generator.get_sequence(0)
        stats = generator.get_stats() if self._head else generator.get_speculative_stats() or {}
        ids = [int(token) for token in sequence[len(prompt) :]]
        ended = set(stops)
        while ids and ids[-1] in ended:
            ids.pop()
        drafts = (int(stats.get(f"draft_tokens_{what}", 0)) for what in ("evaluated", "accepted"))
        return Greedy(tuple(ids), seconds, *drafts)


@dataclass(frozen=True)
class Rounding:
    """What passes over several tokens of a greedy text tell otherwise than passes over one.

    Attributes:
        kl: KL divergence of each token's distribution from that of a pass over it alone, float64 nats.
        moved: by how much the distance of the two likeliest tokens differs, float64 nats, by token.
        alone: log-probabilities in passes over one token, float32 [tokens, vocab].
    """

    kl: np.ndarray
    moved: np.ndarray
    alone: np.ndarray

    def margin(self, place: int, first: int, second: int) -> float:
        """By how many nats token `first` is likelier than `second` at a place of the text."""
        return float(self.alone[place, first] - self.alone[place, second])


def rounding(decoder: OnnxDecoder, prompt: Sequence[int], text: Sequence[int], rows: int) -> Rounding:
    """Read `text`, at least one token's ids, after `prompt` one token at a time, and `rows` at a time."""

    def read(step: int) -> np.ndarray:
        logits, state = decoder.run(prompt)
        found = [logits[-1:]]
        for start in range(0, len(text) - 1, step):
            logits, state = decoder.run(text[start : min(start + step, len(text) - 1)], state)
            found.append(logits)
        return _log_softmax(np.concatenate(found))

    alone, together = read(1), read(rows)
    likeliest = np.argsort(alone, axis=1)[:, -2:]
    distance = [np.diff(np.take_along_axis(values, likeliest, 1))[:, 0] for values in (alone, together)]
    kl = (np.exp(alone) * (alone - together)).sum(axis=1, dtype=np.float64)
    return Rounding(kl, np.abs(distance[0] - distance[1]).astype(np.float64), alone)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two texts have different tokens; None where one is the other's beginning."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    below = logits.astype(np.float32) - logits.max(axis=1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=1, keepdims=True))
