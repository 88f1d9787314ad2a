"""record-release: what the ratchet of the next build compares with, kept in git beside the limits."""

from __future__ import annotations

import yaml

from pipeline.bundle.release import CONTENT, Release
from pipeline.bundle.verify import verify
from pipeline.config.signing import ReleasedBuild, load_released, load_signing
from pipeline.config.typed_yaml import CONFIGS
from pipeline.errors import BundleError
from pipeline.files import write_bytes
from pipeline.judge.verdicts import Verdict
from pipeline.workspace import Workspace, public_key_path

_HEADER = """\
# Releases that were cut, by model and variant, for the ratchet of configs/gates.yaml: a build is compared with the last
# release before its own number. `python -m pipeline record-release MODEL VARIANT` writes this file; commit it.
"""


def record(model: str, variant: str) -> None:
    """Add the signed bundle of a release to configs/released.yaml.

    Raises:
        BundleError: the bundle is not one that a phone would accept, the metrics are not those that it was judged by,
            or its release number was recorded with other figures.
    """
    build, path = _released_build(model, variant), CONFIGS / "released.yaml"
    released = load_released().model_dump(mode="json")["models"]
    builds = {entry["release"]: entry for entry in released.setdefault(model, {}).get(variant, ())}
    if builds.setdefault(build.release, entry := build.model_dump(mode="json")) != entry:
        known = f"release {build.release} of {model} {variant} with a mean KL of {builds[build.release]['kl_mean']:.4g}"
        remedy = "A release number is given once: raise `release` in configs/signing.yaml and run `dvc repro`."
        raise BundleError(f"{path} has {known} nats, this bundle has {build.kl_mean:.4g}. {remedy}")
    released[model][variant] = [builds[number] for number in sorted(builds)]
    text = _HEADER + yaml.safe_dump({"models": released}, default_flow_style=None, width=110)
    write_bytes(path, text.encode())
    print(f"{model} {variant}: release {build.release} is in {path}; commit it with the release.")


def _released_build(model: str, variant: str) -> ReleasedBuild:
    signing, workspace = load_signing(), Workspace(model)
    if signing.channel != "release":
        raise BundleError(f"configs/signing.yaml has channel {signing.channel!r}: only releases are recorded.")
    bundle = workspace.require(workspace.bundle(variant), "sign", variant)
    found = verify(bundle, public_key_path(signing.key_id), model=model, variant=variant)
    if not found.ok or not isinstance(found.document, Release):
        findings = "; ".join(map(str, found.findings))
        raise BundleError(f"{bundle}: only a release that verifies is recorded, but {findings}.")
    metrics = workspace.read(workspace.measurements(variant), "validate", variant).get("divergence", {})
    verdict = Verdict.from_json(found.document.verdict)
    judged = next((line.estimate for line in verdict.lines if line.name == "kl_mean"), None)
    if judged is None or judged != metrics.get("kl_mean"):
        measured = f"{workspace.measurements(variant)} has {metrics.get('kl_mean')}: not the same build"
        remedy = "Run `dvc repro`, or check the release's commit out."
        raise BundleError(f"{bundle / CONTENT} was judged at a mean KL of {judged} nats, {measured}. {remedy}")
    fields = {key: metrics[key] for key in ("kl_mean", "tokens", "perplexity_reference")}
    return ReleasedBuild(release=found.document.release, **fields)
