"""tiers: which class of phones gets which bundle, or why it gets none; signed."""

from __future__ import annotations

from pipeline import config
from pipeline.bundle.keys import announced_key
from pipeline.bundle.release import CONTENT, SIGNATURE, assemble, build_time
from pipeline.bundle.tiers import assign, build_tiers
from pipeline.bundle.verify import verify_tiers
from pipeline.files import sha256_of
from pipeline.stages.bundle import commit_time
from pipeline.stages.footprints import judged
from pipeline.stages.sign import is_development, require_intact, sign_folder
from pipeline.stages.workspace import Workspace, public_key_path


def run(model: str) -> None:
    """Write and sign artifacts/tiers/<model>/content/tiers.json: each tier's bundle, or its refusal with figures."""
    workspace, signing, wanted = Workspace(model), config.load_signing(), config.load_tiers()
    variants = config.load_pipeline().variants
    decisions = assign(wanted, [judged(workspace, variant) for variant in variants])
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
    key = sign_folder(workspace.tiers, signing)
    report = verify_tiers(
        workspace.tiers, public_key_path(key.identity.id), allow_development=is_development(signing), model=model
    )
    require_intact(report)
    for name, decision in decisions.items():
        print(f"{model} {name}: {decision.variant if decision.decision == 'bundle' else 'nothing'}")
