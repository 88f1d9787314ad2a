"""What is validated: the written files of one variant, or of the full-precision reference, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.models import ModelConfig
from pipeline.runtime.layered import Asked, LayeredDecoder
from pipeline.runtime.session import OnnxDecoder
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Subject:
    """One model × variant, as one section of its validation sees it.

    Attributes:
        folder: graph, weights, tokenizer and genai_config.json, as a runtime loads them.
        graph: the graph in `folder`.
        isolation: the level that generated code runs at.
        layered: whether the model is too large to be held in memory, and runs layer by layer.
        section: the section's name.
        reference: the reference's per-item results in this section; None for the reference itself, and where it has
            none.
        source: the results of the section that this one reads; of the reference only, None elsewhere.
        states: a folder for the hidden states of a model that runs layer by layer.
    """

    workspace: Workspace
    variant: str
    folder: Path
    graph: Path
    architecture: Architecture
    entry: ModelConfig
    suite: EvaluationConfig
    store: Store
    isolation: str
    layered: bool = False
    section: str = ""
    reference: Path | None = None
    states: Path = Path()
    source: Path | None = None

    @property
    def name(self) -> str:
        """Model and variant, for people."""
        return f"{self.workspace.model} {self.variant}"

    def of(self, section: str, reference: Path | None, states: Path, source: Path | None = None) -> Subject:
        """The subject of a section. It loads the model for itself."""
        return replace(self, section=section, reference=reference, states=states, source=source)

    @cached_property
    def decoder(self) -> OnnxDecoder | LayeredDecoder:
        """The graph as a decoder, loaded on first use."""
        if self.layered:
            return LayeredDecoder(self.graph, self.architecture, self.states, self.name)
        return OnnxDecoder(self.graph)

    def prepare(self, ask: Callable[[Asked], object]) -> None:
        """Announce all that `decoder` will be asked, for a model that runs layer by layer: `ask` asks it of a stand-in
        whose logits mean nothing."""
        if self.layered:
            self.decoder.prepare(ask)
