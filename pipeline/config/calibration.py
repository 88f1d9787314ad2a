"""What is measured of the full-precision model: configs/calibration.yaml, sensitivity.yaml, parity.yaml"""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.config.recipes import FormatName
from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, load


class CalibrationConfig(Frozen):
    """Which text drives activation statistics. `texts` and `chats` map a dataset's name to its number of tokens; a chat
    is a file of conversations (`pipeline.runtime.chat`), read through the model's own chat template."""

    texts: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    chats: dict[Name, Annotated[int, Field(gt=0)]] = Field(default={})
    window: int = Field(gt=1, description="tokens per sequence")
    per_channel: float = Field(default=0, ge=0, description="at least so many tokens for a channel of the widest input")

    @property
    def datasets(self) -> frozenset[str]:
        """Names of all datasets that are read."""
        return frozenset({*self.texts, *self.chats})

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(self.texts.values()) + sum(self.chats.values())

    def grown(self, channels: int) -> Self:
        """What a model reads whose widest input has so many channels: enough for `per_channel`."""
        return self.holding(self.per_channel * channels)

    def holding(self, tokens: float) -> Self:
        """At least so many tokens: texts grow alike, in whole windows. Chats stay: few are conversations."""
        factor = (tokens - sum(self.chats.values())) / sum(self.texts.values())
        if factor <= 1:
            return self
        windows = {name: math.ceil(count * factor / self.window) for name, count in self.texts.items()}
        return self.model_copy(update={"texts": {name: count * self.window for name, count in windows.items()}})


class SensitivityConfig(CalibrationConfig):
    """What is measured of each matrix for budgets: the error of every format, and the damage of one of them."""

    formats: tuple[FormatName, ...] = Field(min_length=1)
    damage: FormatName = Field(description="the format in which each matrix's KL divergence is measured")
    rows: int = Field(gt=0, description="rows of each matrix that errors are measured on, evenly spaced")

    @model_validator(mode="after")
    def _has_whole_windows(self) -> SensitivityConfig:
        if all(tokens < self.window for tokens in (*self.texts.values(), *self.chats.values())):
            raise ValueError(f"no text has {self.window} tokens, a whole window: raise `texts` or lower `window`")
        return self


class ParityConfig(Frozen):
    """How the exported graph is compared with Optimum's export of the same checkpoint."""

    max_relative_error: float = Field(gt=0)
    memory_bytes: int = Field(gt=0, description="peak memory that the reference export may take")
    prompt_tokens: int = Field(gt=1)


def load_calibration() -> CalibrationConfig:
    """configs/calibration.yaml"""
    return load(CalibrationConfig, CONFIGS / "calibration.yaml")


def load_sensitivity() -> SensitivityConfig:
    """configs/sensitivity.yaml"""
    return load(SensitivityConfig, CONFIGS / "sensitivity.yaml")


def load_parity() -> ParityConfig:
    """configs/parity.yaml"""
    return load(ParityConfig, CONFIGS / "parity.yaml")
