"""What phones have and what models take: configs/tiers.yaml, devices.yaml, shapes.yaml, claims.yaml"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.typed_yaml import Frozen, Name

Platform = Literal["android", "ios"]


class Tier(Frozen):
    """A class of devices by RAM."""

    platform: Platform
    ram_bytes: int = Field(gt=0, description="lower edge of the class, bytes of physical memory")
    usable_fraction: float = Field(gt=0, le=1, description="share of RAM that the app may use at its peak")


class TiersConfig(Frozen):
    """Tiers by name, and the context each bundle is planned for."""

    context: int = Field(gt=0, description="tokens of KV cache counted")
    runtime_bytes: int = Field(ge=0, description="runtime, tokenizer and app beside the model")
    resident_fraction: float = Field(
        default=0.65, gt=0, le=1, description="share of RAM that private memory and mapped weights may fill together"
    )
    sources: dict[Platform, str] = Field(default={}, description="where a platform's share of RAM comes from")
    tiers: dict[Name, Tier]


class Device(Frozen):
    """A phone that people know. Its tier decides what it gets, its memory's bandwidth how fast that can be."""

    title: str
    tier: Name = Field(description="row of configs/tiers.yaml")
    ram_bytes: int = Field(gt=0, description="the marketing figure, in decimal bytes")
    memory_bandwidth: int = Field(gt=0, description="bytes per second, the most that its memory can deliver")
    source: str


class Efficiency(Frozen):
    """Shares of the roofline between which decoding was measured."""

    low: float = Field(gt=0, lt=1)
    high: float = Field(gt=0, lt=1)
    source: str

    @model_validator(mode="after")
    def _is_a_range(self) -> Efficiency:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class DevicesConfig(Frozen):
    """Phones by name."""

    efficiency: Efficiency
    devices: dict[Name, Device]


class Shapes(Frozen):
    """What a checkpoint is expected to be: all that sizes depend on, in the words of `Architecture`."""

    family: str
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    vocab: int = Field(gt=0)
    original_max_position: int | None = Field(default=None, gt=0, description="tokens; LongRoPE has one, others None")
    rotary_dims: int = Field(gt=0, description="channels of a head that are rotated")
    tied: bool = Field(description="whether the head is the embedding's table")


class ShapesConfig(Frozen):
    """Shapes by model, for planning before a download and for recognising the wrong one after it."""

    models: dict[Name, Shapes]


class SizeClaim(Frozen):
    """A file's size, for a variant of a model."""

    kind: Literal["size"]
    text: str
    model: Name
    variant: Name
    bytes: int = Field(gt=0)


class MemoryClaim(Frozen):
    """Memory in use, beside the files of these models in a variant."""

    kind: Literal["memory"]
    text: str
    models: tuple[Name, ...] = Field(min_length=1)
    variant: Name
    bytes: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)


class RateClaim(Frozen):
    """Tokens per second of a file of `bytes` on a device."""

    kind: Literal["rate"]
    text: str
    tokens_per_second: float = Field(gt=0)
    bytes: int = Field(gt=0)
    device: Name


class RuleClaim(Frozen):
    """Variants to pick below some megabytes of memory."""

    kind: Literal["rule"]
    text: str
    models: tuple[Name, ...] = Field(min_length=1)
    below_bytes: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1, description="by variant")


class ScoreClaim(Frozen):
    """A score without a source: nothing to compute."""

    kind: Literal["score"]
    text: str


Claim = Annotated[SizeClaim | MemoryClaim | RateClaim | RuleClaim | ScoreClaim, Field(discriminator="kind")]


class ClaimsConfig(Frozen):
    """Figures that came with the request, each printed beside its check."""

    claims: tuple[Claim, ...]
