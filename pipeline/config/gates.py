"""What the ratchet of configs/gates.yaml remembers: configs/released.yaml. The limits are `pipeline.judge.policy`'s."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, load


class ReleasedBuild(Frozen):
    """What the ratchet remembers of a release. The reference's perplexity tells one text and reference from another."""

    release: int = Field(ge=1)
    kl_mean: float = Field(gt=0, description="nats per token")
    tokens: int = Field(gt=0)
    perplexity_reference: float = Field(gt=0)


class ReleasedConfig(Frozen):
    """Releases by model and variant, in their order; `record-release` writes it."""

    models: dict[Name, dict[Name, tuple[ReleasedBuild, ...]]] = Field(default={})


def load_released() -> ReleasedConfig:
    """configs/released.yaml"""
    return load(ReleasedConfig, CONFIGS / "released.yaml")
