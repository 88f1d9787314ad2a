"""Test vectors: bundles, good and spoilt, with what every verifier of ours must say about them.

One folder per case: `bundle/`, as it would lie on a phone, and `vector.json`, the question and the expected answer. The
verifiers in verifiers/ and `verify` here are tested over all of them, so an app developer's copy can be, too. The same
bytes on every machine: the keys come from constants, and are good for nothing but this.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.bundle.release import CONTENT, SIGNATURE
from pipeline.bundle.samples import (
    BUNDLE,
    FILES,
    OTHER_PART,
    PART,
    RELEASE,
    accept_evil,
    added,
    append_evil,
    cut,
    edited,
    exchange_parts,
    first_signature,
    flipped,
    known_key,
    linked,
    list_again,
    mistaken,
    mistaken_text,
    no_document,
    pinned,
    restated,
    spoilt,
    to_folder,
    two_documents,
    with_text,
    write_bundle,
    write_refusal,
    write_tiers,
)
from pipeline.bundle.verify import Kind
from pipeline.errors import BundleError

VECTOR = "vector.json"


@dataclass(frozen=True)
class _Question:
    """What a verifier is asked; `pinned` are names of test keys."""

    kind: str = "bundle"
    pinned: tuple[str, ...] = ("current", "next")
    now: str = "2026-03-02T12:00:00Z"
    highest_release: int | None = 7
    allow_development: bool = False
    app_version: int | None = 12
    tier: str | None = "android-8gb"
    model: str | None = "demo"
    variant: str | None = "q4"


@dataclass(frozen=True)
class _Case:
    """`make` writes a bundle to a folder; `findings` are the expected (kind, file), none if it is good."""

    title: str
    make: Callable[[Path], Any]
    findings: tuple[tuple[Kind, str], ...] = ()
    question: _Question = field(default_factory=_Question)


# --- the cases -------------------------------------------------------------------------------------------------------


def _good() -> dict[str, _Case]:
    bare = _Question(highest_release=None, app_version=None, tier=None, model=None, variant=None)
    asked = _Question(pinned=("development",), allow_development=True)
    return {
        "good": _Case("a release", write_bundle),
        "good-nothing-asked": _Case("a release, of which only the signature is asked", write_bundle, (), bare),
        "good-same-release": _Case("the release that is installed, again", write_bundle),
        "good-one-key": _Case("a release, one key pinned", write_bundle, (), _Question(pinned=("current",))),
        "good-next-key": _Case("a release after the rotation", lambda folder: write_bundle(folder, "next")),
        "good-last-second": _Case(
            "a second before it expires", write_bundle, (), _Question(now="2027-01-31T11:59:59Z")
        ),
        "good-slow-clock": _Case("a clock within a day of it", write_bundle, (), _Question(now="2026-01-30T12:00:00Z")),
        "good-app-at-the-edges": _Case("the highest app version", write_bundle, (), _Question(app_version=20)),
        "good-development": _Case(
            "the development channel", lambda folder: write_bundle(folder, "development"), (), asked
        ),
        "good-tiers": _Case("a map of tiers", write_tiers, (), _Question(kind="tiers", variant=None)),
    }


def _of_signatures() -> dict[str, _Case]:
    stranger, current = known_key("stranger"), known_key("current")
    malformed, other = ((Kind.MALFORMED_SIGNATURE, SIGNATURE),), ((Kind.OTHER_KEY, SIGNATURE),)
    invalid = ((Kind.INVALID_SIGNATURE, SIGNATURE),)

    def case(title: str, make: Callable[[Path], Any], findings: Any = malformed) -> _Case:
        return _Case(title, make, findings)

    return {
        "signature-absent": _Case(
            "no signature",
            spoilt(lambda folder: (folder / SIGNATURE).unlink()),
            ((Kind.MISSING_SIGNATURE, SIGNATURE),),
        ),
        "signature-empty": case("an empty signature file", cut(SIGNATURE, 0)),
        "signature-cut": case("a signature file cut off", cut(SIGNATURE, 300)),
        "signature-trailing": case("text after the signature's JSON", with_text(SIGNATURE, "\n}\n", "\n} {}")),
        "signature-nested": case(
            "deeply nested JSON", spoilt(lambda folder: (folder / SIGNATURE).write_text("[" * 50_000))
        ),
        "signature-not-utf8": case(
            "bytes that are no text", spoilt(lambda folder: (folder / SIGNATURE).write_bytes(b'{"a": "\xff"}'))
        ),
        "signature-key-twice": case(
            "a key twice in the envelope",
            with_text(SIGNATURE, '"mediaType"', '"mediaType": "application/json", "mediaType"'),
        ),
        "signature-extra-field": case("an unknown field", edited(lambda value: value.update(trustMe=True))),
        "signature-media-type": case(
            "another media type", edited(lambda value: value.update(mediaType="application/json"))
        ),
        "signature-none": case(
            "an envelope without signatures", edited(lambda value: value["dsseEnvelope"].update(signatures=[]))
        ),
        "signature-two": case(
            "an envelope with two signatures",
            edited(lambda value: value["dsseEnvelope"]["signatures"].append(first_signature(value))),
        ),
        "signature-payload-type": case(
            "another payload type", edited(lambda value: value["dsseEnvelope"].update(payloadType="text/plain"))
        ),
        "signature-not-base64": case(
            "a payload that is not base64", edited(lambda value: value["dsseEnvelope"].update(payload="%%%"))
        ),
        "signature-label": case(
            "another key's name on a good signature",
            edited(lambda value: first_signature(value).update(keyid="c" * 64)),
        ),
        "signature-next-label": case(
            "the other pinned key's name on a good signature",
            edited(lambda value: first_signature(value).update(keyid=known_key("next").identity.id)),
        ),
        "signature-hint": case(
            "another key's hint on a good signature",
            edited(lambda value: value["verificationMaterial"]["publicKey"].update(hint="c" * 64)),
        ),
        "signature-edited": case(
            "signature bytes that are none", edited(lambda value: first_signature(value).update(sig="AAAA")), invalid
        ),
        "signature-statement-edited": case("a statement edited under its signature", restated(accept_evil), invalid),
        "signature-other-key": case(
            "signed again with a key that is not pinned", lambda folder: write_bundle(folder, signer="stranger"), other
        ),
        "signature-forged-label": case(
            "signed with another key under the pinned one's name",
            restated(lambda statement: None, stranger),
            invalid,
        ),
        "signature-next-not-pinned": _Case(
            "signed with the next key, which is not pinned",
            lambda folder: write_bundle(folder, "next"),
            other,
            _Question(pinned=("current",)),
        ),
        "statement-ignores": case(
            "a signed statement that lets files be ignored",
            restated(lambda value: value["predicate"]["serialization"].update(ignore_paths=[".github"]), current),
        ),
        "statement-symlinks": case(
            "a signed statement that allows symlinks",
            restated(lambda value: value["predicate"]["serialization"].update(allow_symlinks=True), current),
        ),
        "statement-path": case(
            "a signed name that leaves the folder",
            restated(lambda value: value["predicate"]["resources"][0].update(name="../../etc/passwd"), current),
        ),
        "statement-name-twice": case(
            "a signed name with two digests", restated(list_again("LICENSE", "d" * 64), current)
        ),
        "statement-case": case(
            "two signed names that differ in case", restated(list_again("license", "d" * 64), current)
        ),
        "statement-root": case(
            "another root digest",
            restated(lambda value: value["subject"][0]["digest"].update(sha256="d" * 64), current),
        ),
        "statement-predicate": case(
            "another predicate", restated(lambda value: value.update(predicateType="https://example/x"), current)
        ),
        "statement-no-files": case(
            "a signed statement about nothing",
            restated(lambda value: value["predicate"].update(resources=[]), current),
        ),
    }


def _of_files() -> dict[str, _Case]:
    def one(title: str, make: Callable[[Path], Any], kind: Kind, file: str = PART) -> _Case:
        return _Case(title, make, ((kind, file),))

    return {
        "file-flipped": one("one bit of a part flipped", flipped(PART), Kind.MODIFIED),
        "file-flipped-graph": one(
            "one bit of the graph", flipped("content/demo.onnx"), Kind.MODIFIED, "content/demo.onnx"
        ),
        "file-flipped-licence": one(
            "one bit of the licence", flipped("content/LICENSE"), Kind.MODIFIED, "content/LICENSE"
        ),
        "file-flipped-document": one("one bit of release.json", flipped(RELEASE), Kind.MODIFIED, RELEASE),
        "file-truncated": one("a part cut off", cut(PART, 4000), Kind.TRUNCATED),
        "file-emptied": one("a part emptied", cut(PART, 0), Kind.TRUNCATED),
        "file-extended": one("a part with bytes at its end", spoilt(append_evil), Kind.EXTENDED),
        "file-absent": one("a part missing", spoilt(lambda folder: (folder / PART).unlink()), Kind.MISSING),
        "file-renamed": one(
            "a part renamed", spoilt(lambda folder: (folder / PART).rename(folder / "content/x")), Kind.RENAMED
        ),
        "file-exchanged": _Case(
            "two parts exchanged",
            spoilt(exchange_parts),
            ((Kind.EXCHANGED, PART), (Kind.EXCHANGED, OTHER_PART)),
        ),
        "file-symlink": one("a part behind a symlink", linked(PART, "../../elsewhere"), Kind.SYMLINK),
        "file-folder": one("a folder in place of a part", spoilt(to_folder), Kind.NOT_A_FILE),
        "extra-file": one("a file too many", added("content/evil.so"), Kind.EXTRA, "content/evil.so"),
        "extra-hidden": one("a hidden file too many", added("content/.evil"), Kind.EXTRA, "content/.evil"),
        "extra-gitattributes": one(
            "a file that git tools skip", added("content/.gitattributes"), Kind.EXTRA, "content/.gitattributes"
        ),
        "extra-github": one(
            "a folder that git tools skip", added("content/.github/evil.so"), Kind.EXTRA, "content/.github"
        ),
        "extra-copy": one(
            "a copy of a part", added("content/copy", FILES["demo.onnx.data.0"]), Kind.EXTRA, "content/copy"
        ),
        "extra-symlink": one(
            "a symlink too many",
            spoilt(lambda folder: (folder / "content/x").symlink_to("LICENSE")),
            Kind.SYMLINK,
            "content/x",
        ),
        "beside-file": one("a file beside the content", added("evil.so"), Kind.UNLISTED, "evil.so"),
        "beside-folder": one("a folder beside the content", added("more/evil.so"), Kind.UNLISTED, "more"),
        "content-absent": one(
            "no content", spoilt(lambda folder: shutil.rmtree(folder / CONTENT)), Kind.MISSING, CONTENT
        ),
        "content-symlink": one("the content behind a symlink", linked(CONTENT, "../elsewhere"), Kind.SYMLINK, CONTENT),
        "signature-symlink": one(
            "the signature behind a symlink", linked(SIGNATURE, "../elsewhere"), Kind.SYMLINK, SIGNATURE
        ),
        "several": _Case(
            "a part cut off, a file too many, one beside",
            lambda folder: (cut(PART, 9)(folder), (folder / "content/.x").touch(), (folder / "y").touch()),
            ((Kind.EXTRA, "content/.x"), (Kind.TRUNCATED, PART), (Kind.UNLISTED, "y")),
        ),
    }


def _of_documents() -> dict[str, _Case]:
    entry = {"size": 1, "sha256": "d" * 64}

    def signed(title: str, make: Callable[[Path], Any], kind: Kind = Kind.MALFORMED_DOCUMENT) -> _Case:
        return _Case(title, make, ((kind, RELEASE),))

    def asked(title: str, kind: Kind, make: Callable[[Path], Any] = write_bundle, **question: Any) -> _Case:
        return _Case(title, make, ((kind, RELEASE),), _Question(**question))

    return {
        "expired": asked("the second it expires", Kind.EXPIRED, now="2027-01-31T12:00:00Z"),
        "clock-behind": asked("a clock from before it was made", Kind.NOT_YET_VALID, now="2026-01-30T11:59:59Z"),
        "downgraded": asked("an older release than the installed one", Kind.DOWNGRADED, highest_release=8),
        "app-too-old": asked("an app too old for it", Kind.APP_VERSION, app_version=9),
        "app-too-new": asked("an app too new for it", Kind.APP_VERSION, app_version=21),
        "other-model": asked("another model was asked for", Kind.SWAPPED, model="mimo-8b"),
        "other-variant": asked("another variant was asked for", Kind.SWAPPED, variant="q3"),
        "other-tier": asked("a tier that it does not name", Kind.SWAPPED_TIER, tier="android-4gb"),
        "no-tiers": signed("it names no tier", mistaken(lambda value: value.update(tiers=[])), Kind.SWAPPED_TIER),
        "development": asked(
            "the development channel, not allowed",
            Kind.DEVELOPMENT_KEY,
            lambda folder: write_bundle(folder, "development"),
            pinned=("development",),
        ),
        "development-as-release": signed(
            "a development key in the release channel",
            mistaken(lambda value: value["key"].update(kind="development")),
            Kind.DEVELOPMENT_KEY,
        ),
        "document-other-key": signed(
            "it names another key", mistaken(lambda value: value["key"].update(id="d" * 64)), Kind.DISAGREES
        ),
        "document-lists-more": signed(
            "it lists a file that is not signed",
            mistaken(lambda value: value["files"].update(more=entry)),
            Kind.DISAGREES,
        ),
        "document-lists-less": signed(
            "it lists a signed file not", mistaken(lambda value: value["files"].pop("LICENSE")), Kind.DISAGREES
        ),
        "document-other-digest": signed(
            "another digest than the signature's",
            mistaken(lambda value: value["files"]["LICENSE"].update(sha256="d" * 64)),
            Kind.DISAGREES,
        ),
        "document-no-json": signed("not JSON", mistaken_text("{", "{,")),
        "document-key-twice": signed("a key twice", mistaken_text('"release": 7', '"release": 7, "release": 9')),
        "document-nan": signed("NaN for a number", mistaken_text('"release": 7', '"release": NaN')),
        "document-no-expiry": signed("no expiry", mistaken(lambda value: value.pop("expires"))),
        "document-no-such-date": signed(
            "a day that does not exist", mistaken(lambda value: value.update(expires="2027-02-30T00:00:00Z"))
        ),
        "document-time-zone": signed(
            "a time in another form", mistaken(lambda value: value.update(expires="2027-01-31T12:00:00+00:00"))
        ),
        "document-text-for-number": signed("a number as text", mistaken(lambda value: value.update(release="7"))),
        "document-fraction": signed("a release with a fraction", mistaken_text('"release": 7', '"release": 7.0')),
        "document-truth-for-number": signed("true for a number", mistaken(lambda value: value.update(release=True))),
        "document-release-zero": signed("release 0", mistaken(lambda value: value.update(release=0))),
        "document-channel": signed("an unknown channel", mistaken(lambda value: value.update(channel="beta"))),
        "document-kind": signed("another kind", mistaken(lambda value: value.update(kind="refusal"))),
        "document-path": signed(
            "a file name that leaves the folder", mistaken(lambda value: value["files"].update({"../x": entry}))
        ),
        "document-size": signed("a negative size", mistaken(lambda value: value["files"]["LICENSE"].update(size=-1))),
        "document-two": _Case("a release and a refusal", spoilt(two_documents), ((Kind.MALFORMED_DOCUMENT, CONTENT),)),
        "document-none": _Case(
            "neither release nor refusal", spoilt(no_document), ((Kind.MALFORMED_DOCUMENT, CONTENT),)
        ),
        "refusal": _Case("a refusal in place of a bundle", write_refusal, ((Kind.REFUSAL, "content/refusal.json"),)),
        "tiers-for-a-bundle": _Case(
            "a map of tiers where a bundle was asked for", write_tiers, ((Kind.MALFORMED_DOCUMENT, CONTENT),)
        ),
        "tiers-other-tier": _Case(
            "a map that lacks the tier",
            write_tiers,
            ((Kind.SWAPPED_TIER, "content/tiers.json"),),
            _Question(kind="tiers", variant=None, tier="ios-8gb"),
        ),
        "tiers-downgraded": _Case(
            "an older map of tiers",
            write_tiers,
            ((Kind.DOWNGRADED, "content/tiers.json"),),
            _Question(kind="tiers", variant=None, highest_release=8),
        ),
    }


def cases() -> dict[str, _Case]:
    """All vectors by the name of their folder."""
    return _good() | _of_signatures() | _of_files() | _of_documents()


def _description(case: _Case) -> dict[str, Any]:
    question = case.question
    return {
        "title": case.title,
        "kind": question.kind,
        "pinned_keys": [pinned(name) for name in question.pinned],
        "now": question.now,
        "highest_release": question.highest_release,
        "allow_development": question.allow_development,
        "app_version": question.app_version,
        "tier": question.tier,
        "model": question.model,
        "variant": question.variant,
        "findings": [[str(kind), file] for kind, file in sorted(case.findings)],
    }


def write(folder: Path) -> list[str]:
    """Write all vectors to `folder`, which appears whole and replaces an earlier one; return their names.

    Raises:
        BundleError: `folder` holds something else than vectors, which would be lost.
        ResourceError: the disk is full or not writable.
    """
    strange = [entry.name for entry in folder.iterdir() if not (entry / VECTOR).is_file()] if folder.is_dir() else []
    if strange:
        raise BundleError(f"{folder} holds {strange[0]!a}, which is no vector. Name a folder of their own.")
    with files.atomic_directory(folder) as temporary:
        for name, case in sorted(cases().items()):
            case.make(temporary / name / BUNDLE)
            files.write_json(temporary / name / VECTOR, _description(case))
    return sorted(cases())
