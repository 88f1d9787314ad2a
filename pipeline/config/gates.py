"""configs/gates.yaml, and what its ratchet remembers: configs/released.yaml"""

from __future__ import annotations

from pydantic import Field

from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, load


class GateLimits(Frozen):
    """One row of limits. An accuracy margin of None means: reported, gates nothing."""

    kl_mean_max: float = Field(gt=0, description="nats per token")
    kl_p99_max: float = Field(gt=0, description="nats")
    top1_min: float = Field(gt=0, lt=1)
    perplexity_ratio_max: float = Field(gt=1)
    mmlu_margin_points: float | None = Field(default=None, gt=0)
    humaneval_margin_points: float | None = Field(default=None, gt=0)
    opt_in: tuple[Name, ...] | None = Field(
        default=None, description="models that may be released in this row; None: all"
    )


class GateClass(Frozen):
    """A class of models that share limits, with the reason for them."""

    reason: str
    parameters: tuple[int, int] = Field(description="least and most that a model judged by it may have")
    variants: dict[Name, GateLimits] = Field(description="rows by the variant they judge, or the `gate` of its recipe")


class GatesConfig(Frozen):
    """All gate classes by name, and the ratchet."""

    ratchet: float = Field(gt=1, description="most that a mean KL may be of the last release's on the same text")
    classes: dict[Name, GateClass]


class ReleasedBuild(Frozen):
    """What the ratchet remembers of a release. The reference's perplexity tells one text and reference from another."""

    release: int = Field(ge=1)
    kl_mean: float = Field(gt=0, description="nats per token")
    tokens: int = Field(gt=0)
    perplexity_reference: float = Field(gt=0)


class ReleasedConfig(Frozen):
    """Releases by model and variant, in their order; `record-release` writes it."""

    models: dict[Name, dict[Name, tuple[ReleasedBuild, ...]]] = Field(default={})


def load_gates() -> GatesConfig:
    """configs/gates.yaml"""
    return load(GatesConfig, CONFIGS / "gates.yaml")


def load_released() -> ReleasedConfig:
    """configs/released.yaml"""
    return load(ReleasedConfig, CONFIGS / "released.yaml")
