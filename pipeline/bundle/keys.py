"""Signing keys: a local one for development, or a release key from the environment or a PKCS#11 token.

A private key is never a dependency of a stage, and its bytes and PIN never reach a log, an error message or a file
of ours other than .keys/development.pem. Only ECDSA on P-256 is accepted: it is what Android's JCA and Apple's
CryptoKit verify without extra libraries.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pipeline import files
from pipeline.bundle.release import KeyIdentity
from pipeline.config.signing import SigningConfig
from pipeline.errors import BundleError

DEVELOPMENT_KEY = Path(".keys/development.pem")
KEY_FILE = "PIPELINE_SIGNING_KEY_FILE"
KEY_TEXT = "PIPELINE_SIGNING_KEY"
KEY_PKCS11 = "PIPELINE_SIGNING_KEY_PKCS11"
PASSWORD = "PIPELINE_SIGNING_KEY_PASSWORD"

_SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
_LOG = logging.getLogger(__name__)
_KeyPair = tuple[ec.EllipticCurvePublicKey, Callable[[bytes], bytes]]  # public half, signing function


@dataclass(frozen=True)
class SigningKey:
    """A loaded key. `sign` takes the message and returns a DER-encoded ECDSA signature over its SHA-256."""

    identity: KeyIdentity
    public_key: ec.EllipticCurvePublicKey
    sign: Callable[[bytes], bytes] = field(repr=False)


def key_id(public_key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 (64 hex digits) of the key's DER SubjectPublicKeyInfo."""
    return hashlib.sha256(public_key.public_bytes(serialization.Encoding.DER, _SPKI)).hexdigest()


def public_pem(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """The key as PEM SubjectPublicKeyInfo: what apps pin, and what verifiers read."""
    return public_key.public_bytes(serialization.Encoding.PEM, _SPKI)


def export_public_key(key: SigningKey, path: Path) -> None:
    """Write the public half of `key` to `path` as PEM, atomically."""
    files.write_bytes(path, public_pem(key.public_key))


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a P-256 public key from a PEM file.

    Raises:
        BundleError: the file is missing, is no PEM public key, or holds another kind of key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise BundleError(f"public key {path} cannot be read: {error.strerror}.") from None
    except (ValueError, UnsupportedAlgorithm):
        expected = "a file that starts with -----BEGIN PUBLIC KEY-----; `openssl ec -in PRIVATE.pem -pubout` makes one"
        raise BundleError(f"{path} is not a public key in PEM form. Expected {expected}.") from None
    return _require_p256(key, str(path))


def load_public_keys(paths: Path | Sequence[Path]) -> list[ec.EllipticCurvePublicKey]:
    """The key of each PEM file: one, or the current and the next of a rotation; of a folder, of each in it. Raises
    BundleError as for one, and for a folder without any."""
    found: list[ec.EllipticCurvePublicKey] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        files = sorted(path.glob("*.pem")) if path.is_dir() else [path]
        if not files:
            raise BundleError(f"{path} holds no public key, which ends in .pem. Name a key, or a folder of keys.")
        found += map(load_public_key, files)
    return found


def _require_p256(key: Any, where: str) -> Any:
    curve = getattr(key, "curve", None)  # only keys of elliptic curves have one
    if not isinstance(curve, ec.SECP256R1):
        found = f"on curve {curve.name}" if curve else "of another kind than ECDSA"
        raise BundleError(f"{where} holds a key {found}. Use a P-256 key (prime256v1).")
    return key


# --- the development key -------------------------------------------------------------------------------------------


def _create_development_key() -> None:
    """Write a new key with mode 0600; when another process was first, its key stays."""
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    DEVELOPMENT_KEY.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=DEVELOPMENT_KEY.parent, prefix=".development.") as file:  # its mode is 0600
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, DEVELOPMENT_KEY)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return
    files.fsync(DEVELOPMENT_KEY.parent)
    _LOG.warning(
        f"WARNING: no development signing key was found, so {DEVELOPMENT_KEY} was created. It is good for trying the "
        f"pipeline on this machine and for nothing else: phones must not trust it, a release refuses it, and whoever "
        f"reads the file can sign in its name. For a release, set channel and key_id in configs/signing.yaml and "
        f"supply the key through {KEY_FILE}, {KEY_TEXT} or {KEY_PKCS11}."
    )


def _development_private_key() -> ec.EllipticCurvePrivateKey:
    try:
        if not DEVELOPMENT_KEY.exists():
            _create_development_key()
        pem = DEVELOPMENT_KEY.read_bytes()
    except OSError as error:
        raise BundleError(f"{DEVELOPMENT_KEY} cannot be made or read: {error.strerror}.") from None
    return _parse_private_key(pem, None, str(DEVELOPMENT_KEY))


