"""configs/pipeline.yaml, configs/models/<name>.yaml"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.sources import HubName, HubSource, Source
from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, check, load

DEVICE = "PIPELINE_DEVICE"
"""The environment variable that takes precedence over `device` of configs/pipeline.yaml."""


class PipelineConfig(Frozen):
    """What one `dvc repro` covers: models × variants, measured with one evaluation suite."""

    models: tuple[Name, ...] = Field(min_length=1)
    variants: tuple[Name, ...] = Field(min_length=1)
    suite: Name
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="cpu", description="what computes full-precision passes; auto: a GPU where torch has one"
    )
    undecided: bool = Field(default=False, description="do hours of work even where no measurement can end in PASS")


class ModelConfig(Frozen):
    """A model entry: where its checkpoint comes from and how the product runs it."""

    title: str
    source: Source
    context: int = Field(gt=0, description="context cap of the exported graph, tokens")
    gate_class: Name = Field(description="row of configs/gates.yaml that judges its variants")
    note: str = Field(default="", description="a caveat printed with the model's figures")
    mmlu_mode: Literal["five-shot", "letter", "chat", "cloze"] = Field(
        description="five-shot is the field's default; cloze for models too small to answer with letters"
    )
    mmlu_close_think: bool = Field(
        default=False,
        description="for a model that thinks unasked: mode chat closes an empty <think> block before the letter",
    )
    humaneval_prompt: Literal["completion", "chat", "closed", "thinking"] = Field(
        default="completion",
        description="completion: go on with the code; chat: answer a request; of a model that thinks, closed: after an "
        "empty <think> block, thinking: after its own",
    )
    published: dict[Name, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={},
        description="accuracy of the full-precision model by task, as others published it: what a suite can decide is "
        "computed from it, nothing is judged by it",
    )
    extra_stop_ids: tuple[int, ...] = ()
    generation: dict[str, Any] = Field(
        default={}, description="laid over the checkpoint's generation_config.json, key by key; null removes one"
    )
    base_model: HubName | None = Field(
        default=None, description="Hub repository that the checkpoint is a copy of, where its source is another place"
    )
    licence_page: str | None = Field(default=None, description="shown when the Hub asks for an accepted licence")

    @property
    def hub_name(self) -> str | None:
        """The Hub repository that the model is known by, as far as the entry says."""
        return self.source.repo if isinstance(self.source, HubSource) else self.base_model


def load_pipeline() -> PipelineConfig:
    """configs/pipeline.yaml"""
    return load(PipelineConfig, CONFIGS / "pipeline.yaml")


def load_device() -> str:
    """What computes full-precision passes: auto, cpu or cuda."""
    if given := os.environ.get(DEVICE):
        return check(PipelineConfig, load_pipeline().model_dump() | {"device": given}, DEVICE).device
    return load_pipeline().device


def load_model(model: str) -> ModelConfig:
    """configs/models/<name>.yaml"""
    return load(ModelConfig, CONFIGS / "models" / f"{model}.yaml")


def model_names() -> list[str]:
    """Every entry of configs/models, sorted."""
    return sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))
