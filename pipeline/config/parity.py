"""configs/parity.yaml"""

from __future__ import annotations

from pydantic import Field

from pipeline.config.typed_yaml import CONFIGS, Frozen, load


class ParityConfig(Frozen):
    """How the exported graph is compared with Optimum's export of the same checkpoint."""

    max_relative_error: float = Field(gt=0)
    memory_bytes: int = Field(gt=0, description="peak memory that the reference export may take")
    prompt_tokens: int = Field(gt=1)


def load_parity() -> ParityConfig:
    """configs/parity.yaml"""
    return load(ParityConfig, CONFIGS / "parity.yaml")
