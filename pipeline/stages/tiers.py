"""tiers: which class of phones gets which bundle, or why it gets none; signed."""

from __future__ import annotations

from pipeline.bundle.keys import announced_key
from pipeline.bundle.release import CONTENT, SIGNATURE, assemble, build_time
from pipeline.bundle.tiers import assign, build_tiers
from pipeline.bundle.verify import verify_tiers
from pipeline.config.models import load_pipeline
from pipeline.config.phones import load_tiers
from pipeline.config.signing import load_signing
from pipeline.files import sha256_of
from pipeline.judge.measured import judged
from pipeline.stages.sign import sign_folder
from pipeline.workspace import Workspace


def run(model: str) -> None:
    """Write and sign artifacts/tiers/<model>/content/tiers.json: each tier's bundle, or its refusal with figures."""
    workspace, signing, wanted = Workspace(model), load_signing(), load_tiers()
    signed = {variant: workspace.bundle(variant) / SIGNATURE for variant in load_pipeline().variants}
    decisions = assign(wanted, [judged(workspace, variant) for variant in signed])
    document = build_tiers(
        model=model,
        signing=signing,
        key=announced_key(signing),
        created=build_time(),
        context=wanted.context,
        decisions=decisions,
        signatures={variant: sha256_of(workspace.require(file, "sign", variant)) for variant, file in signed.items()},
    )
    assemble(workspace.tiers / CONTENT, {}, document)
    sign_folder(workspace.tiers, signing, verify_tiers, model=model)
    for name, decision in decisions.items():
        what = "nothing"
        if decision.decision == "bundle":
            what = f"{decision.variant}, weights {decision.way.weights}, {decision.way.context:,} tokens"
        print(f"{model} {name}: {what}")
