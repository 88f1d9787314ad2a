"""packs: what the stores take, from the signed tiers.json and the signed bundles that it names."""

from __future__ import annotations

from pathlib import Path

from pipeline.bundle.keys import announced_key
from pipeline.bundle.release import SIGNATURE, Document, Release
from pipeline.bundle.tiers import TiersDocument
from pipeline.bundle.verify import Report, verify, verify_tiers
from pipeline.config.signing import load_signing
from pipeline.errors import BundleError
from pipeline.files import atomic_directory, read_json, sha256_of
from pipeline.packs.android import plan_android, write_android
from pipeline.packs.android_rules import check_android, describe_android
from pipeline.packs.app_bundle import check_app_bundle, run_bundletool
from pipeline.packs.delivery import INDEX, Packable, packable
from pipeline.packs.ios import plan_ios, write_ios
from pipeline.packs.ios_rules import check_ios, describe_ios
from pipeline.workspace import Workspace, public_key_path


def run(model: str) -> None:
    """Write artifacts/packs/<model>/{android,ios} after verifying what goes in, and check them against every rule."""
    workspace = Workspace(model)
    document, bundles = _verified(workspace)
    android, ios = plan_android(document, bundles), plan_ios(document, bundles)
    with atomic_directory(workspace.packs) as folder:
        write_android(folder / "android", android, bundles)
        write_ios(folder / "ios", ios, bundles)
        problems = check_android(folder / "android") + check_ios(folder / "ios")
        if errors := [problem for problem in problems if not problem.note]:
            raise BundleError(f"{model}: the stores would refuse these packs: {'; '.join(map(str, errors))}")
    print(*problems, describe_android(workspace.packs / "android"), describe_ios(workspace.packs / "ios"), sep="\n")


def _verified(workspace: Workspace) -> tuple[TiersDocument, dict[str, Packable]]:
    """The signed tiers and the bundles that they name, each verified with the key that signs this release."""
    signing = load_signing()
    key, allow = public_key_path(announced_key(signing).id), signing.channel == "development"
    workspace.require(workspace.tiers / SIGNATURE, "tiers")
    report = verify_tiers(workspace.tiers, key, allow_development=allow, model=workspace.model)
    document = _document(report, TiersDocument)
    bundles = {}
    for variant, reference in document.bundles.items():
        folder = workspace.bundle(variant)
        signature = workspace.require(folder / SIGNATURE, "sign", variant)
        if (found := sha256_of(signature)) != reference.signature_sha256:
            raise BundleError(
                f"{folder}: tiers.json names the bundle whose {SIGNATURE} has sha256 {reference.signature_sha256}, "
                f"found {found}. Run `python -m pipeline tiers {workspace.model}` after signing."
            )
        report = verify(folder, key, allow_development=allow, model=workspace.model, variant=variant)
        bundles[variant] = packable(folder, _document(report, Release), workspace.tiers)
    return document, bundles


def _document(report: Report, kind: type[Document]) -> Document:
    if not report.ok or not isinstance(report.document, kind):
        raise BundleError(f"nothing was packed, because what goes in does not verify: {report.describe()}")
    return report.document


def check(folder: Path, previous: Path | None, aab: Path | None, bundletool: Path | None) -> int:
    """Print every rule that `folder` breaks and its totals; return 1 if there is an error among them, else 0.

    Raises:
        BundleError: the folder is no store folder, an option does not fit it, or a tool cannot be run.
    """
    try:
        platform = read_json(folder / INDEX)["platform"]
    except (OSError, ValueError, KeyError, TypeError):
        platform = None
    if platform not in ("android", "ios"):
        raise BundleError(
            f"{folder}: no {INDEX} that says for which store it is. Name the android or ios folder of "
            f"artifacts/packs/<model>."
        )
    if platform == "ios" and (aab or bundletool):
        raise BundleError(f"{folder} is for iOS: --aab and --bundletool are for an Android folder.")
    if platform == "android" and previous:
        raise BundleError(f"{folder} is for Android, where packs have no ids of their own: --previous is for iOS.")
    if bundletool and not aab:
        raise BundleError(
            "bundletool reads app bundles: build one with these modules (./gradlew :app:bundleRelease) and name it "
            "with --aab."
        )
    if platform == "android":
        problems, totals = check_android(folder), describe_android(folder)
    else:
        problems, totals = check_ios(folder, previous), describe_ios(folder)
    if aab:
        problems += check_app_bundle(aab, folder)
    print(*problems, totals, sep="\n")
    if bundletool and aab:
        print(run_bundletool(bundletool, aab))
    errors = sum(not problem.note for problem in problems)
    print(f"{folder}: {errors} errors" if errors else f"{folder}: OK")
    return min(errors, 1)
