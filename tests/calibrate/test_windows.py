"""Token windows and the contamination measure."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibrate.windows import overlap, scored_windows
from pipeline.errors import EvaluationError


def encode(text: str) -> list[int]:
    """Word i of the text is token i, so that a window shows where it was cut."""
    return list(range(len(text.split())))


def text_of(words: int) -> str:
    return "w " * words


@given(tokens=st.integers(1, 200), window=st.integers(2, 50), slack=st.integers(0, 300))
def test_scored_windows_cover_exactly_the_tokens_asked_for(tokens: int, window: int, slack: int) -> None:
    count = -(-tokens // (window - 1))
    windows = scored_windows(text_of(tokens + count + slack), encode, tokens, window)
    assert sum(len(ids) - 1 for ids in windows) == tokens
    assert [len(ids) for ids in windows[:-1]] == [window] * (count - 1)
    assert all(ids.dtype == np.int64 and 2 <= len(ids) <= window for ids in windows)
    joined = np.concatenate(windows)
    assert (np.diff(joined) >= 1).all(), "windows overlap or run backwards"
    assert all((np.diff(ids) == 1).all() for ids in windows), "a window is not contiguous"


def test_windows_reach_from_the_first_to_the_last_token_at_even_distances() -> None:
    windows = scored_windows(text_of(1000), encode, tokens=36, window=10)
    assert [int(ids[0]) for ids in windows] == [0, 330, 660, 990]
    assert windows[-1][-1] == 999


def test_the_last_window_is_the_short_one() -> None:
    assert [len(ids) for ids in scored_windows(text_of(100), encode, tokens=20, window=10)] == [10, 10, 3]
    assert [len(ids) for ids in scored_windows(text_of(100), encode, 25, window=10, unscored=0)] == [10, 10, 5]


def test_a_text_one_token_too_short_is_refused_with_the_numbers() -> None:
    assert len(scored_windows(text_of(20), encode, tokens=18, window=10)) == 2
    with pytest.raises(EvaluationError, match="has 19 tokens; 2 windows need 20"):
        scored_windows(text_of(19), encode, tokens=18, window=10)


@pytest.mark.parametrize(("tokens", "window"), [(0, 10), (-5, 10), (5, 1)])
def test_meaningless_requests_are_refused(tokens: int, window: int) -> None:
    with pytest.raises(EvaluationError, match="must be positive"):
        scored_windows(text_of(100), encode, tokens, window)


def naive_overlap(a: list[str], b: list[str], n: int) -> int:
    def grams(texts: list[str]) -> set[tuple[str, ...]]:
        split = [text.lower().split() for text in texts]
        return {tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)}

    return len(grams(a) & grams(b))


def test_overlap_counts_distinct_shared_ngrams_like_a_set_of_tuples() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choice("ab") for _ in range(40)) for _ in range(12)]
    for n in (2, 5, 8):
        expected = naive_overlap(texts[:6], texts[6:], n)
        assert expected > 0
        assert overlap(texts[:6], texts[6:], n) == expected


def test_overlap_sees_one_planted_passage_through_case_and_punctuation() -> None:
    planted = "the quick brown fox jumps over the lazy dog near a quiet river"
    a = ["some words before, " + planted + ", some words after"]
    b = ["Elsewhere — " + planted.title().replace(" ", ", ")]
    assert overlap(a, b) == 1
    assert overlap(a, [planted.replace("river", "lake")]) == 0
    assert overlap(a, [" ".join(reversed(planted.split()))]) == 0


def test_ngrams_do_not_cross_texts_and_short_texts_have_none() -> None:
    whole = " ".join(f"w{i}" for i in range(13))
    assert overlap([whole], [whole]) == 1
    assert overlap([whole], [whole[:20], whole[20:]]) == 0
    assert overlap([], [whole]) == 0
