"""What is validated: the written files of one variant, or of the full-precision reference, and what they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.store import Store
from pipeline.config import EvaluationConfig, ModelConfig
from pipeline.evaluate.runtime import OnnxDecoder
from pipeline.stages.workspace import REFERENCE, Workspace


@dataclass(frozen=True)
class Subject:
    """One model × variant.

    Attributes:
        folder: graph, weights, tokenizer and genai_config.json, as a runtime loads them.
        graph: the graph in `folder`.
        isolation: the level that generated code runs at.
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

    @property
    def name(self) -> str:
        """Model and variant, for people."""
        return f"{self.workspace.model} {self.variant}"

    @property
    def reference(self) -> Path | None:
        """The reference's per-item results; None for the reference itself."""
        return None if self.variant == REFERENCE else self.workspace.evaluation(REFERENCE)

    @cached_property
    def decoder(self) -> OnnxDecoder:
        """The graph in ONNX Runtime, loaded on first use."""
        return OnnxDecoder(self.graph)

    def unload(self) -> None:
        """Give the decoder's memory back: what follows loads the model in its own way."""
        self.__dict__.pop("decoder", None)
