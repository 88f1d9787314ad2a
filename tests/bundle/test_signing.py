"""Signatures: the stock verifier accepts them, and equal content gives equal bytes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundle.signing import Kind, SignatureError, open_signature, sign
from pipeline.errors import BundleError


def stock_verify(bundle: Path, public_key: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`model_signing verify key` as anybody would run it."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", *options]
    arguments = [str(bundle / "content"), "--signature", str(bundle / "model.sig"), "--public_key", str(public_key)]
    return subprocess.run(command + arguments, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [(), ("--no-ignore-git-paths",)])
def test_the_stock_verifier_accepts_it(good_bundle: Path, public_key: Path, options: tuple[str, ...]) -> None:
    result = stock_verify(good_bundle, public_key, *options)
    assert result.returncode == 0 and "Verification succeeded" in result.stdout, result.stderr
    assert "WARNING" not in result.stdout


def test_the_stock_verifier_refuses_a_changed_file(bundle: Path, public_key: Path) -> None:
    (bundle / "content/tokenizer.json").write_bytes(b"{}")
    result = stock_verify(bundle, public_key)
    assert result.returncode == 1 and "tokenizer.json" in result.stderr


def test_two_signings_are_the_same_bytes(maker: Any, tmp_path: Path) -> None:
    """Everything is built twice from scratch, in folders of different names and ages."""
    first, second = maker.bundle(tmp_path / "first"), maker.bundle(tmp_path / "second" / "deeper")
    os.utime(second / "content/LICENSE", (0, 0))
    maker.sign(second)
    for name in ("model.sig", "content/release.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_signature_covers_every_file_and_nothing_else(good_bundle: Path, maker: Any) -> None:
    digests = open_signature((good_bundle / "model.sig").read_bytes(), maker.private.public_key())
    assert set(digests) == set(os.listdir(good_bundle / "content"))


def test_a_statement_signed_by_another_key_is_not_read(good_bundle: Path, stranger: Any) -> None:
    with pytest.raises(SignatureError) as caught:
        open_signature((good_bundle / "model.sig").read_bytes(), stranger.private.public_key())
    assert caught.value.kind is Kind.OTHER_KEY


def test_no_private_material_in_the_outputs(good_bundle: Path, maker: Any, pem: Any) -> None:
    secret = maker.private.private_numbers().private_value.to_bytes(32, "big")
    lines = [line for line in pem(maker.private).split(b"\n")[1:-2] if line]
    forms = [secret, secret.hex().encode(), base64.b64encode(secret), *lines]
    for path in good_bundle.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "model.sig":
                data += base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"])
            assert not any(form in data for form in forms)
    assert secret.hex() not in repr(maker.key) and "function" not in repr(maker.key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "No such file"),
        (lambda c: [path.unlink() for path in c.iterdir()], "nothing to sign"),
        (lambda c: (c / "link").symlink_to("LICENSE"), "'link' is a symlink"),
        (lambda c: (c / "folder").mkdir(), "'folder' is not a regular file"),
        (lambda c: os.mkfifo(c / "pipe"), "'pipe' is not a regular file"),
        (lambda c: (c / ".gitattributes").write_bytes(b""), "cannot be signed: .*'.gitattributes'"),
        (lambda c: (c / "a b").write_bytes(b""), "cannot be signed: .*'a b'"),
    ],
)
def test_what_cannot_be_signed_leaves_the_old_signature(bundle: Path, maker: Any, spoil: Any, message: str) -> None:
    before = (bundle / "model.sig").read_bytes()
    spoil(bundle / "content")
    with pytest.raises(BundleError, match=message):
        sign(bundle / "content", bundle / "model.sig", maker.key)
    assert (bundle / "model.sig").read_bytes() == before
    assert {path.name for path in bundle.iterdir()} <= {"content", "model.sig"}


def test_files_that_git_and_the_stock_signer_skip_are_covered(maker: Any, bundle: Path, public_key: Path) -> None:
    """The stock verifier's default lets `.github/evil.so` pass; ours does not (test_verify); the flag closes it too."""
    (bundle / "content/.github").mkdir()
    (bundle / "content/.github/evil.so").write_bytes(b"evil")
    assert stock_verify(bundle, public_key).returncode == 0
    assert stock_verify(bundle, public_key, "--no-ignore-git-paths").returncode == 1
