"""Teacher-forced agreement: what a model makes of each token that the reference wrote.

pass@1 moves only when a whole solution breaks. Here the reference's own solutions are read token by token: whether the
model would have written the same one next, and with which probability. A variant that agrees everywhere writes the same
solutions; every place where it does not is a place where it may leave the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.errors import EvaluationError
from pipeline.tasks.divergence_scores import log_normalisers

_CHUNK = 256  # tokens at a time: logits of a long text would take gigabytes


class Decoder(Protocol):
    """Logits, float32 [len(ids), vocab], of `ids` after the state `past`, and the state after them."""

    def run(self, ids: Sequence[int], past: Any = None) -> tuple[np.ndarray, Any]: ...


@dataclass(frozen=True)
class Forced:
    """Per token of a text: the model's most likely one, int64; the log-probability of the text's, float64 nats."""

    top: np.ndarray
    logprob: np.ndarray


def ask(decoder: Decoder, prompt: Sequence[int], text: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Run `text` after `prompt`: in each chunk of both the number of its first token, and its logits."""
    ids, state = [*prompt, *text][:-1], None
    for start in range(0, len(ids), _CHUNK):
        logits, state = decoder.run(ids[start : start + _CHUNK], state)
        yield start, logits


def force(decoder: Decoder, prompt: Sequence[int], text: Sequence[int]) -> Forced:
    """Read `text` after `prompt`, both token ids, at least one each.

    Raises:
        EvaluationError: a token is outside the model's vocabulary, or a logit is NaN or infinite.
    """
    ids, first = np.array([*prompt, *text], np.int64), len(prompt) - 1  # the row that tells the text's first token
    top, logprob = [], []
    for start, rows in ask(decoder, prompt, text):
        logits = rows[max(0, first - start) :]
        end = start + len(rows) + 1
        targets = ids[end - len(logits) : end]
        _check(logits, targets)
        top.append(logits.argmax(axis=1))
        logprob.append(logits[np.arange(len(targets)), targets] - log_normalisers(logits))
    return Forced(np.concatenate(top), np.concatenate(logprob))


def _check(logits: np.ndarray, targets: np.ndarray) -> None:
    vocab = logits.shape[1]
    if len(targets) and not 0 <= targets.min() <= targets.max() < vocab:
        raise EvaluationError(
            f"the reference's solutions hold token id {targets.max():,}, the model has {vocab:,} logits: they are not "
            f"of the same model. Measure the reference again."
        )
    if not np.isfinite(logits).all():
        raise EvaluationError("logits of the reference's solutions contain NaN or infinity; the file is broken.")
