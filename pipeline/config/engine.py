"""configs/engine.yaml"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from pipeline.config.typed_yaml import CONFIGS, Frozen, check, load

VARIABLE = "PIPELINE_ENGINE"


class EngineConfig(Frozen):
    """Who does units of work: threads of this process, or Ray's workers."""

    engine: Literal["threads", "ray"] = "threads"
    address: str | None = Field(default=None, pattern=r"^\S+:\d+$", description="of a cluster, HOST:PORT")
    cores: int = Field(default=1, ge=1, description="of one worker")


def load_engine() -> EngineConfig:
    """configs/engine.yaml, with the engine that PIPELINE_ENGINE names, if it names one."""
    found = load(EngineConfig, CONFIGS / "engine.yaml")
    if name := os.environ.get(VARIABLE):
        return check(EngineConfig, found.model_dump() | {"engine": name}, VARIABLE)
    return found
