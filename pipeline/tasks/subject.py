"""What is validated: the written files of one variant, or of the full-precision reference, as one task sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.models import ModelConfig
from pipeline.engine import Engine, Here, chosen
from pipeline.journal import Journal
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.runtime.generate import Request, Written

CHUNK = 256
"""Tokens run at once: logits of a long text would take gigabytes with a large vocabulary."""
State = Any
"""What a Decoder remembers of the tokens it was given; opaque, immutable, reusable."""


class Decoder(Protocol):
    """A causal language model with a reusable past."""

    def run(self, ids: Sequence[int], past: State | None = None) -> tuple[np.ndarray, State]:
        """Logits of `ids` after `past`, float32 [len(ids), vocabulary], and the state after them; `past` is kept."""
        ...


class Writer(Protocol):
    """A causal language model that writes: `pipeline.runtime.generate.Writer`, or another with its rules."""

    def chat(self, request: str) -> str:
        """The prompt for a user's request, by the model's own chat template."""
        ...

    def continuations(self, requests: Mapping[str, Request]) -> Iterator[Written]:
        """The text of each request, in their order."""
        ...


@dataclass(frozen=True)
class Subject:
    """One model × variant. `dataclasses.replace` makes it another task's, which loads the model for itself.

    Attributes:
        folder: graph, weights, tokenizer and genai_config.json, as a runtime loads them.
        graph: the graph in `folder`.
        large: whether memory does not hold the model.
        layered: whether it runs layer by layer, being too large or on a GPU.
        device: what computes it. Quantized files are the CPU's.
        open, open_writer: make the graph a decoder, and the folder a writer.
        wanted: the task's part of the suite.
        reference: the reference's per-item results in this task; None for the reference itself, and where it has none.
        source: the results of the task that this one reads; of the reference only, None elsewhere.
        states: a folder for what a model that runs layer by layer keeps on its way.
    """

    model: str
    variant: str
    folder: Path
    graph: Path
    architecture: Architecture
    entry: ModelConfig
    store: Store
    large: bool = False
    layered: bool = False
    device: str = "cpu"
    open: Callable[[Subject], Decoder] | None = None
    open_writer: Callable[[Subject], Writer] | None = None
    wanted: Any = None
    reference: Path | None = None
    source: Path | None = None
    states: Path = Path()

    def __getstate__(self) -> dict[str, Any]:
        """Without what it has loaded."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """Model and variant, for people."""
        return f"{self.model} {self.variant}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On a worker: what it keeps on its way lies in a folder of its own, which goes with it."""
        vars(self).update(state)
        if self.layered:
            self.states.mkdir(parents=True, exist_ok=True)
            scratch = TemporaryDirectory(dir=self.states)
            vars(self).update(states=Path(scratch.name), scratch=scratch)

    @property
    def engine(self) -> Engine:
        """Who asks it. A GPU is this process's. Of a mixture that runs layer by layer, the bits that an expert gives a
        token depend on who else wakes it: its texts are written together."""
        here = self.layered and (self.device != "cpu" or self.architecture.experts)
        return Here() if here else chosen(wide=True)

    @cached_property
    def decoder(self) -> Any:
        """The graph as a `Decoder`, loaded on first use."""
        assert self.open, "a subject of configuration only"
        return self.open(self)

    @cached_property
    def writer(self) -> Writer:
        """The folder as a `Writer`, loaded on first use."""
        assert self.open_writer, "a subject of configuration only"
        return self.open_writer(self)

    def prepare(self, ask: Callable[[Decoder], object]) -> None:
        """Announce all that `decoder` will be asked in a unit of work, for a model that runs layer by layer: `ask`
        asks it of a stand-in whose logits mean nothing."""
        if self.layered:
            self.decoder.prepare(ask)


Make = Callable[[Sequence[str]], Iterable[Any]]
"""Names → their items, plain JSON data, in that order."""
Keep = Callable[[str, Any], Any]
"""An item as it was made → as it is recorded."""
_BATCH = 16  # items at most of one unit for workers elsewhere, and so many units at least of each worker
_UNITS = 4


def batch_size(items: int, workers: int, layered: bool = False) -> int:
    """Items of one unit for workers elsewhere; of a model that runs `layered` a worker reads all weights for each."""
    return max(1, math.ceil(items / workers) if layered else min(_BATCH, items // (_UNITS * workers)))


def fill(
    journal: Journal, names: Sequence[str], title: str, unit: str, items: Make, engine: Engine,
    keep: Keep | None = None, layered: bool = False,
) -> None:  # fmt: skip
    """Record an item for each of `names` that the journal lacks, as soon as `items` of those has made it.

    Args:
        title, unit: of the progress: what is measured of whom, and what its items are.
        items: not called when none is left; pickled, and given a few names at a time, where workers are elsewhere.
        engine: who makes items, each of which takes all cores.
        keep: what is left to do here with an item.
        layered: as in `batch_size`.
    """
    left = [name for name in names if name not in journal.items]
    size = max(1, len(left)) if engine.shared else batch_size(len(left), engine.workers, layered)
    batches = [left[start : start + size] for start in range(0, len(left), size)]
    with Progress(title, len(names), unit, workers=0 if engine.shared else engine.workers) as progress:
        progress.advance(len(names) - len(left), kept=True)

        def record(some: Sequence[str], made: Iterable[Any]) -> None:
            for name, item in zip(some, made, strict=True):
                journal.record(name, keep(name, item) if keep else item)
                progress.advance()

        engine.run(items, batches, record)
