"""OpenSSF Model Signing (OMS) v1.0: one signature over the SHA-256 of every file of a content folder.

A signature file is a Sigstore bundle holding a DSSE envelope, which holds an in-toto statement with a digest per file.
The stock `model_signing verify key` accepts what `sign` writes; unlike the stock signer's, it is the same bytes every
time (sorted JSON, RFC 6979), names the signing key, and leaves out no file whatever it is called.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from pipeline import files
from pipeline.bundle.keys import SigningKey, key_id, public_pem
from pipeline.bundle.release import SAFE_NAME, FileName, Model, Record, parse
from pipeline.config.typed_yaml import Sha256
from pipeline.errors import BundleError
from pipeline.machine import cores

PAYLOAD_TYPE = "application/vnd.in-toto+json"


class Kind(StrEnum):
    """What can be wrong with a bundle. With one of the first three, its signature file proves nothing."""

    MALFORMED_SIGNATURE = "malformed-signature"
    OTHER_KEY = "other-key"
    INVALID_SIGNATURE = "invalid-signature"
    MISSING_SIGNATURE = "missing-signature"
    MISSING = "missing"
    EXTRA = "extra"
    UNLISTED = "unlisted"
    RENAMED = "renamed"
    EXCHANGED = "exchanged"
    MODIFIED = "modified"
    TRUNCATED = "truncated"
    EXTENDED = "extended"
    SYMLINK = "symlink"
    NOT_A_FILE = "not-a-file"
    MALFORMED_DOCUMENT = "malformed-document"
    DISAGREES = "disagrees"
    SWAPPED = "swapped"
    SWAPPED_TIER = "swapped-tier"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    DOWNGRADED = "downgraded"
    APP_VERSION = "app-version"
    DEVELOPMENT_KEY = "development-key"
    REFUSAL = "refusal"


class SignatureError(BundleError):
    """A signature file that does not prove what it should; `kind` says in which way."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# --- the signature file, level by level; field names are the formats' own -------------------------------------------


class _DsseSignature(Record):
    sig: str
    keyid: str


class _Envelope(Record):
    payload: str
    payloadType: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[_DsseSignature], Field(min_length=1, max_length=1)]


class _Material(Record):
    publicKey: Annotated[dict[Literal["hint"], Sha256], Field(min_length=1)]
    tlogEntries: Annotated[list[Any], Field(max_length=0)]


class _SigstoreBundle(Record):
    mediaType: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verificationMaterial: _Material
    dsseEnvelope: _Envelope


class _Subject(Record):
    name: str
    digest: Annotated[dict[Literal["sha256"], Sha256], Field(min_length=1)]


class _Serialization(Record):
    """No `ignore_paths`: a statement that lets files be ignored is not one of ours."""

    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: Literal[False]


class _Resource(Record):
    name: FileName
    algorithm: Literal["sha256"]
    digest: Sha256


class _Predicate(Record):
    serialization: _Serialization
    resources: Annotated[list[_Resource], Field(min_length=1)]


class _Statement(Record):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=1)]
    predicateType: Literal["https://model_signing/signature/v1.0"]
    predicate: _Predicate


def pae(payload: bytes) -> bytes:
    """DSSE v1 pre-authentication encoding of an in-toto payload: the bytes that are signed."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def root_digest(digests: list[str]) -> str:
    """The statement's digest of all files: SHA-256 over their digests in the order listed."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


# --- signing -------------------------------------------------------------------------------------------------------


def _digests(content: Path) -> dict[str, str]:
    """SHA-256 of every file by its name, in sorted order, git's files too; in bounded memory, several at a time.

    A phone unpacks plain files into one folder: anything else in `content` is a mistake of ours, found here.
    """
    try:
        entries = sorted(os.scandir(content), key=lambda entry: entry.name)
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                kind = "a symlink" if entry.is_symlink() else "not a regular file"
                rule, remedy = "A content folder holds regular files only", "make it again with the bundle stage"
                raise BundleError(f"{content}: {entry.name!a} is {kind}. {rule}; {remedy}, which uses hard links.")
            if not SAFE_NAME.fullmatch(entry.name):
                rule = "Names are letters, digits, '.', '_' and '-', and do not start with '.'."
                raise BundleError(f"{content} holds a file that cannot be signed: {entry.name!a}. {rule}")
        with ThreadPoolExecutor(cores()) as pool:
            found = pool.map(files.sha256_of, [content / entry.name for entry in entries])
            return {entry.name: digest for entry, digest in zip(entries, found, strict=True)}
    except OSError as error:
        raise BundleError(f"{content} cannot be signed: {error.strerror}. Run the bundle stage first.") from None