def announced_key(config: SigningConfig) -> KeyIdentity:
    """The key that will sign under `config`, known before the private key is: release.json names it.

    Creates the development key on first use when `config` asks for it. A development key that is asked for by its id
    is still a development key.

    Raises:
        BundleError: the development key cannot be made or read, or is asked for in the release channel.
    """
    asked = config.key_id == "development"
    ours = key_id(_development_private_key().public_key()) if asked or DEVELOPMENT_KEY.exists() else ""
    if not asked and config.key_id != ours:
        return KeyIdentity(id=config.key_id, kind="release")
    if config.channel == "release":
        named = f"key_id {config.key_id} in configs/signing.yaml is {DEVELOPMENT_KEY}"
        raise BundleError(f"channel 'release' refuses development keys: {named}. Use a key made for releases.")
    return KeyIdentity(id=ours, kind="development")


# --- release keys --------------------------------------------------------------------------------------------------


def _parse_private_key(pem: bytes, password: bytes | None, where: str) -> ec.EllipticCurvePrivateKey:
    """Parse PEM; every error is ours and without the parser's text, which could quote what it was given."""
    try:
        key = serialization.load_pem_private_key(pem, password)
    except TypeError:
        need = "is encrypted: set" if password is None else "is not encrypted: unset"
        raise BundleError(f"{where} {need} {PASSWORD}.") from None
    except (ValueError, UnsupportedAlgorithm):
        hint = "" if password is None else f", or {PASSWORD} is not its password"
        raise BundleError(f"{where} is not a private key in PEM form{hint}.") from None
    return _require_p256(key, where)


def software_key(private: ec.EllipticCurvePrivateKey) -> _KeyPair:
    """Public half and signing function of a key in memory."""
    # RFC 6979: the nonce comes from key and message, so that equal content gives an equal signature.
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    return private.public_key(), lambda message: private.sign(message, algorithm)


def _pkcs11_key(uri: str) -> _KeyPair:
    """Log in to the token of an RFC 7512 URI with model_signing's PKCS#11 signer; its messages may hold the PIN."""
    try:
        import PyKCS11
        from model_signing._signing.sign_pkcs11 import Signer
    except ImportError:
        install = "Install it with `pip install 'model-signing[pkcs11]'`"
        raise BundleError(f"{KEY_PKCS11} is set, but PKCS#11 needs the package PyKCS11. {install}.") from None
    try:
        token: Any = Signer(uri)  # its own types say that no session is ever open
    except Exception as error:
        example = "pkcs11:token=NAME;object=KEY?module-path=/path/to/module.so&pin-source=/path/to/pin"
        wanted = f"Expected a URI such as {example}, with module, token, key pair and PIN present."
        raise BundleError(f"the key of {KEY_PKCS11} cannot be opened ({type(error).__name__}). {wanted}") from None

    def sign(message: bytes) -> bytes:
        digest = hashlib.sha256(message).digest()
        mechanism = PyKCS11.Mechanism(PyKCS11.CKM_ECDSA, None)
        try:
            raw = bytes(token.session.sign(token._private_key, digest, mecha=mechanism))
        except PyKCS11.PyKCS11Error as error:
            raise BundleError(f"the PKCS#11 token refused to sign ({type(error).__name__}).") from None
        return encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))

    return _require_p256(token.public_key(), f"the token of {KEY_PKCS11}"), sign


def _supplied_key(variable: str) -> _KeyPair:
    value, password = os.environ[variable], os.environ.get(PASSWORD, "").encode() or None
    if variable == KEY_PKCS11:
        return _pkcs11_key(value)
    try:
        pem = Path(value).read_bytes() if variable == KEY_FILE else value.encode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a path"
        raise BundleError(f"{variable}: the key file cannot be read: {reason}.") from None
    return software_key(_parse_private_key(pem, password, f"the key in {variable}"))


def load_signer(config: SigningConfig) -> SigningKey:
    """The private key that `config` names, ready to sign.

    It comes from exactly one of PIPELINE_SIGNING_KEY_FILE (path of a PEM file), PIPELINE_SIGNING_KEY (PEM text), both
    with PIPELINE_SIGNING_KEY_PASSWORD if encrypted, and PIPELINE_SIGNING_KEY_PKCS11 (RFC 7512 URI; its signatures are
    not reproducible, because tokens draw their own nonces). With none set, the development key signs.

    Raises:
        BundleError: no key or several are given, the key is unreadable or not P-256, or it is not the one that
            configs/signing.yaml names (both ids are named).
    """
    expected = announced_key(config)
    given = [variable for variable in (KEY_FILE, KEY_TEXT, KEY_PKCS11) if os.environ.get(variable)]
    if len(given) > 1:
        raise BundleError(f"{' and '.join(given)} are both set; which key should sign? Unset all but one.")
    if not given and expected.kind == "release":
        needed = f"configs/signing.yaml names the key {expected.id}, but no private key was given"
        raise BundleError(f"{needed}. Set {KEY_FILE}, {KEY_TEXT} or {KEY_PKCS11}.")
    if not given:
        return SigningKey(expected, *software_key(_development_private_key()))
    public, sign = _supplied_key(given[0])
    if key_id(public) != expected.id:
        wanted = f"{config.key_id} ({expected.id})" if config.key_id == "development" else config.key_id
        found = f"the key in {given[0]} has the id {key_id(public)}, but configs/signing.yaml names {wanted}"
        raise BundleError(f"{found}. Set key_id to the former, or supply the latter.")
    return SigningKey(expected, public, sign)
