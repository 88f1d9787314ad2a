"""Divergence from the reference on held-out text; of the reference, the log-probabilities that variants meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from pipeline.config.typed_yaml import Frozen, Name
from pipeline.tasks import divergence_scores as scores
from pipeline.tasks import held_out, task
from pipeline.tasks.statistics import WINDOW_LOOKS, summarise_divergence, summarise_reference_divergence
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import nats, percent, share, share_points

Windows = dict[Name, Annotated[int, Field(gt=0)]]
_RATIO, _three = "perplexity_ratio", "{:.3f}".format


class DivergenceConfig(Frozen):
    """KL divergence, top-1 agreement and perplexity on held-out text: windows of `window` tokens by dataset, for each
    kind of text. A window scores each token but its first.

    Every scored token counts alike in the whole that is judged, so a kind weighs by its windows. Nobody knows what
    phones will be asked, so shipped suites give each kind a quarter: a kind that is lost moves the whole, and none
    decides alone.
    """

    read_by_name: ClassVar[bool] = True
    prose: Windows = Field(default={})
    chat: Windows = Field(default={})
    code: Windows = Field(default={})
    languages: Windows = Field(default={})
    window: int = Field(gt=1)

    @model_validator(mode="after")
    def _can_be_judged(self) -> DivergenceConfig:
        few = [name for name, count in self.texts.items() if count < 2]
        if few or not self.texts:
            raise ValueError(f"{', '.join(few) or 'all text'} has fewer than two windows, too few for an interval")
        count, (first, *_) = len(self.windows), WINDOW_LOOKS
        if count > first and count not in WINDOW_LOOKS:
            looks = " or ".join(map(str, WINDOW_LOOKS))
            raise ValueError(f"{count} windows in all: divergence is judged at {looks}; fewer than {first} only report")
        return self

    @property
    def by_kind(self) -> dict[str, dict[str, int]]:
        """The kinds that have text, each with its windows by dataset."""
        return {kind: texts for kind in held_out.KINDS if (texts := getattr(self, kind))}

    @property
    def texts(self) -> dict[str, int]:
        """Windows by dataset."""
        return {name: count for texts in self.by_kind.values() for name, count in texts.items()}

    @property
    def windows(self) -> list[tuple[str, str]]:
        """Kind and name of each window's text, in their order."""
        return [(kind, name) for kind, texts in self.by_kind.items() for name in texts for _ in range(texts[name])]

    @property
    def tokens(self) -> int:
        """Scored positions of all texts."""
        return len(self.windows) * (self.window - 1)


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`divergence` metrics. Items (scores of every token) by the window's number lie in `folder`."""
    wanted: DivergenceConfig = subject.wanted
    windows = held_out.scored_ids(wanted.by_kind, wanted.window, subject.folder, subject.store)

    def logits(ids: np.ndarray) -> np.ndarray:
        return subject.decoder.run(ids)[0]

    def prepare(texts: Sequence[np.ndarray]) -> None:
        subject.prepare(lambda decoder: [decoder.run(ids.tolist()) for ids in texts])

    if subject.reference is None:
        own = scores.record_reference(logits, windows, folder, subject.engine, prepare if subject.layered else None)
        return summarise_reference_divergence(own["logprob"], own["codes_kl"], own["clipped"], own["window_id"])
    found = scores.compare(logits, windows, subject.reference, folder, subject.name, subject.engine)
    own = scores.read_scores(subject.reference)
    return summarise_divergence(
        found["kl"], found["top"] == own["top"], found["logprob"], own["logprob"], found["window_id"], wanted.windows
    )


def _asks(part: DivergenceConfig) -> str:
    texts = ", ".join(f"{count:,} of {name}" for name, count in part.texts.items())
    return f"windows of {part.window:,} tokens: {texts}"


def _by_kind(section: task.Metrics) -> str:
    """A variant's figures on each kind of text."""
    kinds = []
    for kind in held_out.KINDS:
        rows = (("kl_mean", nats), ("top1", share), (_RATIO, _three))
        figures = [task.maybe(task.number(section, f"{kind}_{key}"), text, "") for key, text in rows]
        if all(figures):
            kinds.append(f"{kind} {' · '.join(figures)}")
    return f"({'; '.join(kinds)})" if kinds else ""


_TITLES = dict(zip(held_out.KINDS, ("prose", "chat", "code", "other languages"), strict=True))
_BY_KIND = (
    ("kl_mean", "mean KL divergence", "nats per token"),
    ("top1", "agreement of the most likely token", "share"),
    (_RATIO, "perplexity ratio", "ratio"),
)

_LEGEND = (
    "Divergence is judged on four kinds of text, a quarter each. Its intervals allow for windows that diverge much "
    f"more than others and hold at both looks ({' and '.join(map(str, WINDOW_LOOKS))} windows) together."
)

TASK = task.Task(
    name="divergence",
    title="Divergence",
    place=1,
    measure=measure,
    config=DivergenceConfig,
    runs_graph=True,
    against_reference=True,
    unit="tokens",
    datasets=lambda part: held_out.pins(part.by_kind),
    texts=lambda part, store: held_out.texts(part.by_kind, store),
    cost=lambda part, entry: task.Cost(read=part.tokens, window=part.window, kept=part.tokens),
    asks=_asks,
    pairing=task.Pairing("text", ("tokens", "windows"), "perplexity", "perplexity_reference", moved="kl_max"),
    gates=(
        task.Gate("kl_mean", task.AT_MOST, "kl_mean", "mean KL", nats, "kl_mean_max", Field(gt=0), nats),
        task.Gate("kl_p99", task.AT_MOST, "kl_p99", "99th percentile of KL", nats, "kl_p99_max", Field(gt=0)),
        task.Gate(
            "top1", task.AT_LEAST, "top1", "top-1 agreement", share, "top1_min", Field(gt=0, lt=1), share_points, 1.0
        ),
        task.Gate(_RATIO, task.AT_MOST, _RATIO, "perplexity ratio", _three, f"{_RATIO}_max", Field(gt=1), _three),
        task.Gate("kl_ratchet", task.RATCHET, "kl_mean", "mean KL, ratchet", nats),
    ),
    legend=_LEGEND,
    columns=(
        task.interval_column("mean KL", "kl_mean", nats, nats),
        task.interval_column("top-1", "top1", share, percent),
    ),
    notes=(task.Note(lambda own: "By kind of text (mean KL · top-1 · perplexity ratio)", _by_kind),),
    measures=(
        task.Measure("kl_mean", "mean KL divergence from the full-precision model", "nats per token", "kl_divergence"),
        task.Measure("kl_p99", "99th percentile of the KL divergence", "nats"),
        task.Measure("top1", "agreement of the most likely token", "share", "top1_agreement"),
        task.Measure(_RATIO, "perplexity over that of the full-precision model", "ratio", _RATIO),
        *(
            task.Measure(f"{kind}_{key}", f"{title} on {_TITLES[kind]}", unit)
            for kind in held_out.KINDS
            for key, title, unit in _BY_KIND
        ),
    ),
    detail=lambda section, texts: (
        f"{section['tokens']:,} tokens of {', '.join(texts)}" if section.get("tokens") else ", ".join(texts)
    ),
)
