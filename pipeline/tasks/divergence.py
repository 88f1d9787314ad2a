"""Divergence from the reference on held-out text; of the reference, the log-probabilities that variants meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibrate.texts import scored_ids
from pipeline.journal import Journal
from pipeline.tasks import divergence_scores as divergence
from pipeline.tasks.statistics import summarise_divergence, summarise_reference_divergence
from pipeline.tasks.subject import Subject


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`divergence` metrics. Items (scores of every token) by the window's number lie in `folder`."""
    windows = scored_ids(subject.suite.divergence, subject.folder, subject.store)
    kept = Journal(folder / divergence.ITEMS).items
    left = [ids for number, ids in enumerate(windows) if str(number) not in kept]
    subject.prepare(lambda decoder: [decoder.run(ids[:-1]) for ids in left])

    def logits(ids: np.ndarray) -> np.ndarray:
        return subject.decoder.run(ids)[0]

    if subject.reference is None:
        own = divergence.record_reference(logits, windows, folder)
        return summarise_reference_divergence(own["logprob"], own["codes_kl"], own["clipped"], own["window_id"])
    scores = divergence.compare(logits, windows, subject.reference, folder, subject.name)
    own = divergence.read_scores(subject.reference)
    return summarise_divergence(
        scores["kl"], scores["top"] == own["top"], scores["logprob"], own["logprob"], scores["window_id"]
    )
