"""Divergence from the reference: KL divergence, top-1 agreement and log-likelihood per token of held-out text.

The reference's log-probabilities are computed once and shared by all variants, in 2 bytes each: 65,536 steps over a
window of 24 nats below the certain event, renormalised on reading. That costs about 1e-4 of a KL divergence. The
reference's top token and the log-probability of the true next token are kept exactly beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from pipeline.compiled import compiled
from pipeline.errors import EvaluationError
from pipeline.progress import track

WINDOW_NATS = 24.0
_STEP = WINDOW_NATS / 65535
_WEIGHTS = np.exp(-_STEP * np.arange(65536))  # probability of each code, before normalisation
_LOGPROBS, _TOKENS = "logprobs.npy", "tokens.npz"

Logits = Callable[[np.ndarray], np.ndarray]  # int64 [n] → float32 [n, vocab]


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, [tokens]: its window, the top prediction and the log-probability of the true token (nats)."""

    window_id: np.ndarray
    top: np.ndarray
    logprob: np.ndarray


@compiled(parallel=True)
def log_normalisers(logits: np.ndarray) -> np.ndarray:
    """log Σ exp of each row of float32 [n, vocab], summed in float64: float64 [n]."""
    result = np.empty(len(logits))
    for row in numba.prange(len(logits)):
        top = np.float64(logits[row].max())
        total = 0.0
        for column in range(logits.shape[1]):
            total += np.exp(logits[row, column] - top)
        result[row] = top + np.log(total)
    return result


@compiled(parallel=True)
def encode(logits: np.ndarray, normalisers: np.ndarray, codes: np.ndarray) -> None:
    """Fill uint16 codes [n, vocab] with log-probabilities; below the window they are clipped to its edge."""
    for row in numba.prange(len(logits)):
        for column in range(logits.shape[1]):
            nats = normalisers[row] - logits[row, column]
            codes[row, column] = np.uint16(np.rint(min(max(nats, 0.0), WINDOW_NATS) / _STEP))


@compiled(parallel=True)
def kl_divergence(codes: np.ndarray, weights: np.ndarray, logits: np.ndarray, normalisers: np.ndarray) -> np.ndarray:
    """KL(reference ‖ model) per row, float64 [n], nats.

    `codes` are the reference's, uint16 [n, vocab], `weights` the probability of each code before normalisation;
    `logits` float32 [n, vocab] and their `normalisers` are the model's.
    """
    result = np.empty(len(codes))
    for row in numba.prange(len(codes)):
        total = 0.0
        gap = 0.0
        for column in range(codes.shape[1]):
            code = codes[row, column]
            total += weights[code]
            gap += weights[code] * (-_STEP * code - (logits[row, column] - normalisers[row]))
        result[row] = gap / total - np.log(total)
    return result


def _windows(logits: Logits, windows: Sequence[np.ndarray], model: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(true next tokens int64 [n], logits float32 [n, vocab]) of each window. Raises EvaluationError for NaN, inf."""
    for ids in track(windows, f"divergence {model}", len(windows)):
        values = logits(ids[:-1])
        if not np.isfinite(values).all():
            raise EvaluationError(f"{model}: logits of the held-out text contain NaN or infinity; the file is broken.")
        yield ids[1:], values


def _window_ids(windows: Sequence[np.ndarray]) -> np.ndarray:
    return np.repeat(np.arange(len(windows)), [len(ids) - 1 for ids in windows])


class _Scores:
    """Collects token scores window by window."""

    def __init__(self, windows: Sequence[np.ndarray]):
        self.window_id = _window_ids(windows)
        self.top = np.empty(len(self.window_id), np.int64)
        self.logprob = np.empty(len(self.window_id))
        self.done = 0

    def add(self, targets: np.ndarray, logits: np.ndarray, normalisers: np.ndarray) -> slice:
        """Score the next tokens; returns where they stand among all."""
        here = slice(self.done, self.done + len(targets))
        self.top[here] = logits.argmax(axis=1)
        self.logprob[here] = logits[np.arange(len(targets)), targets] - normalisers
        self.done = here.stop
        return here

    def finished(self) -> TokenScores:
        return TokenScores(self.window_id, self.top, self.logprob)


def record_reference(logits: Logits, windows: Sequence[np.ndarray], vocab: int, folder: Path) -> TokenScores:
    """Score the reference and keep its log-probabilities in `folder`, streamed window by window."""
    scores = _Scores(windows)
    codes = np.lib.format.open_memmap(folder / _LOGPROBS, "w+", np.uint16, (len(scores.window_id), vocab))
    for targets, values in _windows(logits, windows, "reference"):
        normalisers = log_normalisers(values)
        encode(values, normalisers, codes[scores.add(targets, values, normalisers)])
    codes.flush()
    kept = scores.finished()
    np.savez(folder / _TOKENS, window_id=kept.window_id, top=kept.top, logprob=kept.logprob)
    return kept


def read_reference(folder: Path) -> TokenScores:
    """The scores that `record_reference` kept."""
    with np.load(folder / _TOKENS, allow_pickle=False) as data:
        return TokenScores(data["window_id"], data["top"], data["logprob"])


def compare(
    logits: Logits, windows: Sequence[np.ndarray], reference: Path, model: str
) -> tuple[TokenScores, np.ndarray]:
    """Score a variant on the reference's windows: its token scores, and its KL divergence, float64 [tokens].

    Raises EvaluationError when the windows or the vocabulary are not those of the recorded reference.
    """
    codes = np.load(reference / _LOGPROBS, mmap_mode="r", allow_pickle=False)
    scores = _Scores(windows)
    if len(codes) != len(scores.window_id):
        raise EvaluationError(
            f"{model}: {len(scores.window_id)} tokens to score, the reference has {len(codes)}. Measure it again."
        )
    kl = np.empty(len(codes))
    for targets, values in _windows(logits, windows, model):
        if values.shape[1] != codes.shape[1]:
            raise EvaluationError(f"{model}: {values.shape[1]} logits per token, the reference has {codes.shape[1]}.")
        normalisers = log_normalisers(values)
        here = scores.add(targets, values, normalisers)
        kl[here] = kl_divergence(codes[here], _WEIGHTS, values, normalisers)
    return scores.finished(), kl
