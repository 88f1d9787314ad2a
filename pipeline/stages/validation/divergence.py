"""Divergence from the reference on held-out text; of the reference, the log-probabilities that variants meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate import divergence
from pipeline.evaluate.statistics import summarise_divergence, summarise_reference_divergence
from pipeline.stages.texts import scored_ids
from pipeline.stages.validation.subject import Subject


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`divergence` metrics. Scores of every token lie in `folder`."""
    windows = scored_ids(subject.suite.divergence, subject.folder, subject.store)

    def logits(ids: np.ndarray) -> np.ndarray:
        return subject.decoder.run(ids)[0]

    if subject.reference is None:
        scores = divergence.record_reference(logits, windows, subject.architecture.vocab, folder)
        return summarise_reference_divergence(scores.logprob.astype(np.float64), scores.window_id)
    scores, kl = divergence.compare(logits, windows, subject.reference, subject.name)
    own = divergence.read_reference(subject.reference)
    np.savez(folder / "tokens.npz", kl=kl, top=scores.top, logprob=scores.logprob, window_id=scores.window_id)
    return summarise_divergence(
        kl, scores.top == own.top, scores.logprob.astype(np.float64), own.logprob.astype(np.float64), scores.window_id
    )