def sign(content: Path, signature: Path, key: SigningKey) -> None:
    """Write an OMS signature over all files of `content` to `signature` (outside it), atomically.

    Equal content and key give equal bytes, except for keys in a PKCS#11 token.

    Raises:
        BundleError: `content` is missing, empty, or holds a symlink, folder or device, or a name that no bundle may
            hold; or the token refuses to sign.
    """
    digests = _digests(content)
    if not digests:
        raise BundleError(f"{content} is empty: there is nothing to sign. Run the bundle stage again.")
    root = root_digest(list(digests.values()))
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": content.name, "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": name, "algorithm": "sha256", "digest": it} for name, it in digests.items()],
        },
    }
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    proof = {"sig": base64.b64encode(key.sign(pae(payload))).decode(), "keyid": key.identity.id}
    hint = hashlib.sha256(public_pem(key.public_key)).hexdigest()  # the stock verifier compares it
    material = {"publicKey": {"hint": hint}, "tlogEntries": []}
    encoded = base64.b64encode(payload).decode()
    envelope = {"payload": encoded, "payloadType": PAYLOAD_TYPE, "signatures": [proof]}
    media_type = "application/vnd.dev.sigstore.bundle.v0.3+json"
    bundle = {"mediaType": media_type, "verificationMaterial": material, "dsseEnvelope": envelope}
    files.write_json(signature, bundle)


# --- reading -------------------------------------------------------------------------------------------------------


def _decode(text: str, what: str) -> bytes:
    with suppress(ValueError):
        data = base64.b64decode(text, validate=True)
        if base64.b64encode(data).decode() == text:
            return data
    raise SignatureError(Kind.MALFORMED_SIGNATURE, f"its {what} is not base64")


def _parse(kind: type[Model], raw: bytes, what: str) -> Model:
    try:
        return parse(kind, raw)
    except ValueError as error:
        raise SignatureError(Kind.MALFORMED_SIGNATURE, f"{what} ({error})") from None


def _signer(public_keys: Mapping[str, ec.EllipticCurvePublicKey], signature: bytes, payload: bytes) -> str | None:
    for name, key in public_keys.items():
        with suppress(InvalidSignature):
            key.verify(signature, pae(payload), ec.ECDSA(hashes.SHA256()))
            return name
    return None


def authenticate(raw: bytes, public_keys: Sequence[ec.EllipticCurvePublicKey]) -> tuple[str, dict[str, str]]:
    """The id of the one of `public_keys` that made a signature file's bytes, and the digests that it signed.

    Digests are name → SHA-256 (64 hex digits). Nothing in the statement is read before one of the keys verified it.
    Names are plain file names, and are still only to be compared with names found in the folder, never opened.

    Raises:
        SignatureError: malformed, made with another key, not made by the key it names, or a statement that `sign`
            does not make.
    """
    bundle, trusted = (
        _parse(_SigstoreBundle, raw, "it is not an OMS signature"),
        {key_id(key): key for key in public_keys},
    )
    proof = bundle.dsseEnvelope.signatures[0]
    payload, signature = _decode(bundle.dsseEnvelope.payload, "payload"), _decode(proof.sig, "signature")
    signer = _signer(trusted, signature, payload)
    if signer is None and proof.keyid not in trusted:
        message = f"signed with the key {proof.keyid!a}, but the key to trust is {' or '.join(trusted)}"
        raise SignatureError(Kind.OTHER_KEY, message)
    if signer is None:
        message = f"it names the key {proof.keyid}, but that key did not sign this statement"
        raise SignatureError(Kind.INVALID_SIGNATURE, message)
    hint = hashlib.sha256(public_pem(trusted[signer])).hexdigest()
    if proof.keyid != signer or bundle.verificationMaterial.publicKey["hint"] != hint:
        message = f"the key {signer} signed it, but it names another (its label was changed)"
        raise SignatureError(Kind.MALFORMED_SIGNATURE, message)
    return signer, _read_statement(payload)


def _read_statement(payload: bytes) -> dict[str, str]:
    statement = _parse(_Statement, payload, "the signed statement is none that this pipeline makes")
    resources, root = statement.predicate.resources, statement.subject[0].digest["sha256"]
    digests = {resource.name: resource.digest for resource in resources}
    faults = {
        "names a file twice": len(digests) != len(resources),
        "names two files that differ only in case": len({name.casefold() for name in digests}) != len(digests),
        "has another root digest than its files": root_digest([item.digest for item in resources]) != root,
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise SignatureError(Kind.MALFORMED_SIGNATURE, f"the signed statement {fault}")
    return digests


def open_signature(raw: bytes, *public_keys: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """The signed digests of a signature file's bytes. Raises SignatureError as `authenticate`."""
    return authenticate(raw, public_keys)[1]
