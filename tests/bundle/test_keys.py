"""Keys: one development key per machine, release keys from the environment, and no secret where it can be read."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pipeline.bundle import keys
from pipeline.config.signing import SigningConfig
from pipeline.errors import BundleError


def config(key_id: str = "development", channel: str = "development") -> SigningConfig:
    return SigningConfig(channel=channel, key_id=key_id, release=1, expires_days=1, min_app_version=1)


def works(key: keys.SigningKey) -> bool:
    key.public_key.verify(key.sign(b"message"), b"message", ec.ECDSA(hashes.SHA256()))  # raises if not
    return True


# --- the development key -------------------------------------------------------------------------------------------


def test_it_is_created_once_private_and_loudly(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first = keys.load_signer(config())
    assert works(first) and first.identity.kind == "development"
    path = workplace / ".keys/development.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(caplog.records) == 1 and "WARNING" in caplog.text and "a release refuses it" in caplog.text
    before = path.read_bytes()
    assert keys.load_signer(config()).identity == first.identity == keys.announced_key(config())
    assert path.read_bytes() == before and len(caplog.records) == 1
    assert os.listdir(path.parent) == ["development.pem"]


def test_processes_that_start_together_share_one_key(workplace: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        identities = set(pool.map(lambda _: keys.announced_key(config()).id, range(8)))
    assert len(identities) == 1 and os.listdir(".keys") == ["development.pem"]


def test_the_warning_and_repr_hold_no_secret(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = keys.load_signer(config())
    secret_lines = (workplace / ".keys/development.pem").read_text().split("\n")[1:-2]
    assert secret_lines and not any(line in caplog.text + repr(key) for line in secret_lines)


def test_a_release_refuses_it_even_by_its_id(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = keys.announced_key(config())
    assert keys.announced_key(config(identity.id)).kind == "development"
    monkeypatch.setenv(keys.KEY_FILE, ".keys/development.pem")
    with pytest.raises(BundleError, match="channel 'release' refuses development keys"):
        keys.load_signer(config(identity.id, "release"))


def test_a_release_creates_none(workplace: Path) -> None:
    with pytest.raises(BundleError, match=f"names the key {'a' * 64}, but no private key was given"):
        keys.load_signer(config("a" * 64, "release"))
    assert not (workplace / ".keys").exists()


def test_an_unusable_file_is_an_error_and_kept(workplace: Path) -> None:
    (workplace / ".keys").mkdir()
    (workplace / ".keys/development.pem").write_bytes(b"mine")
    with pytest.raises(BundleError, match="is not a private key in PEM form"):
        keys.load_signer(config())
    assert (workplace / ".keys/development.pem").read_bytes() == b"mine"


# --- release keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "password"),
    [
        (keys.KEY_FILE, None),
        (keys.KEY_TEXT, None),
        (keys.KEY_FILE, b"correct horse"),
        (keys.KEY_TEXT, b"correct horse"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_release_key_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, maker: Any, pem: Any, variable: str, password: bytes | None
) -> None:
    text, workplace = pem(maker.private, password), Path.cwd()
    (workplace / "release.pem").write_bytes(text)
    monkeypatch.setenv(variable, "release.pem" if variable == keys.KEY_FILE else text.decode())
    if password:
        monkeypatch.setenv(keys.PASSWORD, password.decode())
    key = keys.load_signer(config(maker.key.identity.id, "release"))
    assert works(key) and key.identity == maker.key.identity and key.identity.kind == "release"
    assert key.sign(b"m") == key.sign(b"m") == maker.key.sign(b"m")  # deterministic
    assert not (workplace / ".keys").exists()


def test_the_id_is_the_hash_of_the_der_public_key(maker: Any, tmp_path: Path) -> None:
    der = maker.private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    keys.export_public_key(maker.key, tmp_path / "public.pem")
    assert keys.key_id(keys.load_public_key(tmp_path / "public.pem")) == hashlib.sha256(der).hexdigest()
    assert b"PRIVATE" not in (tmp_path / "public.pem").read_bytes()


def test_another_key_than_configured_names_both(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, maker: Any, stranger: Any, pem: Any
) -> None:
    monkeypatch.setenv(keys.KEY_TEXT, pem(stranger.private).decode())
    with pytest.raises(BundleError, match=f"{stranger.key.identity.id}.*{maker.key.identity.id}"):
        keys.load_signer(config(maker.key.identity.id, "release"))
    with pytest.raises(BundleError, match=f"{stranger.key.identity.id}, but .* names development"):
        keys.load_signer(config())


def bad_keys(pem: Any, maker: Any) -> dict[str, tuple[dict[str, str], str]]:
    """Environment → message; every value must stay out of the error."""
    plain, locked = pem(maker.private).decode(), pem(maker.private, b"right").decode()
    p384, edwards = pem(ec.generate_private_key(ec.SECP384R1())), pem(ed25519.Ed25519PrivateKey.generate())
    return {
        "garbage": ({keys.KEY_TEXT: plain.replace("M", "*")}, "is not a private key in PEM form"),
        "cut off": ({keys.KEY_TEXT: plain[:90]}, "is not a private key in PEM form"),
        "locked": ({keys.KEY_TEXT: locked}, f"is encrypted: set {keys.PASSWORD}"),
        "wrong password": ({keys.KEY_TEXT: locked, keys.PASSWORD: "wr0ng"}, "is not its password"),
        "needless password": ({keys.KEY_TEXT: plain, keys.PASSWORD: "s3cret"}, "is not encrypted: unset"),
        "P-384": ({keys.KEY_TEXT: p384.decode()}, "curve secp384r1"),
        "Ed25519": ({keys.KEY_TEXT: edwards.decode()}, "another kind than ECDSA"),
        "no file": ({keys.KEY_FILE: "nowhere.pem"}, "cannot be read: No such file"),
        "key text in the file variable": ({keys.KEY_FILE: plain}, "the key file cannot be read"),
        "two keys": ({keys.KEY_TEXT: plain, keys.KEY_FILE: "x"}, "are both set"),
        "not a URI": ({keys.KEY_PKCS11: "token=x?pin-value=1234"}, "PKCS#11|cannot be opened"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "garbage",
        "cut off",
        "locked",
        "wrong password",
        "needless password",
        "P-384",
        "Ed25519",
        "no file",
        "key text in the file variable",
        "two keys",
        "not a URI",
    ],
)
def test_a_bad_key_is_an_error_without_its_bytes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, maker: Any, pem: Any, case: str
) -> None:
    environment, message = bad_keys(pem, maker)[case]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BundleError, match=message) as caught:
        keys.load_signer(config(maker.key.identity.id, "release"))
    shown = "".join(traceback.format_exception(caught.value))
    secrets = [line for value in environment.values() for line in value.split("\n") if "---" not in line and line]
    assert not any(secret in shown for secret in secrets if secret not in ("x", "nowhere.pem"))


# --- PKCS#11 -------------------------------------------------------------------------------------------------------


def test_without_the_package_it_is_named(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PyKCS11", None)
    monkeypatch.setenv(keys.KEY_PKCS11, "pkcs11:token=t;object=k?pin-value=1234")
    with pytest.raises(BundleError, match=re.escape("pip install 'model-signing[pkcs11]'")) as caught:
        keys.load_signer(config("a" * 64, "release"))
    assert "1234" not in "".join(traceback.format_exception(caught.value))


def softhsm_module() -> str | None:
    """SoftHSM's library, if this machine has it and its tool."""
    places = [os.environ.get("SOFTHSM2_MODULE", ""), "/usr/lib/softhsm/*.so", "/usr/lib/*/softhsm/*.so"]
    found = [path for place in places for path in glob.glob(place) if path.endswith("libsofthsm2.so")]
    return found[0] if found and shutil.which("softhsm2-util") else None


