"""Text into token windows for measuring and for calibrating, and the proof that the two share nothing.

Windows do not overlap and are spread evenly over the whole text, because its head (one article, one file) is not a
sample of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from pipeline.errors import EvaluationError

Encode = Callable[[str], Sequence[int]]

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so no word's contribution is lost modulo 2^64


def scored_windows(text: str, encode: Encode, tokens: int, window: int, unscored: int = 1) -> list[np.ndarray]:
    """Windows with exactly `tokens` scored positions in total, at even distances from the first token to the last.

    A window of w tokens scores w − 1 positions: each token but the first, given those before it. For calibration, where
    every position counts, none is `unscored`. All windows hold `window` tokens but the last, which is shortened to what
    is left.

    Returns: int64 arrays [window], the last [1 + unscored … window].
    Raises:
        EvaluationError: the text is too short.
    """
    each = window - unscored
    if tokens < 1 or each < 1:
        raise EvaluationError(
            f"{tokens} tokens in windows that count {each} positions each were asked for; both must be positive."
        )
    full, rest = divmod(tokens, each)
    lengths = [window] * full + ([rest + unscored] if rest else [])
    ids = np.asarray(encode(text), dtype=np.int64)
    if len(ids) < sum(lengths):
        raise EvaluationError(
            f"the text has {len(ids):,} tokens; {len(lengths)} windows need {sum(lengths):,}. "
            "Ask for fewer tokens, or give a longer text."
        )
    last = len(ids) - lengths[-1]
    # The distance last / (count − 1) is at least a window, because the lengths sum to no more than the text.
    starts = [index * last // max(len(lengths) - 1, 1) for index in range(len(lengths))]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def overlap(a_texts: Iterable[str], b_texts: Iterable[str], n: int = 13) -> int:
    """Number of distinct word n-grams that occur in both collections (GPT-3's contamination measure, n = 13).

    Words are runs of letters, digits and underscores, lower-cased; n-grams do not cross texts, and a text of fewer
    than n words has none. N-grams are compared by 64-bit hash: the chance of a false match is about |a|·|b| / 2^64.
    """
    return len(np.intersect1d(_ngrams(a_texts, n), _ngrams(b_texts, n)))


def _ngrams(texts: Iterable[str], n: int) -> np.ndarray:
    """uint64 [distinct n-grams], sorted: Σ hash(wordᵢ)·mⁱ modulo 2^64 over n neighbouring words."""
    found, hashes = [np.empty(0, np.uint64)], cache(_word_hash)
    powers = _MULTIPLIER ** np.arange(n, dtype=np.uint64)
    for text in texts:
        words = np.array([hashes(word) for word in _WORD.findall(text.lower())], dtype=np.uint64)
        if len(words) >= n:
            found.append(np.unique(np.lib.stride_tricks.sliding_window_view(words, n) @ powers))
    return np.unique(np.concatenate(found))


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
