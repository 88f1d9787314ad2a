"""A shop that all tests of stores look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.bundle import keys
from tests.bundle.conftest import Maker
from tests.packs.storefront import Shop, open_shop


@pytest.fixture(scope="session")
def maker() -> Maker:
    """The release key that the phone trusts."""
    return Maker(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="session")
def shop(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Signed bundles and tiers, never changed by a test."""
    return open_shop(maker, tmp_path_factory.mktemp("shop"))


@pytest.fixture
def public_key(maker: Maker, tmp_path: Path) -> Path:
    """The trusted public key as a PEM file."""
    keys.export_public_key(maker.key, tmp_path / "public.pem")
    return tmp_path / "public.pem"
