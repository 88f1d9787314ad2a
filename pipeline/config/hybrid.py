"""When a phone asks a cloud, which one, and what it may cost: configs/hybrid.yaml"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, load

Mode = Literal["only_device", "prefer_device", "prefer_cloud", "only_cloud"]
Heat = Literal["nominal", "fair", "serious", "critical"]
"""iOS's words (ProcessInfo.thermalState). Of Android's thermal status 0 and 1 are nominal, 2 fair, 3 serious, the rest
critical."""


class Limits(Frozen):
    """What the rules compare a request and a phone with."""

    low: int = Field(default=100, gt=0, description="a prompt of fewer tokens is LOW, of more up to `high` MEDIUM")
    high: int = Field(default=500, gt=0, description="a prompt of more tokens is HIGH")
    threshold: int = Field(default=150, gt=0, description="a MEDIUM prompt of more tokens goes to the cloud")
    turns: int = Field(default=8, gt=0, description="a MEDIUM prompt after more of the user's messages does, too")
    battery: float = Field(default=0.2, ge=0, le=1, description="share below which an uncharged phone is spared")
    heat: Heat = Field(default="serious", description="from which on the phone is spared")
    metered: bool = Field(default=True, description="whether a metered network reaches the cloud")

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class Cascade(Frozen):
    """When the phone doubts its own answer: the mean log-probability of its first tokens is below a threshold."""

    tokens: int = Field(gt=0, description="of the answer's beginning, which waits until it is judged")
    threshold: float = Field(lt=0, description="nats per token")


class Price(Frozen):
    """Dollars per million tokens, and who said so when."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    source: str
    date: datetime.date


class Provider(Frozen):
    """An OpenAI-compatible service. Its key is in the environment, under the name that stands here."""

    base_url: Annotated[str, StringConstraints(pattern=r"^https://[^@]+$|^http://(127\.0\.0\.1|localhost|\[::1\])[:/]")]
    model: str
    key: str | None = Field(
        default=None, pattern=r"^[A-Z][A-Z0-9_]*$", description="the environment variable that holds its key"
    )
    price: Price
    max_tokens: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="what it calls the most tokens of an answer"
    )
    reports_usage: bool = Field(default=True, description="whether stream_options.include_usage is asked for")
    passes: tuple[Literal["temperature", "top_p", "stop", "seed"], ...] = Field(
        default=("temperature", "top_p", "stop", "seed"), description="settings that it takes; others are left out"
    )


class Attempts(Frozen):
    """How long the cloud may take, and when it is asked again."""

    first_token: float = Field(default=2.0, gt=0, description="seconds of one attempt to its first token")
    whole: float = Field(default=30.0, gt=0, description="seconds that all attempts may wait for the cloud together")
    retries: int = Field(default=1, ge=0, le=5, description="further attempts, none after a first token")
    statuses: tuple[int, ...] = Field(default=(408, 409, 429, 500, 502, 503, 504), description="that are tried again")
    pause: float = Field(default=0.25, ge=0, description="seconds before a retry, unless Retry-After says more")
    longest_pause: float = Field(default=2.0, ge=0, description="a longer Retry-After is no retry")


class HybridConfig(Frozen):
    """The hybrid manager's policy, its cloud and its ledger."""

    mode: Mode = "prefer_device"
    limits: Limits = Limits()
    tags: dict[Name, Literal["device", "anywhere"]] = Field(
        default={}, description="where a request with this tag may be answered; one that is not named: on the device"
    )
    cascade: Cascade | None = Field(default=None, description="None: the phone's answers are never doubted")
    provider: Name = Field(description="row of `providers`")
    providers: dict[Name, Provider] = Field(min_length=1)
    attempts: Attempts = Attempts()
    plausible: float = Field(
        default=2.0, gt=1, description="usage further than this factor from our own count is marked as disputed"
    )
    ledger: Path = Field(default=Path("artifacts/ledger.sqlite"), description="SQLite file of every attempt")

    @model_validator(mode="after")
    def _names_a_provider(self) -> Self:
        if self.provider not in self.providers:
            raise ValueError(f"provider {self.provider!r} is not in providers: {', '.join(self.providers)}")
        return self


def load_hybrid(path: Path = CONFIGS / "hybrid.yaml") -> HybridConfig:
    """configs/hybrid.yaml, or another file of its form."""
    return load(HybridConfig, path)
