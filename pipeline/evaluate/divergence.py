"""Divergence from the reference: KL divergence, top-1 agreement and log-likelihood per token of held-out text.

The reference's log-probabilities are computed once and shared by all variants, in 2 bytes each: 65,536 steps over a
window of 24 nats below the certain event. Renormalised on reading, that costs about 1e-4 of a KL divergence
(`quantization_loss` measures it on the data at hand); the reference's top token and the log-probability of the true
next token are kept exactly beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import EvaluationError
from pipeline.progress import track

WINDOW_NATS = 24.0
_STEP = WINDOW_NATS / 65535
_LOGPROBS, _TOKENS = "logprobs.npy", "tokens.npz"

Logits = Callable[[np.ndarray], np.ndarray]  # int64 [n] → float32 [n, vocab]


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, [tokens]: its window, the top prediction and the log-probability of the true token (nats)."""

    window_id: np.ndarray
    top: np.ndarray
    logprob: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise, float32 [n, vocab], in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def encode(logprobs: np.ndarray) -> np.ndarray:
    """uint16 codes of log-probabilities; below the window they are clipped to its edge."""
    return np.rint(np.minimum(-logprobs, WINDOW_NATS) / _STEP).astype(np.uint16)


def decode(codes: np.ndarray) -> np.ndarray:
    """Normalised float32 log-probabilities of `encode`'s codes."""
    return log_softmax(codes.astype(np.float32) * np.float32(-_STEP))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) per row of two float32 [n, vocab] arrays of log-probabilities: float64 [n], nats."""
    return np.einsum("ij,ij->i", np.exp(reference), reference - other, dtype=np.float64)


def _score(logits: Logits, windows: Sequence[np.ndarray], model: str) -> Iterable[tuple[np.ndarray, ...]]:
    """Per window: (log-probabilities [n, vocab], top tokens [n], true tokens' log-probabilities [n])."""
    for ids in track(windows, f"divergence {model}", len(windows)):
        values = logits(ids[:-1])
        if not np.isfinite(values).all():
            raise EvaluationError(f"{model}: logits of the held-out text contain NaN or infinity; the file is broken.")
        logprobs = log_softmax(values)
        yield logprobs, logprobs.argmax(axis=1), logprobs[np.arange(len(ids) - 1), ids[1:]]


def _window_ids(windows: Sequence[np.ndarray]) -> np.ndarray:
    return np.repeat(np.arange(len(windows)), [len(ids) - 1 for ids in windows])


def record_reference(logits: Logits, windows: Sequence[np.ndarray], vocab: int, folder: Path) -> TokenScores:
    """Score the reference and keep its log-probabilities in `folder`, streamed window by window."""
    window_id = _window_ids(windows)
    codes = np.lib.format.open_memmap(folder / _LOGPROBS, "w+", np.uint16, (len(window_id), vocab))
    tops, targets, done = [], [], 0
    for logprobs, top, target in _score(logits, windows, "reference"):
        codes[done : done + len(top)] = encode(logprobs)
        done += len(top)
        tops.append(top)
        targets.append(target)
    codes.flush()
    scores = TokenScores(window_id, np.concatenate(tops), np.concatenate(targets))
    np.savez(folder / _TOKENS, window_id=scores.window_id, top=scores.top, logprob=scores.logprob)
    return scores


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
    window_id = _window_ids(windows)
    if len(codes) != len(window_id):
        raise EvaluationError(f"{model}: {len(window_id)} tokens to score, the reference has {len(codes)}.")
    tops, targets, divergences, done = [], [], [], 0
    for logprobs, top, target in _score(logits, windows, model):
        if logprobs.shape[1] != codes.shape[1]:
            raise EvaluationError(f"{model}: {logprobs.shape[1]} logits per token, the reference has {codes.shape[1]}.")
        divergences.append(kl_divergence(decode(codes[done : done + len(top)]), logprobs))
        done += len(top)
        tops.append(top)
        targets.append(target)
    return TokenScores(window_id, np.concatenate(tops), np.concatenate(targets)), np.concatenate(divergences)
