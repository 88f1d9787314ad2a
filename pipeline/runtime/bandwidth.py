"""How fast this machine's memory is read, measured on a working set of the size in question."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.compiled import compiled
from pipeline.errors import EvaluationError

LARGEST_WORKING_SET = 1 << 30
"""Bytes; far beyond any cache, so a larger model is read no slower."""


@compiled(nogil=True)
def _sum(words: np.ndarray, rounds: int) -> np.uint64:
    """Sum of uint64 words, `rounds` times: the least work that still reads every byte; vectorised by the compiler."""
    total = np.uint64(0)
    for _ in range(rounds):
        for index in range(words.size):
            total += words[index]
    return total


def memory_bandwidth(threads: int, working_set: int = LARGEST_WORKING_SET, repeats: int = 5) -> float:
    """Bytes per second that `threads` threads read together from an array of `working_set` bytes; the best of several.

    Below about twice the largest cache this is the cache's rate, not the memory's: the right one for a model that
    small.
    """
    words = np.ones(max(working_set // 8, threads), np.uint64)  # written, so that every page is real memory
    parts = np.array_split(words, threads)
    _sum(words[:8], 1)  # compiled before the clock starts
    # A small array is read many times per look at the clock, so that starting threads does not count; but each look
    # takes milliseconds, so that some of the many fall between what other programs do.
    rounds = max(1, (1 << 27) // words.nbytes)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats * max(1, LARGEST_WORKING_SET // (rounds * words.nbytes))):
            start = time.perf_counter()
            total = sum(int(part) for part in pool.map(_sum, parts, [rounds] * threads))
            best = min(best, time.perf_counter() - start)
            if total != rounds * words.size:
                raise EvaluationError(f"{words.nbytes:,} bytes of ones summed to {total:,}: faulty memory?")
    return rounds * words.nbytes / best
