"""Divergence from the reference: KL divergence, top-1 agreement and log-likelihood per token of held-out text.

The reference's log-probabilities are computed once and shared by all variants, in 2 bytes each: 65,536 steps over a
window of 24 nats below the certain event, renormalised on reading. What that loses is measured while it is written:
KL(softmax ‖ codes) of every token, and the probability of what lies below the window. For SmolLM2 in q4 (3,000 tokens,
mean KL 0.142) it moves the mean by 2e-7 nats, the 99th percentile by 6e-5 of itself and one token by 2e-4 nats at most.
The top token and the log-probability of the true next token are kept exactly.

Every window is an item of a journal, recorded when its codes are on the disk: an interrupted measurement goes on there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from pipeline.compiled import compiled
from pipeline.engine import Engine, Here
from pipeline.errors import EvaluationError
from pipeline.files import atomic_file
from pipeline.journal import Journal
from pipeline.tasks.subject import Keep, fill

WINDOW_NATS = 24.0
_CODES = "codes"  # in an item until they are in a file
ITEMS = "windows.jsonl"
_AGAIN = "They belong to different text or models: measure the reference again."
_STEP = WINDOW_NATS / 65535
_WEIGHTS = np.exp(-_STEP * np.arange(65536))  # probability of each code, before normalisation

Logits = Callable[[np.ndarray], np.ndarray]  # int64 [n] → float32 [n, vocab]
Prepare = Callable[[Sequence[np.ndarray]], object]
Item = dict[str, Any]
Own = Callable[[str, np.ndarray, np.ndarray], Item]
Scores = dict[str, np.ndarray]
"""Per scored token, [tokens]: `window_id` and `top` (the most likely token) int64; in nats, float64, `logprob` of the
true token and `kl` from the reference. The reference has in place of `kl` what its codes lose: `codes_kl` (nats), and
`clipped`, the probability of what lies below the window."""


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
def encode(logits: np.ndarray, normalisers: np.ndarray, weights: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Fill uint16 `codes` [n, vocab] with log-probabilities; those below the window are clipped to its edge.

    Returns what that loses, float64 [2, n]: KL(softmax ‖ what `kl_divergence` makes of the codes) in nats, and the
    probability that lies below the window. `weights` as there.
    """
    lost = np.empty((2, len(logits)))
    for row in numba.prange(len(logits)):
        total = 0.0
        gap = 0.0
        clipped = 0.0
        for column in range(logits.shape[1]):
            nats = normalisers[row] - logits[row, column]
            code = np.uint16(np.rint(min(max(nats, 0.0), WINDOW_NATS) / _STEP))
            codes[row, column] = code
            total += weights[code]
            gap += np.exp(-nats) * (_STEP * code - nats)
            if nats > WINDOW_NATS:
                clipped += np.exp(-nats)
        lost[0, row] = gap + np.log(total)
        lost[1, row] = clipped
    return lost


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


def record_reference(
    logits: Logits, windows: Sequence[np.ndarray], folder: Path, engine: Engine | None = None,
    prepare: Prepare | None = None,
) -> Scores:  # fmt: skip
    """Score the reference and keep its log-probabilities in `folder`, window by window.

    Args:
        engine: as in `fill`.
        prepare: of a model that runs layer by layer: is shown a unit's texts before `logits` are asked for.
    """

    def keep(window: str, item: Item) -> Item:
        with atomic_file(folder / _codes_file(window)) as file:
            np.save(file, item.pop(_CODES))
        return item

    return _score(logits, windows, folder, "reference", _coded, engine, keep, prepare)


def compare(
    logits: Logits, windows: Sequence[np.ndarray], reference: Path, folder: Path, model: str,
    engine: Engine | None = None,
) -> Scores:  # fmt: skip
    """Score a variant on the reference's windows, and keep the scores in `folder`, window by window.

    Raises EvaluationError when the windows or the vocabulary are not those of the recorded reference.
    """
    tokens, known = sum(len(ids) - 1 for ids in windows), len(read_scores(reference)["top"])
    if tokens != known:
        raise EvaluationError(f"{model}: {tokens} tokens to score, the reference has {known}. {_AGAIN}")

    return _score(logits, windows, folder, model, partial(_compared, reference, model), engine)


def _coded(window: str, values: np.ndarray, normalisers: np.ndarray) -> Item:
    del window
    codes = np.empty(values.shape, np.uint16)
    lost, clipped = encode(values, normalisers, _WEIGHTS, codes)
    return {"codes_kl": lost.tolist(), "clipped": clipped.tolist(), _CODES: codes}


def _compared(reference: Path, model: str, window: str, values: np.ndarray, normalisers: np.ndarray) -> Item:
    codes = np.load(reference / _codes_file(window), mmap_mode="r", allow_pickle=False)
    if codes.shape != values.shape:
        raise EvaluationError(
            f"{model}: {values.shape[1]} logits of each of {len(values)} tokens in window {window}, the reference "
            f"has {codes.shape[1]} of {len(codes)}. {_AGAIN}"
        )
    return {"kl": kl_divergence(codes, _WEIGHTS, values, normalisers).tolist()}


def read_scores(folder: Path) -> Scores:
    """What `record_reference` or `compare` kept."""
    journal = Journal(folder / ITEMS)
    items = [journal.items[str(number)] for number in range(len(journal.items))]
    columns = {name: np.concatenate([np.asarray(item[name]) for item in items]) for name in items[0]}
    return columns | {"window_id": np.repeat(np.arange(len(items)), [len(item["top"]) for item in items])}


def _codes_file(window: str) -> str:
    """uint16 [tokens, vocab] of a window."""
    return f"codes.{window}.npy"


def _score(
    logits: Logits, windows: Sequence[np.ndarray], folder: Path, model: str, own: Own, engine: Engine | None,
    keep: Keep | None = None, prepare: Prepare | None = None,
) -> Scores:  # fmt: skip
    """Record what is known of any model, and what `own` makes of (window, logits float32 [n, vocab], normalisers).
    Raises EvaluationError for NaN and infinity."""
    names = [str(number) for number in range(len(windows))]
    items, layered = partial(_items, logits, windows, model, own, prepare), prepare is not None
    fill(Journal(folder / ITEMS), names, f"divergence {model}", "windows", items, engine or Here(), keep, layered)
    return read_scores(folder)


def _items(
    logits: Logits, windows: Sequence[np.ndarray], model: str, own: Own, prepare: Prepare | None, left: Sequence[str]
) -> Iterator[Item]:
    if prepare:
        prepare([windows[int(window)][:-1] for window in left])
    for window in left:
        ids = windows[int(window)]
        values = logits(ids[:-1])
        if not np.isfinite(values).all():
            raise EvaluationError(f"{model}: logits of the held-out text contain NaN or infinity; the file is broken.")
        normalisers = log_normalisers(values)
        logprob = values[np.arange(len(values)), ids[1:]] - normalisers
        known = {"top": values.argmax(axis=1).tolist(), "logprob": logprob.tolist()}
        yield known | own(window, values, normalisers)
