from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from pipeline.errors import EvaluationError
from pipeline.tasks import divergence_scores as divergence

VOCAB = 300
RNG = np.random.default_rng(0)
WINDOWS = [RNG.integers(0, VOCAB, length) for length in (12, 12, 7)]
TOKENS = sum(len(ids) - 1 for ids in WINDOWS)
Logits = Callable[[np.ndarray], np.ndarray]


def model(seed: int, noise: float = 0.0) -> Logits:
    """A model whose logits are a fixed function of the token, plus noise of its own."""
    table = 3 * np.random.default_rng(99).standard_normal((VOCAB, VOCAB))
    table += noise * np.random.default_rng(seed).standard_normal((VOCAB, VOCAB))
    return lambda ids: table[ids].astype(np.float32)


def rows(logits: Logits) -> np.ndarray:
    return np.concatenate([logits(ids[:-1]) for ids in WINDOWS]).astype(np.float64)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "reference"
    folder.mkdir()
    divergence.record_reference(model(0), WINDOWS, folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For a variant's items."""
    (tmp_path / "variant").mkdir()
    return tmp_path / "variant"


def test_kl_equals_its_definition(reference: Path, folder: Path) -> None:
    other = model(1, noise=0.5)
    kl = divergence.compare(other, WINDOWS, reference, folder, "x")["kl"]
    want = rel_entr(softmax(rows(model(0)), axis=1), softmax(rows(other), axis=1)).sum(axis=1)
    np.testing.assert_allclose(kl, want, rtol=2e-3, atol=1e-6)
    assert abs(kl.mean() / want.mean() - 1) < 1e-4, "what 2 bytes per log-probability may cost"


def test_a_model_does_not_diverge_from_itself(reference: Path, folder: Path) -> None:
    scores = divergence.compare(model(0), WINDOWS, reference, folder, "x")
    own = divergence.read_scores(reference)
    assert np.abs(scores["kl"]).max() < 1e-6
    for name in ("top", "logprob", "window_id"):
        np.testing.assert_array_equal(scores[name], own[name])


def test_true_tokens_are_scored_given_those_before_them(reference: Path) -> None:
    own = divergence.read_scores(reference)
    targets = np.concatenate([ids[1:] for ids in WINDOWS])
    want = log_softmax(rows(model(0)), axis=1)[np.arange(TOKENS), targets]
    np.testing.assert_allclose(own["logprob"], want, atol=1e-5)
    np.testing.assert_array_equal(own["top"], rows(model(0)).argmax(axis=1))
    np.testing.assert_array_equal(own["window_id"], np.repeat([0, 1, 2], [11, 11, 6]))


def test_what_the_codes_lose_is_recorded(reference: Path) -> None:
    """KL from the softmax to what a variant is compared with, in float64; nothing lies below the window here."""
    own = divergence.read_scores(reference)
    codes = np.concatenate([np.load(reference / f"codes.{number}.npy") for number in range(3)]).astype(np.float64)
    decoded = softmax(-codes * divergence.WINDOW_NATS / 65535, axis=1)
    want = rel_entr(softmax(rows(model(0)), axis=1), decoded).sum(axis=1)
    np.testing.assert_allclose(own["codes_kl"], want, rtol=1e-3, atol=1e-13)
    assert 0 < want.max() < 1e-7
    assert (own["clipped"] == 0).all()


def sure(ids: np.ndarray) -> np.ndarray:
    """One token at 30 nats above all others."""
    logits = np.zeros((len(ids), VOCAB), np.float32)
    logits[:, 5] = 30
    return logits


def test_tokens_beyond_the_window_are_clipped_not_wrapped(tmp_path: Path, folder: Path) -> None:
    """A log-probability of −30 must not come back as a likely one through an overflow of 16 bits."""
    own = divergence.record_reference(sure, WINDOWS, tmp_path)
    np.testing.assert_allclose(own["clipped"], 299 * np.exp(-30), rtol=1e-6)
    np.testing.assert_allclose(own["codes_kl"], np.log1p(299 * np.exp(-24)), rtol=0.02)
    kl = divergence.compare(sure, WINDOWS, tmp_path, folder, "x")["kl"]
    # 299 tokens at the edge of the window weigh 299·e⁻²⁴; each counts 30 − 24 nats too much.
    assert np.abs(kl).max() < 299 * np.exp(-24) * 30


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_goes_on_at_its_window(done: int, reference: Path, tmp_path: Path, folder: Path) -> None:
    """Of the reference and of a variant: to the bytes of an undisturbed run."""
    asked: list[int] = []

    def dying(limit: int, logits: Logits) -> Logits:
        def run(ids: np.ndarray) -> np.ndarray:
            if len(asked) == limit:
                raise Interrupted
            asked.append(len(ids))
            return logits(ids)

        return run

    (tmp_path / "again").mkdir()
    (tmp_path / "undisturbed").mkdir()
    other = model(1, noise=0.5)
    divergence.compare(other, WINDOWS, reference, tmp_path / "undisturbed", "x")

    with pytest.raises(Interrupted):
        divergence.record_reference(dying(done, model(0)), WINDOWS, tmp_path / "again")
    assert len(asked) == done
    asked.clear()
    divergence.record_reference(dying(3, model(0)), WINDOWS, tmp_path / "again")
    assert len(asked) == 3 - done
    asked.clear()
    with pytest.raises(Interrupted):
        divergence.compare(dying(done, other), WINDOWS, tmp_path / "again", folder, "x")
    asked.clear()
    divergence.compare(dying(3, other), WINDOWS, tmp_path / "again", folder, "x")
    assert len(asked) == 3 - done
    for ours, theirs in ((tmp_path / "again", reference), (folder, tmp_path / "undisturbed")):
        assert {file.name: file.read_bytes() for file in ours.iterdir()} == {
            file.name: file.read_bytes() for file in theirs.iterdir()
        }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error_not_a_score(reference: Path, folder: Path, bad: float) -> None:
    def broken(ids: np.ndarray) -> np.ndarray:
        logits = model(0)(ids)
        logits[-1, 3] = bad
        return logits

    with pytest.raises(EvaluationError, match="NaN or infinity"):
        divergence.compare(broken, WINDOWS, reference, folder, "x")
    assert not list(folder.iterdir())


def test_other_text_or_vocabulary_is_refused(reference: Path, folder: Path) -> None:
    with pytest.raises(EvaluationError, match=f"11 tokens to score, the reference has {TOKENS}"):
        divergence.compare(model(0), WINDOWS[:1], reference, folder, "x")
    with pytest.raises(
        EvaluationError, match=f"299 logits of each of 11 tokens in window 0, the reference has {VOCAB}"
    ):
        divergence.compare(lambda ids: model(0)(ids)[:, 1:], WINDOWS, reference, folder, "x")
