"""sign: an OpenSSF Model Signing signature over a bundle's content, then verification from the bundle alone."""

from __future__ import annotations

from pathlib import Path

from pipeline import config
from pipeline.bundle.keys import SigningKey, announced_key, export_public_key, load_signer
from pipeline.bundle.release import CONTENT, SIGNATURE, assemble, build_time
from pipeline.bundle.signing import sign
from pipeline.bundle.tiers import assign, build_tiers
from pipeline.bundle.verify import Report, verify, verify_tiers
from pipeline.errors import BundleError
from pipeline.files import sha256_of
from pipeline.stages.bundle import commit_time
from pipeline.stages.candidate import candidate
from pipeline.stages.workspace import Workspace, public_key_path


def run(model: str, variant: str) -> None:
    """Write artifacts/bundles/<model>/<variant>/model.sig and verify the bundle as a phone would."""
    workspace, signing = Workspace(model), config.load_signing()
    bundle = workspace.bundle(variant)
    workspace.require(bundle / CONTENT, "bundle", variant)
    key = _sign(bundle, signing)
    report = verify(
        bundle, public_key_path(key.identity.id), allow_development=_development(signing), model=model, variant=variant
    )
    _require_intact(report)
    print(f"{model} {variant}: signed by {key.identity.kind} key {key.identity.id}, verified from the bundle alone")


def tiers(model: str) -> None:
    """Write and sign artifacts/tiers/<model>/content/tiers.json: each tier's bundle, or its refusal with figures."""
    workspace, signing, wanted = Workspace(model), config.load_signing(), config.load_tiers()
    variants = config.load_pipeline().variants
    decisions = assign(wanted, [candidate(workspace, variant, wanted.context) for variant in variants])
    signatures = {
        variant: sha256_of(workspace.require(workspace.bundle(variant) / SIGNATURE, "sign", variant))
        for variant in variants
    }
    document = build_tiers(
        model=model,
        signing=signing,
        key=announced_key(signing),
        created=build_time(commit_time()),
        context=wanted.context,
        decisions=decisions,
        signatures=signatures,
    )
    assemble(workspace.tiers / CONTENT, {}, document)
    key = _sign(workspace.tiers, signing)
    allow = _development(signing)
    _require_intact(
        verify_tiers(workspace.tiers, public_key_path(key.identity.id), allow_development=allow, model=model)
    )
    for name, decision in decisions.items():
        print(f"{model} {name}: {decision.variant if decision.decision == 'bundle' else 'nothing'}")


def _sign(folder: Path, signing: config.SigningConfig) -> SigningKey:
    key = load_signer(signing)
    export_public_key(key, public_key_path(key.identity.id))
    sign(folder / CONTENT, folder / SIGNATURE, key)
    return key


def _development(signing: config.SigningConfig) -> bool:
    return signing.channel == "development"


def _require_intact(report: Report) -> None:
    if not report.intact:
        raise BundleError(f"the bundle does not verify right after signing: {report.describe()}")
