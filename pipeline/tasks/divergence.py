"""Divergence from the reference on held-out text; of the reference, the log-probabilities that variants meet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipeline.calibrate.texts import encoder, read_text
from pipeline.calibrate.windows import scored_windows
from pipeline.checkpoint.blobs import Store
from pipeline.config.typed_yaml import Frozen, Name
from pipeline.journal import Journal
from pipeline.tasks import divergence_scores as scores
from pipeline.tasks import task
from pipeline.tasks.statistics import summarise_divergence, summarise_reference_divergence
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import nats, percent, share, share_points

_RATIO, _three = "perplexity_ratio", "{:.3f}".format


class DivergenceConfig(Frozen):
    """KL divergence, top-1 agreement and perplexity on held-out text. `tokens` counts scored positions."""

    texts: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    window: int = Field(gt=1)

    @property
    def tokens(self) -> int:
        """Scored positions of all texts."""
        return sum(self.texts.values())


def scored_ids(wanted: DivergenceConfig, folder: Path, store: Store) -> list[np.ndarray]:
    """Held-out windows, int64 [window]; a window of w tokens scores w − 1 positions."""
    encode = encoder(folder)
    return [
        ids
        for name, tokens in wanted.texts.items()
        for ids in scored_windows(read_text(name, store), encode, tokens, wanted.window)
    ]


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`divergence` metrics. Items (scores of every token) by the window's number lie in `folder`."""
    windows = scored_ids(subject.wanted, subject.folder, subject.store)
    kept = Journal(folder / scores.ITEMS).items
    left = [ids for number, ids in enumerate(windows) if str(number) not in kept]
    subject.prepare(lambda decoder: [decoder.run(ids[:-1].tolist()) for ids in left])

    def logits(ids: np.ndarray) -> np.ndarray:
        return subject.decoder.run(ids)[0]

    if subject.reference is None:
        own = scores.record_reference(logits, windows, folder)
        return summarise_reference_divergence(own["logprob"], own["codes_kl"], own["clipped"], own["window_id"])
    found = scores.compare(logits, windows, subject.reference, folder, subject.name)
    own = scores.read_scores(subject.reference)
    return summarise_divergence(
        found["kl"], found["top"] == own["top"], found["logprob"], own["logprob"], found["window_id"]
    )


def _asks(part: DivergenceConfig) -> str:
    texts = ", ".join(f"{tokens:,} tokens of {name}" for name, tokens in part.texts.items())
    return f"{texts} in windows of {part.window:,}"


TASK = task.Task(
    name="divergence",
    title="Divergence",
    place=1,
    measure=measure,
    config=DivergenceConfig,
    runs_graph=True,
    against_reference=True,
    unit="tokens",
    datasets=lambda part: part.texts,
    texts=lambda part, store: ((name, [read_text(name, store)]) for name in part.texts),
    cost=lambda part, entry: task.Cost(read=part.tokens, window=part.window, kept=part.tokens),
    asks=_asks,
    pairing=task.Pairing("text", ("tokens",), "perplexity", "perplexity_reference", moved="kl_max"),
    gates=(
        task.Gate("kl_mean", task.AT_MOST, "kl_mean", "mean KL", nats, "kl_mean_max", Field(gt=0), nats),
        task.Gate("kl_p99", task.AT_MOST, "kl_p99", "99th percentile of KL", nats, "kl_p99_max", Field(gt=0)),
        task.Gate(
            "top1", task.AT_LEAST, "top1", "top-1 agreement", share, "top1_min", Field(gt=0, lt=1), share_points, 1.0
        ),
        task.Gate(_RATIO, task.AT_MOST, _RATIO, "perplexity ratio", _three, f"{_RATIO}_max", Field(gt=1), _three),
        task.Gate("kl_ratchet", task.RATCHET, "kl_mean", "mean KL, ratchet", nats),
    ),
    columns=(
        task.interval_column("mean KL", "kl_mean", nats, nats),
        task.interval_column("top-1", "top1", share, percent),
    ),
    measures=(
        task.Measure("kl_mean", "mean KL divergence from the full-precision model", "nats per token", "kl_divergence"),
        task.Measure("kl_p99", "99th percentile of the KL divergence", "nats"),
        task.Measure("top1", "agreement of the most likely token", "share", "top1_agreement"),
        task.Measure(_RATIO, "perplexity over that of the full-precision model", "ratio", _RATIO),
    ),
    detail=lambda section, texts: (
        f"{section['tokens']:,} tokens of {', '.join(texts)}" if section.get("tokens") else ", ".join(texts)
    ),
)