@pytest.fixture
def token(workplace: Path, monkeypatch: pytest.MonkeyPatch, maker: Any, pem: Any) -> str:
    """The URI of the release key in a software token."""
    pytest.importorskip("PyKCS11", reason="optional: pip install 'model-signing[pkcs11]'")
    module = softhsm_module()
    if module is None:
        pytest.skip("optional: SoftHSM 2 is not installed")
    (workplace / "tokens").mkdir()
    (workplace / "softhsm.conf").write_text(f"directories.tokendir = {workplace / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(workplace / "softhsm.conf"))
    (workplace / "key.pem").write_bytes(pem(maker.private))
    pins = ["--module", module, "--pin", "4321"]
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "release", "--so-pin", "98765", *pins], check=True
    )
    importing = ["--import", "key.pem", "--token", "release", "--label", "signer", "--id", "01"]
    subprocess.run(["softhsm2-util", *importing, *pins], check=True)
    return f"pkcs11:token=release;object=signer?module-path={module}&pin-value=4321"


def test_a_token_signs_what_everybody_accepts(
    token: str, monkeypatch: pytest.MonkeyPatch, maker: Any, bundle: Path, public_key: Path
) -> None:
    from pipeline.bundle.signing import open_signature, sign

    monkeypatch.setenv(keys.KEY_PKCS11, token)
    key = keys.load_signer(config(maker.key.identity.id, "release"))
    assert works(key) and "4321" not in repr(key)
    sign(bundle / "content", bundle / "model.sig", key)
    assert "LICENSE" in open_signature((bundle / "model.sig").read_bytes(), maker.private.public_key())


@pytest.mark.parametrize("change", [("4321", "1111"), ("object=signer", "object=nobody"), ("token=release", "token=x")])
def test_a_token_that_cannot_be_opened(
    token: str, monkeypatch: pytest.MonkeyPatch, maker: Any, change: tuple[str, str]
) -> None:
    monkeypatch.setenv(keys.KEY_PKCS11, token.replace(*change))
    with pytest.raises(BundleError, match="cannot be opened") as caught:
        keys.load_signer(config(maker.key.identity.id, "release"))
    assert not re.search("4321|1111", "".join(traceback.format_exception(caught.value)))
