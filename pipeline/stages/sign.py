"""sign: an OpenSSF Model Signing signature over a bundle's content, then verification from the bundle alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.bundle.keys import export_public_key, load_signer
from pipeline.bundle.release import CONTENT, SIGNATURE, KeyIdentity
from pipeline.bundle.signing import sign
from pipeline.bundle.verify import Report, verify
from pipeline.config.signing import SigningConfig, load_signing
from pipeline.errors import BundleError
from pipeline.keys.commit import require_committed
from pipeline.workspace import Workspace, public_key_path


def run(model: str, variant: str) -> None:
    """Write artifacts/bundles/<model>/<variant>/model.sig and verify the bundle as a phone would."""
    workspace = Workspace(model)
    workspace.require(workspace.bundle(variant) / CONTENT, "bundle", variant)
    key = sign_folder(workspace.bundle(variant), load_signing(), verify, model=model, variant=variant)
    print(f"{model} {variant}: signed by {key.kind} key {key.id}, verified from the bundle alone")


def sign_folder(folder: Path, signing: SigningConfig, check: Callable[..., Report], **wanted: str) -> KeyIdentity:
    """Sign the content of a bundle or of tiers.json, keep the public half of the key for `verify`, and check it as
    `wanted`. Raises BundleError for what does not verify, ConfigError as `require_committed`."""
    require_committed(signing)
    key = load_signer(signing)
    public = public_key_path(key.identity.id)
    export_public_key(key, public)
    sign(folder / CONTENT, folder / SIGNATURE, key)
    report = check(folder, public, allow_development=signing.channel == "development", **wanted)
    if not report.intact:
        raise BundleError(f"the bundle does not verify right after signing: {report.describe()}")
    return key.identity
