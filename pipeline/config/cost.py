"""What ways to answer cost a month, before any is built: configs/cost.yaml"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from pipeline.config.hybrid import Price
from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, known_name, load


class Sourced(Frozen):
    """A number, and who said so when."""

    value: float = Field(ge=0)
    source: str
    date: datetime.date


class Option(Frozen):
    """One way to answer: all in the cloud (`share_local` 0), all on the device (1), or both."""

    title: str
    price: Name | None = Field(default=None, description="row of `prices`; needed unless share_local is 1")
    share_local: Sourced = Field(description="share of the tokens that the device reads and writes")
    setup: float = Field(ge=0, description="dollars, once")
    fixed: float = Field(default=0, ge=0, description="dollars a month besides the cloud's tokens")
    claimed: float | None = Field(default=None, ge=0, description="dollars a month that the source says")
    source: str = Field(description="of setup, fixed and claimed")
    date: datetime.date

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.share_local.value > 1:
            raise ValueError(f"share_local is {self.share_local.value}, and a share is at most 1")
        if self.price is None and self.share_local.value < 1:
            raise ValueError(f"share_local is {self.share_local.value}, so tokens go to a cloud: name its `price`")
        return self


class CostConfig(Frozen):
    """Users, tokens of all of them in a month, prices, and the options that are compared."""

    users: Sourced
    input_tokens: Sourced
    output_tokens: Sourced
    prices: dict[Name, Price]
    options: dict[Name, Option] = Field(min_length=2)


def load_cost(path: Path = CONFIGS / "cost.yaml") -> CostConfig:
    """configs/cost.yaml, or another file of its form. Raises ConfigError for an option whose price is not there."""
    found = load(CostConfig, path)
    for name, option in found.options.items():
        if option.price:
            known_name(option.price, found.prices, f"{path}: options.{name}.price", "prices")
    return found
