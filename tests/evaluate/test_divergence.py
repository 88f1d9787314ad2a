from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from pipeline.errors import EvaluationError
from pipeline.evaluate import divergence

VOCAB = 300
RNG = np.random.default_rng(0)
WINDOWS = [RNG.integers(0, VOCAB, length) for length in (12, 12, 7)]
TOKENS = sum(len(ids) - 1 for ids in WINDOWS)


def model(seed: int, noise: float = 0.0):
    """A model whose logits are a fixed function of the token, plus noise of its own."""
    table = 3 * np.random.default_rng(99).standard_normal((VOCAB, VOCAB))
    table += noise * np.random.default_rng(seed).standard_normal((VOCAB, VOCAB))
    return lambda ids: table[ids].astype(np.float32)


def rows(logits) -> np.ndarray:
    return np.concatenate([logits(ids[:-1]) for ids in WINDOWS]).astype(np.float64)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    divergence.record_reference(model(0), WINDOWS, VOCAB, tmp_path)
    return tmp_path


def test_kl_equals_its_definition(reference: Path) -> None:
    other = model(1, noise=0.5)
    _, kl = divergence.compare(other, WINDOWS, reference, "x")
    want = rel_entr(softmax(rows(model(0)), axis=1), softmax(rows(other), axis=1)).sum(axis=1)
    np.testing.assert_allclose(kl, want, rtol=2e-3, atol=1e-6)
    assert abs(kl.mean() / want.mean() - 1) < 1e-4, "what 2 bytes per log-probability may cost"


def test_a_model_does_not_diverge_from_itself(reference: Path) -> None:
    scores, kl = divergence.compare(model(0), WINDOWS, reference, "x")
    own = divergence.read_reference(reference)
    assert np.abs(kl).max() < 1e-6
    np.testing.assert_array_equal(scores.top, own.top)
    np.testing.assert_array_equal(scores.logprob, own.logprob)


def test_true_tokens_are_scored_given_those_before_them(reference: Path) -> None:
    own = divergence.read_reference(reference)
    targets = np.concatenate([ids[1:] for ids in WINDOWS])
    want = log_softmax(rows(model(0)), axis=1)[np.arange(TOKENS), targets]
    np.testing.assert_allclose(own.logprob, want, atol=1e-5)
    np.testing.assert_array_equal(own.top, rows(model(0)).argmax(axis=1))
    np.testing.assert_array_equal(own.window_id, np.repeat([0, 1, 2], [11, 11, 6]))


def test_tokens_beyond_the_window_are_clipped_not_wrapped(tmp_path: Path) -> None:
    """A log-probability of −200 must not come back as a likely one through an overflow of 16 bits."""

    def sure(ids: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(ids), VOCAB), np.float32)
        logits[:, 5] = 200
        return logits

    divergence.record_reference(sure, WINDOWS, VOCAB, tmp_path)
    _, kl = divergence.compare(sure, WINDOWS, tmp_path, "x")
    # 299 tokens at the edge of the window weigh 299·e⁻²⁴; each counts 200 − 24 nats too much.
    assert np.abs(kl).max() < 299 * np.exp(-24) * 200


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error_not_a_score(reference: Path, bad: float) -> None:
    def broken(ids: np.ndarray) -> np.ndarray:
        logits = model(0)(ids)
        logits[-1, 3] = bad
        return logits

    with pytest.raises(EvaluationError, match="NaN or infinity"):
        divergence.compare(broken, WINDOWS, reference, "x")


def test_other_text_or_vocabulary_is_refused(reference: Path) -> None:
    with pytest.raises(EvaluationError, match=f"11 tokens to score, the reference has {TOKENS}"):
        divergence.compare(model(0), WINDOWS[:1], reference, "x")
    with pytest.raises(EvaluationError, match=f"299 logits per token, the reference has {VOCAB}"):
        divergence.compare(lambda ids: model(0)(ids)[:, 1:], WINDOWS, reference, "x")
