"""A bundle is verified before anything in it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.bundle.release import CONTENT, Refusal
from pipeline.bundle.verify import Report, verify
from pipeline.errors import BundleError
from pipeline.workspace import ARTIFACTS, GENAI_CONFIG, Workspace


class Refused(BundleError):
    """What verifies is a signed refusal: a variant that did not pass, and no model to load."""


def verified(bundle: Path, public_keys: Sequence[Path]) -> Report:
    """The report on a bundle that verifies, a development bundle included; its model lies in `bundle / CONTENT`.

    Args:
        public_keys: PEM files, any one of which may have signed; none: those in artifacts/keys, which signed here.

    Raises:
        Refused: it is a signed refusal.
        BundleError: it is no bundle, there is no key, or something is wrong with it.
    """
    if (bundle / GENAI_CONFIG).is_file():
        raise BundleError(
            f"{bundle} is a model's folder, not a bundle's, which holds {CONTENT}/ and model.sig. Name the bundle, or "
            f"give --unverified to load the folder as it is."
        )
    if not (bundle / CONTENT).is_dir():
        known = sorted(str(found.parent) for found in (ARTIFACTS / "bundles").glob("*/*/model.sig"))
        here = f"Bundles here: {', '.join(known)}." if known else "`dvc repro` makes those of configs/pipeline.yaml."
        raise BundleError(f"{bundle} is no folder of a bundle: it has no {CONTENT}/. {here}")
    keys = list(public_keys) or sorted((ARTIFACTS / "keys").glob("*.pem"))
    if not keys:
        raise BundleError(
            f"there is no key to verify {bundle} with: artifacts/keys holds none that signed here. Give --public-key "
            f"KEY, the PEM file of whom you trust to have made it."
        )
    report = verify(bundle, keys, allow_development=True)
    if not report.ok:
        wrong = "; ".join(map(str, report.findings))
        if report.intact and isinstance(report.document, Refusal):
            artifact = Workspace(report.document.model).artifact(report.document.variant)
            raise Refused(f"{bundle} holds no model: {wrong}. To try it all the same: --unverified {artifact}")
        raise BundleError(f"{bundle} does not verify under {' or '.join(report.trusted)}: {wrong}.")
    return report
