"""configs/signing.yaml, and what the ratchet of configs/gates.yaml remembers of releases: configs/released.yaml"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, Sha256, load


class SigningConfig(Frozen):
    """Who signs, and for how long a release is fresh.

    `key_id` is "development" or the SHA-256 of the release public key's DER SubjectPublicKeyInfo. It is a parameter
    of the sign stage: another key signs again. The private key itself comes from the environment and is no dependency.
    `next_key_id` announces the key that later releases are signed with: apps pin both (docs/trust.md).
    """

    channel: Literal["development", "release"]
    key_id: Literal["development"] | Sha256
    next_key_id: Sha256 | None = None
    release: int = Field(ge=1, description="monotonic release number; a phone refuses a lower one")
    expires_days: int = Field(gt=0, le=36_500)
    min_app_version: int = Field(ge=0)
    max_app_version: int | None = None

    @model_validator(mode="after")
    def _keys_fit(self) -> SigningConfig:
        if self.channel == "release" and self.key_id == "development":
            raise ValueError(
                "channel 'release' refuses the development key: set key_id to the release public key's SHA-256 "
                "(python -m pipeline key-id PUBLIC_KEY.pem prints it)"
            )
        if self.next_key_id == self.key_id:
            raise ValueError(f"next_key_id is key_id itself ({self.key_id}): name the key that follows it, or none")
        return self


class ReleasedBuild(Frozen):
    """What the ratchet remembers of a release. The reference's perplexity tells one text and reference from another."""

    release: int = Field(ge=1)
    kl_mean: float = Field(gt=0, description="nats per token")
    tokens: int = Field(gt=0)
    perplexity_reference: float = Field(gt=0)


class ReleasedConfig(Frozen):
    """Releases by model and variant, in their order; `record-release` writes it."""

    models: dict[Name, dict[Name, tuple[ReleasedBuild, ...]]] = Field(default={})


def load_signing() -> SigningConfig:
    """configs/signing.yaml"""
    return load(SigningConfig, CONFIGS / "signing.yaml")


def load_released() -> ReleasedConfig:
    """configs/released.yaml"""
    return load(ReleasedConfig, CONFIGS / "released.yaml")
