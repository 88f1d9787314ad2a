"""What phones have, what models take, what was measured: tiers.yaml, devices.yaml, shapes.yaml, measured.yaml"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, known_name, load
from pipeline.errors import ConfigError

Platform = Literal["android", "ios"]
Weights = Literal["private", "mapped"]
Processor = Literal["here", "cortex-a76", "max"]
"""Whose packed weights a bundle names: this machine, or as QEMU calls it."""
PREFILL_CHUNKS = (64, 32, 16)
"""Tokens of a prompt that a phone may run at a time: activations stay small, and from 32 on a prompt is read as fast
as in one piece (measured on SmolLM2). The first is a bundle's own."""


class Tier(Frozen):
    """A class of devices by RAM."""

    platform: Platform
    ram_bytes: int = Field(gt=0, description="lower edge of the class, bytes of physical memory")
    usable_fraction: float = Field(gt=0, le=1, description="share of RAM that the app may use at its peak")
    threads: int = Field(default=4, gt=0, description="that an app computes with: the phone's fast cores")


class TiersConfig(Frozen):
    """Tiers by name, and the context each bundle is planned for."""

    context: int = Field(gt=0, description="tokens of KV cache counted")
    runtime_bytes: int = Field(ge=0, description="runtime, tokenizer and app beside the model")
    resident_fraction: float = Field(
        default=0.65, gt=0, le=1, description="share of RAM that private memory and mapped weights may fill together"
    )
    sources: dict[Platform, str] = Field(default={}, description="where a platform's share of RAM comes from")
    tiers: dict[Name, Tier]


class KernelsConfig(Frozen):
    """Processors whose packed weights bundles name."""

    classes: tuple[Processor, ...] = Field(description="`here`, or a processor that QEMU emulates")


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


class Measured(Frozen):
    """What a phone showed under sustained load: tokens per second in the first minute and in the last quarter."""

    device: Name
    model: Name
    variant: Name
    release: int | None
    weights: Weights
    runtime: str
    started: str
    seconds: float
    tokens_per_second: float
    sustained_tokens_per_second: float
    throttled_after_seconds: float | None
    peak_private_bytes: int | None
    hottest_celsius: float | None
    cold_start_seconds: float | None
    warm_start_seconds: float | None

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer row replaces."""
        return self.device, self.model, self.variant, self.weights


class MeasuredConfig(Frozen):
    """Rows that `python -m pipeline sustain --import` wrote."""

    rows: tuple[Measured, ...] = ()


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
    biases: tuple[str, ...] = Field(default=(), description="roles with a bias that not all of the family have")
    experts: int = Field(default=0, ge=0, description="of a layer, in a mixture")
    experts_per_token: int = Field(default=0, ge=0, description="that a token wakes in a layer")


class ShapesConfig(Frozen):
    """Shapes by model, for planning before a download and for recognising the wrong one after it."""

    models: dict[Name, Shapes]


def load_tiers() -> TiersConfig:
    """configs/tiers.yaml"""
    return load(TiersConfig, CONFIGS / "tiers.yaml")


def load_kernels() -> KernelsConfig:
    """configs/kernels.yaml"""
    return load(KernelsConfig, CONFIGS / "kernels.yaml")


def load_devices() -> DevicesConfig:
    """configs/devices.yaml, with every device in the highest class of its platform that its RAM reaches.

    Raises ConfigError for one that is not.
    """
    path, tiers = CONFIGS / "devices.yaml", load_tiers().tiers
    loaded = load(DevicesConfig, path)
    for name, device in loaded.devices.items():
        known_name(device.tier, tiers, f"{path}: devices.{name}.tier", "configs/tiers.yaml")
        own = tiers[device.tier]
        edges = {tier.ram_bytes: key for key, tier in tiers.items() if tier.platform == own.platform}
        best = edges.get(max((edge for edge in edges if edge <= device.ram_bytes), default=0))
        if best != device.tier:
            raise ConfigError(
                f"{path}: devices.{name}: {device.ram_bytes:,} bytes of RAM are tier {best or 'none'!r} of "
                f"{own.platform}, not {device.tier!r}, which begins at {own.ram_bytes:,}."
            )
    return loaded


def load_measured() -> MeasuredConfig:
    """configs/measured.yaml"""
    return load(MeasuredConfig, CONFIGS / "measured.yaml")


def load_shapes() -> ShapesConfig:
    """configs/shapes.yaml"""
    return load(ShapesConfig, CONFIGS / "shapes.yaml")
