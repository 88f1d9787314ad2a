"""sign: an OpenSSF Model Signing signature over a bundle's content, then verification from the bundle alone."""

from __future__ import annotations

from pathlib import Path

from pipeline.bundle.keys import SigningKey, export_public_key, load_signer
from pipeline.bundle.release import CONTENT, SIGNATURE
from pipeline.bundle.signing import sign
from pipeline.bundle.verify import Report, verify
from pipeline.config.signing import SigningConfig, load_signing
from pipeline.errors import BundleError
from pipeline.workspace import Workspace, public_key_path


def run(model: str, variant: str) -> None:
    """Write artifacts/bundles/<model>/<variant>/model.sig and verify the bundle as a phone would."""
    workspace, signing = Workspace(model), load_signing()
    bundle = workspace.bundle(variant)
    workspace.require(bundle / CONTENT, "bundle", variant)
    key = sign_folder(bundle, signing)
    report = verify(
        bundle,
        public_key_path(key.identity.id),
        allow_development=is_development(signing),
        model=model,
        variant=variant,
    )
    require_intact(report)
    print(f"{model} {variant}: signed by {key.identity.kind} key {key.identity.id}, verified from the bundle alone")


def sign_folder(folder: Path, signing: SigningConfig) -> SigningKey:
    """Sign the content of a bundle or of tiers.json; keep the public half of the key for `verify`."""
    key = load_signer(signing)
    export_public_key(key, public_key_path(key.identity.id))
    sign(folder / CONTENT, folder / SIGNATURE, key)
    return key


def is_development(signing: SigningConfig) -> bool:
    """Whether a development key may sign here."""
    return signing.channel == "development"


def require_intact(report: Report) -> None:
    """Raise BundleError for what does not verify right after signing."""
    if not report.intact:
        raise BundleError(f"the bundle does not verify right after signing: {report.describe()}")
