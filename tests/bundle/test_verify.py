"""Every way to spoil a bundle that we could think of is found, under its own name and with the figures."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.bundle import release, signing, tiers
from pipeline.bundle.keys import public_pem
from pipeline.bundle.release import FileEntry
from pipeline.bundle.trust import ReleaseMemory
from pipeline.bundle.verify import Finding, Kind, Report, verify, verify_tiers
from pipeline.errors import BundleError
from tests.bundle.conftest import WAY

CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)
NOW = CREATED + timedelta(days=30)
PART = "content/demo_q4.onnx.data.0"


def check(bundle: Path, public_key: Path, **changes: Any) -> Report:
    options = {"now": NOW, "highest_release": 7, "model": "demo", "variant": "q4"}
    return verify(bundle, public_key, **(options | changes))


def kinds(report: Report) -> list[str]:
    return [str(finding.kind) for finding in report.findings]


def test_a_good_bundle_is_ok(good_bundle: Path, public_key: Path) -> None:
    report = check(good_bundle, public_key)
    assert report.ok and report.intact and report.findings == ()
    assert isinstance(report.document, release.Release) and report.document.variant == "q4"
    assert "OK, demo release 7" in report.describe() and report.trusted[0] in report.describe()


# --- tampering without a key ---------------------------------------------------------------------------------------


def edit_signature(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "model.sig"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_payload(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    def apply(value: dict[str, Any]) -> None:
        statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
        change(statement)
        value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    edit_signature(bundle, apply)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def replace_by_link(bundle: Path, name: str) -> None:
    """The same bytes as before, but through a symlink."""
    elsewhere = (bundle / name).rename(bundle.parent / "elsewhere")
    (bundle / name).symlink_to(elsewhere)


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def add(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"evil")


def accept_evil(statement: dict[str, Any]) -> None:
    """What an attacker would like the statement to say about the first part."""
    statement["predicate"]["resources"][1]["digest"] = hashlib.sha256(b"evil").hexdigest()


def to_socket(path: Path) -> None:
    """A socket; its path is short because the system allows about 100 characters."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def repeat_key(bundle: Path) -> None:
    text = (bundle / "model.sig").read_text()
    (bundle / "model.sig").write_text(text.replace('"mediaType"', '"mediaType": "text/plain", "mediaType"', 1))


def loosen_base64(value: dict[str, Any]) -> None:
    """Other text for the same bytes: bits that base64 ignores are set."""
    proof = value["dsseEnvelope"]["signatures"][0]
    body = proof["sig"].rstrip("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    loose = body[:-1] + alphabet[alphabet.index(body[-1]) + 1]
    proof["sig"] = loose + "=" * (len(proof["sig"]) - len(body))
    assert len(proof["sig"]) > len(body), "needs a signature whose base64 is padded"


def undo_signature_and_relabel(bundle: Path) -> None:
    edit_signature(bundle, lambda value: value["dsseEnvelope"]["signatures"][0].update(keyid="c" * 64))


TAMPERS: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    # signature file
    "no signature": (lambda b: (b / "model.sig").unlink(), ["missing-signature"], "nothing in this bundle is proven"),
    "empty signature": (lambda b: (b / "model.sig").write_bytes(b""), ["malformed-signature"], "not an OMS signature"),
    "signature is not JSON": (lambda b: (b / "model.sig").write_bytes(b"\xff{"), ["malformed-signature"], "JSON"),
    "signature is deeply nested": (
        lambda b: (b / "model.sig").write_text("[" * 100_000),
        ["malformed-signature"],
        "recursion",
    ),
    "signature is huge": (lambda b: os.truncate(b / "model.sig", 17 << 20), ["malformed-signature"], "not an OMS"),
    "signature cut off": (lambda b: os.truncate(b / "model.sig", 300), ["malformed-signature"], "JSON"),
    "signature of another media type": (
        lambda b: edit_signature(b, lambda v: v.update(mediaType="application/json")),
        ["malformed-signature"],
        "mediaType",
    ),
    "signature with an extra field": (
        lambda b: edit_signature(b, lambda v: v.update(trustMe=True)),
        ["malformed-signature"],
        "trustMe",
    ),
    "no signatures in the envelope": (
        lambda b: edit_signature(b, lambda v: v["dsseEnvelope"].update(signatures=[])),
        ["malformed-signature"],
        "signatures",
    ),
    "two signatures in the envelope": (
        lambda b: edit_signature(b, lambda v: v["dsseEnvelope"]["signatures"].append({"sig": "", "keyid": ""})),
        ["malformed-signature"],
        "signatures",
    ),
    "another payload type": (
        lambda b: edit_signature(b, lambda v: v["dsseEnvelope"].update(payloadType="text/plain")),
        ["malformed-signature"],
        "payloadType",
    ),
    "payload is not base64": (
        lambda b: edit_signature(b, lambda v: v["dsseEnvelope"].update(payload="%%%")),
        ["malformed-signature"],
        "payload is not base64",
    ),
    "statement edited": (lambda b: edit_payload(b, accept_evil), ["invalid-signature"], "did not sign this statement"),
    "statement and part edited": (
        lambda b: (edit_payload(b, accept_evil), (b / PART).write_bytes(b"evil")),
        ["invalid-signature"],
        "did not sign this statement",
    ),
    "statement lets a file be ignored": (
        lambda b: edit_payload(b, lambda s: s["predicate"]["serialization"].update(ignore_paths=["evil.so"])),
        ["invalid-signature"],
        "did not sign this statement",
    ),
    "signature bytes edited": (
        lambda b: edit_signature(b, lambda v: v["dsseEnvelope"]["signatures"][0].update(sig="AAAA")),
        ["invalid-signature"],
        "did not sign this statement",
    ),
    "key label changed": (undo_signature_and_relabel, ["malformed-signature"], "its label was changed"),
    "key hint changed": (
        lambda b: edit_signature(b, lambda v: v["verificationMaterial"]["publicKey"].update(hint="c" * 64)),
        ["malformed-signature"],
        "its label was changed",
    ),
    "a key twice in the envelope": (repeat_key, ["malformed-signature"], "'mediaType' appears twice"),
    "text after the envelope": (
        lambda b: (b / "model.sig").open("a").write("{}"),
        ["malformed-signature"],
        "not an OMS signature",
    ),
    "envelope in UTF-16": (
        lambda b: (b / "model.sig").write_text((b / "model.sig").read_text(), encoding="utf-16"),
        ["malformed-signature"],
        "not an OMS signature",
    ),
    "signature is a pipe": (lambda b: to_fifo(b / "model.sig"), ["not-a-file"], "prw"),
    "signature is a symlink": (lambda b: replace_by_link(b, "model.sig"), ["symlink"], "elsewhere"),
    "signature is a folder": (lambda b: to_directory(b / "model.sig"), ["not-a-file"], "expected a regular file"),
    # files
    "one bit flipped": (lambda b: flip(b / PART), ["modified"], "expected sha256"),
    "bytes appended": (lambda b: (b / PART).open("ab").write(b"x"), ["extended"], "found 16,385: 1 bytes too many"),
    "truncated": (lambda b: os.truncate(b / PART, 16_000), ["truncated"], "expected 16,384 bytes, found 16,000: 384"),
    "emptied": (lambda b: os.truncate(b / "content/tokenizer.json", 0), ["truncated"], "found 0: 19"),
    "removed": (lambda b: (b / PART).unlink(), ["missing"], "found no such file"),
    "renamed": (lambda b: (b / PART).rename(b / "content/demo.data"), ["renamed"], "it is here as demo.data"),
    "renamed in case only": (
        lambda b: (b / "content/LICENSE").rename(b / "content/license"),
        ["renamed"],
        "it is here as license",
    ),
    "two parts exchanged": (
        lambda b: swap(b / PART, b / "content/demo_q4.onnx.data.1"),
        ["exchanged", "exchanged"],
        "holds the bytes of demo_q4.onnx.data.1",
    ),
    "extra file": (lambda b: add(b / "content/evil.so"), ["extra"], "a file of 4 bytes"),
    "extra hidden file": (lambda b: add(b / "content/.evil"), ["extra"], "a file of 4 bytes"),
    "extra .gitattributes": (lambda b: add(b / "content/.gitattributes"), ["extra"], "a file of 4 bytes"),
    "extra .github folder": (lambda b: add(b / "content/.github/evil.so"), ["extra"], "a folder"),
    "extra .git folder": (lambda b: add(b / "content/.git/config"), ["extra"], "a folder"),
    "extra name with control characters": (lambda b: add(b / "content/a\x1b[2Jb"), ["extra"], "a file of 4 bytes"),
    "extra name that is not text": (lambda b: add(b / "content" / os.fsdecode(b"\xff")), ["extra"], "a file of 4"),
    "extra copy of a part": (lambda b: shutil.copy(b / PART, b / "content/copy"), ["extra"], "16,384 bytes"),
    "signature among the files": (lambda b: shutil.copy(b / "model.sig", b / "content"), ["extra"], "does not cover"),
    "file became a symlink": (lambda b: replace_by_link(b, PART), ["symlink"], "elsewhere"),
    "extra symlink": (lambda b: (b / "content/x").symlink_to("/etc/passwd"), ["symlink"], "/etc/passwd"),
    "file became a folder": (lambda b: to_directory(b / PART), ["not-a-file"], "expected a regular file"),
    "file became a pipe": (lambda b: to_fifo(b / PART), ["not-a-file"], "prw"),
    "extra pipe": (lambda b: os.mkfifo(b / "content/pipe"), ["not-a-file"], "prw"),
    "extra socket": (lambda b: to_socket(b / "content/socket"), ["not-a-file"], "srw"),
    "extra symlink to a folder": (lambda b: (b / "content/x").symlink_to("/tmp"), ["symlink"], "/tmp"),
    "extra symlink to nothing": (lambda b: (b / "content/x").symlink_to("nowhere"), ["symlink"], "nowhere"),
    "extra symlink to itself": (lambda b: (b / "content/x").symlink_to("x"), ["symlink"], "x"),
    "extra name with a line break": (lambda b: add(b / "content/a\nOK"), ["extra"], "a file of 4 bytes"),
    "extra name that turns text around": (lambda b: add(b / "content/a\u202egnp.so"), ["extra"], "a file of 4 bytes"),
    "extra twin in other case": (lambda b: add(b / "content/license"), ["extra"], "differs only in case from LICENSE"),
    "a part of a terabyte": (
        lambda b: os.truncate(b / PART, 1 << 40),
        ["extended"],
        "1,099,511,611,392 bytes too many",
    ),
    "an extra file of a terabyte for a missing one": (
        lambda b: (os.truncate(b / PART, 1 << 40), (b / PART).rename(b / "content/big")),
        ["extra", "missing"],
        "a file of 1,099,511,627,776 bytes",
    ),
    "release.json of a terabyte": (
        lambda b: os.truncate(b / "content/release.json", 1 << 40),
        ["modified"],
        "1,099,511,627,776 bytes",
    ),
    "two names exchanged with a document": (
        lambda b: swap(b / "content/release.json", b / "content/LICENSE"),
        ["exchanged", "exchanged"],
        "holds the bytes of release.json",
    ),
    "release.json edited": (
        lambda b: (b / "content/release.json").write_text(
            (b / "content/release.json").read_text().replace('"release": 7', '"release": 9')
        ),
        ["modified"],
        "expected sha256",
    ),
    "release.json removed": (lambda b: (b / "content/release.json").unlink(), ["missing"], "found no such file"),
    # layout
    "file beside the content": (lambda b: add(b / "evil.so"), ["unlisted"], "no signature covers it"),
    "hidden file beside the content": (lambda b: add(b / ".evil"), ["unlisted"], "no signature covers it"),
    "folder beside the content": (lambda b: add(b / "more/evil"), ["unlisted"], "no signature covers it"),
    "no content": (lambda b: shutil.rmtree(b / "content"), ["missing"], "no content folder"),
    "content is a symlink": (lambda b: replace_by_link(b, "content"), ["symlink"], "elsewhere"),
    "content is a file": (
        lambda b: (shutil.rmtree(b / "content"), (b / "content").write_bytes(b"")),
        ["not-a-file"],
        "expected a folder",
    ),
    "several at once": (
        lambda b: (flip(b / PART), add(b / "content/.x"), (b / "content/LICENSE").unlink()),
        ["extra", "missing", "modified"],
        "expected sha256",
    ),
}


@pytest.mark.parametrize("case", TAMPERS)
def test_tampering_is_found_under_its_own_name(bundle: Path, public_key: Path, case: str) -> None:
    tamper, expected, fragment = TAMPERS[case]
    tamper(bundle)
    report = check(bundle, public_key)
    assert kinds(report) == expected
    assert fragment in report.describe()
    assert report.describe().replace("\n", "").isprintable() and not report.ok and not report.intact


def test_there_are_enough_cases() -> None:
    assert len(TAMPERS) >= 60


def test_one_flipped_bit_of_any_file(good_bundle: Path, public_key: Path, tmp_path: Path) -> None:
    """Each file of the content in turn; of the signature file every byte in some places of each level."""
    for name in sorted(os.listdir(good_bundle / "content")):
        bundle = Path(shutil.copytree(good_bundle, tmp_path / name))
        flip(bundle / "content" / name)
        findings = check(bundle, public_key).findings
        assert [(finding.kind, finding.file) for finding in findings] == [(Kind.MODIFIED, f"content/{name}")]
    bundle = Path(shutil.copytree(good_bundle, tmp_path / "signature"))
    original = (bundle / "model.sig").read_bytes()
    for place in range(0, len(original), 41):
        if not original[place : place + 1].isspace():
            (bundle / "model.sig").write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
            assert not check(bundle, public_key).ok, place


def test_base64_has_one_form(bundle: Path, public_key: Path, maker: Any) -> None:
    """Equal signatures in other text would be other files under the digest that tiers.json pins."""
    path = bundle / "content/LICENSE"
    while not json.loads((bundle / "model.sig").read_text())["dsseEnvelope"]["signatures"][0]["sig"].endswith("="):
        path.write_bytes(path.read_bytes() + b".")
        maker.sign(bundle)
    edit_signature(bundle, loosen_base64)
    report = check(bundle, public_key)
    assert kinds(report) == ["malformed-signature"] and "signature is not base64" in report.describe()


def test_a_file_is_modified_with_both_digests_and_sizes(bundle: Path, public_key: Path) -> None:
    before = hashlib.sha256((bundle / PART).read_bytes()).hexdigest()
    (bundle / PART).write_bytes(b"x" * 16_384)
    after = hashlib.sha256(b"x" * 16_384).hexdigest()
    message = f"expected sha256 {before} (16,384 bytes), found {after} (16,384 bytes)"
    assert check(bundle, public_key).findings == (Finding(Kind.MODIFIED, PART, message),)


def test_nothing_is_parsed_before_the_signature(bundle: Path, public_key: Path) -> None:
    """A malformed release.json shows only that the signature is wrong: the file was not looked into."""
    (bundle / "content/release.json").write_bytes(b"{")
    edit_payload(bundle, accept_evil)
    report = check(bundle, public_key)
    assert kinds(report) == ["invalid-signature"] and report.document is None


def test_an_edited_document_is_never_handed_out(bundle: Path, public_key: Path) -> None:
    flip(bundle / "content/release.json")
    assert check(bundle, public_key).document is None


# --- somebody who can sign -----------------------------------------------------------------------------------------


def test_signed_with_another_key_names_both(bundle: Path, public_key: Path, stranger: Any) -> None:
    stranger.sign(bundle)
    report = check(bundle, public_key)
    assert kinds(report) == ["other-key"]
    assert stranger.key.identity.id in report.describe() and report.trusted[0] in report.describe()


def test_another_key_under_the_trusted_keys_label(bundle: Path, public_key: Path, stranger: Any, maker: Any) -> None:
    stranger.sign(bundle)
    relabel = {"keyid": maker.key.identity.id}
    edit_signature(bundle, lambda value: value["dsseEnvelope"]["signatures"][0].update(relabel))
    assert kinds(check(bundle, public_key)) == ["invalid-signature"]


def test_signature_of_another_bundle(bundle: Path, public_key: Path, maker: Any, tmp_path: Path) -> None:
    other = maker.bundle(tmp_path / "other", variant="q3")
    shutil.copy(other / "model.sig", bundle)
    assert kinds(check(bundle, public_key)) == ["modified"]


@pytest.mark.parametrize(("asked", "value"), [("model", "mimo-8b"), ("variant", "q3")])
def test_swapped_bundle(good_bundle: Path, public_key: Path, asked: str, value: str) -> None:
    report = check(good_bundle, public_key, **{asked: value})
    assert kinds(report) == ["swapped"]
    assert f"expected {asked} '{value}', found" in report.describe()


def test_downgrade(good_bundle: Path, public_key: Path) -> None:
    report = check(good_bundle, public_key, highest_release=8)
    assert kinds(report) == ["downgraded"] and "expected release 8 or later, found 7" in report.describe()


@pytest.mark.parametrize(
    ("version", "least", "most", "ok"),
    [
        (1, 1, None, True),
        (0, 1, None, False),
        (99, 1, None, True),
        (5, 1, 5, True),
        (6, 1, 5, False),
        (None, 9, 9, True),
    ],
)
def test_app_versions(
    maker: Any, public_key: Path, tmp_path: Path, version: int | None, least: int, most: int | None, ok: bool
) -> None:
    signing = maker.config.model_copy(update={"min_app_version": least, "max_app_version": most})
    report = check(maker.bundle(tmp_path / "made", signing=signing), public_key, app_version=version)
    assert kinds(report) == ([] if ok else ["app-version"])
    assert ok or f"this app has version {version}" in report.describe()


@pytest.mark.parametrize(
    ("tiers_named", "tier", "message"),
    [
        (["android-8gb"], "android-8gb", None),
        (["android-8gb", "ios-8gb"], "android-4gb", "expected tier 'android-4gb', but it is for android-8gb, ios-8gb"),
        ([], "android-8gb", "expected tier 'android-8gb', but it is for no tier"),
    ],
)
def test_a_bundle_for_another_tier(
    maker: Any, public_key: Path, tmp_path: Path, tiers_named: list[str], tier: str, message: str | None
) -> None:
    report = check(maker.bundle(tmp_path / "made", tiers=dict.fromkeys(tiers_named, WAY)), public_key, tier=tier)
    assert kinds(report) == (["swapped-tier"] if message else [])
    assert message is None or message in report.describe()


def test_a_clock_from_before_the_release_proves_no_freshness(good_bundle: Path, public_key: Path) -> None:
    assert check(good_bundle, public_key, now=CREATED - timedelta(days=1)).ok
    report = check(good_bundle, public_key, now=CREATED - timedelta(days=1, seconds=1))
    assert kinds(report) == ["not-yet-valid"] and "with such a clock none expires" in report.describe()


def test_either_of_two_pinned_keys_may_sign(
    good_bundle: Path, public_key: Path, maker: Any, stranger: Any, tmp_path: Path
) -> None:
    """A rotation: the app pins both, and the next key signs; whoever pins only the old one refuses it."""
    (tmp_path / "next.pem").write_bytes(public_pem(stranger.private.public_key()))
    pins = [public_key, tmp_path / "next.pem"]
    rotated = stranger.bundle(tmp_path / "rotated")
    before, after = check(good_bundle, pins), check(rotated, pins)
    assert before.ok and after.ok
    assert (before.signer, after.signer) == (maker.key.identity.id, stranger.key.identity.id)
    assert kinds(check(rotated, public_key)) == ["other-key"]
    with pytest.raises(BundleError, match="without a public key"):
        check(rotated, [])


def test_a_folder_of_keys_trusts_each_of_them(
    good_bundle: Path, public_key: Path, stranger: Any, tmp_path: Path
) -> None:
    """`artifacts/keys/*.pem` in a shell is an error once there is a second key."""
    folder = tmp_path / "keys"
    folder.mkdir()
    with pytest.raises(BundleError, match="holds no public key"):
        check(good_bundle, folder)
    (folder / "stranger.pem").write_bytes(public_pem(stranger.private.public_key()))
    assert not check(good_bundle, folder).ok
    shutil.copy(public_key, folder / "ours.pem")
    assert check(good_bundle, folder).ok


def test_the_next_key_is_announced(maker: Any, stranger: Any, public_key: Path, tmp_path: Path) -> None:
    signing = maker.config.model_copy(update={"next_key_id": stranger.key.identity.id})
    report = check(maker.bundle(tmp_path / "made", signing=signing), public_key)
    assert report.ok and report.document.next_key_id == stranger.key.identity.id


def test_a_rollback_against_the_memory(good_bundle: Path, public_key: Path, tmp_path: Path) -> None:
    memory = ReleaseMemory(tmp_path / "state.json")
    assert check(good_bundle, public_key, memory=memory, highest_release=None).ok
    memory.record("demo", 99)
    memory.record("demo/q3", 99)
    memory.record("demo/q4", 7)
    assert check(good_bundle, public_key, memory=memory, highest_release=None).ok
    memory.record("demo/q4", 8)
    report = check(good_bundle, public_key, memory=memory, highest_release=3)
    assert kinds(report) == ["downgraded"] and "expected release 8 or later" in report.describe()


@pytest.mark.parametrize(("moment", "ok"), [(timedelta(days=365, seconds=-1), True), (timedelta(days=365), False)])
def test_expiry_to_the_second(good_bundle: Path, public_key: Path, moment: timedelta, ok: bool) -> None:
    report = check(good_bundle, public_key, now=CREATED + moment)
    assert kinds(report) == ([] if ok else ["expired"])
    assert ok or "it expired on 2027-01-31T12:00:00Z" in report.describe()


def test_the_clock_is_the_default_time(maker: Any, public_key: Path, tmp_path: Path) -> None:
    old = maker.bundle(tmp_path / "old", created=datetime(2001, 1, 1, tzinfo=UTC))
    assert kinds(verify(old, public_key)) == ["expired"]


def test_a_refusal_is_not_a_bundle(maker: Any, public_key: Path, tmp_path: Path) -> None:
    report = check(maker.refusal(tmp_path / "refused"), public_key)
    assert kinds(report) == ["refusal"] and report.intact and not report.ok
    assert "mean KL 0.31, limit 0.10" in report.describe()


def resigned(bundle: Path, maker: Any, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Edit release.json and sign again: a maker's mistake, which the signature cannot show."""
    path = bundle / "content/release.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    maker.sign(bundle)
    return bundle


ENTRY = FileEntry(size=1, sha256="d" * 64).model_dump()
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str], str]] = {
    "lists a file too many": (lambda v: v["files"].update(more=ENTRY), ["disagrees"], "more: it lists this file"),
    "lists a file too few": (lambda v: v["files"].pop("LICENSE"), ["disagrees"], "LICENSE: it does not list"),
    "another sha256": (lambda v: v["files"]["LICENSE"].update(sha256="d" * 64), ["disagrees"], "the signature says"),
    "a larger size": (lambda v: v["files"]["LICENSE"].update(size=8), ["truncated"], "expected 8 bytes, found 7"),
    "a smaller size": (lambda v: v["files"]["LICENSE"].update(size=6), ["extended"], "expected 6 bytes, found 7"),
    "another key": (lambda v: v["key"].update(id="d" * 64), ["disagrees"], "it names the key ddd"),
    "an unknown field": (lambda v: v.update(more=1), ["malformed-document"], "more"),
    "a missing field": (lambda v: v.pop("expires"), ["malformed-document"], "expires"),
    "a number as text": (lambda v: v.update(release="7"), ["malformed-document"], "release"),
    "no such date": (lambda v: v.update(expires="2026-02-30T00:00:00Z"), ["malformed-document"], "expires"),
    "a path as a file name": (lambda v: v["files"].update({"../x": ENTRY}), ["malformed-document"], "../x"),
    "the release twice": (None, ["malformed-document"], "'release' appears twice"),
    "a next key that is none": (lambda v: v.update(next_key_id="soon"), ["malformed-document"], "next_key_id"),
    "a development key": (lambda v: v["key"].update(kind="development"), ["development-key"], "channel 'release' was"),
    "the development channel": (lambda v: v.update(channel="development"), ["development-key"], "expected a release"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_signed_document_must_agree_with_what_was_signed(
    bundle: Path, public_key: Path, maker: Any, case: str
) -> None:
    change, expected, fragment = MISTAKES[case]
    if change is None:
        path = bundle / "content/release.json"
        path.write_text(path.read_text().replace('"release": 7', '"release": 7, "release": 9'))
        maker.sign(bundle)
    else:
        resigned(bundle, maker, change)
    report = check(bundle, public_key)
    assert kinds(report) == expected and fragment in report.describe()


def test_the_trusted_key_signing_something_else(bundle: Path, public_key: Path, maker: Any) -> None:
    """No document at all, and two of them: both are signed, neither is a bundle."""
    shutil.copy(bundle / "content/release.json", bundle / "content/refusal.json")
    maker.sign(bundle)
    assert "malformed-document" in kinds(check(bundle, public_key))
    for name in ("release.json", "refusal.json"):
        (bundle / "content" / name).unlink()
    maker.sign(bundle)
    assert kinds(check(bundle, public_key)) == ["malformed-document"]


def name_twice(statement: dict[str, Any]) -> None:
    """One file with two digests, and the root digest that belongs to that."""
    resources = statement["predicate"]["resources"]
    resources.append(resources[0] | {"digest": "d" * 64})
    digests = b"".join(bytes.fromhex(resource["digest"]) for resource in resources)
    statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()


STATEMENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ignored paths": lambda s: s["predicate"]["serialization"].update(ignore_paths=[".github"]),
    "symlinks allowed": lambda s: s["predicate"]["serialization"].update(allow_symlinks=True),
    "another hash": lambda s: s["predicate"]["serialization"].update(hash_type="blake3"),
    "a name that leaves the folder": lambda s: s["predicate"]["resources"][0].update(name="../../etc/passwd"),
    "a name twice": name_twice,
    "two names that differ in case": lambda s: s["predicate"]["resources"].append(
        s["predicate"]["resources"][0] | {"name": "license"}
    ),
    "another root digest": lambda s: s["subject"][0]["digest"].update(sha256="d" * 64),
    "another predicate": lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"),
    "no files": lambda s: s["predicate"].update(resources=[]),
}


@pytest.mark.parametrize("case", STATEMENTS)
def test_a_statement_of_another_shape_is_refused_even_if_signed(
    bundle: Path, public_key: Path, maker: Any, case: str
) -> None:
    def apply(value: dict[str, Any]) -> None:
        envelope = value["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        STATEMENTS[case](statement)
        payload = json.dumps(statement).encode()
        envelope["payload"] = base64.b64encode(payload).decode()
        envelope["signatures"][0]["sig"] = base64.b64encode(maker.key.sign(signing.pae(payload))).decode()

    edit_signature(bundle, apply)
    report = check(bundle, public_key)
    assert kinds(report) == ["malformed-signature"] and "signed statement" in report.describe()


def test_a_development_bundle_needs_permission(public_key: Path, tmp_path: Path, maker: Any) -> None:
    development = type(maker)(maker.private, kind="development").bundle(tmp_path / "bundle")
    assert kinds(check(development, public_key)) == ["development-key"]
    assert check(development, public_key, allow_development=True).ok


# --- bad questions -------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_is_an_error(good_bundle: Path, public_key: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        check(tmp_path / "nowhere", public_key)
    with pytest.raises(BundleError, match=r"nowhere\.pem cannot be read"):
        check(good_bundle, tmp_path / "nowhere.pem")
    with pytest.raises(BundleError, match="is not a public key in PEM form"):
        check(good_bundle, good_bundle / "model.sig")
    with pytest.raises(BundleError, match="no time zone"):
        check(good_bundle, public_key, now=datetime(2026, 2, 1))


# --- tiers.json ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiers_folder(maker: Any, tmp_path: Path) -> Path:
    bundle = tiers.TierBundle(
        platform="ios",
        ram_bytes=8,
        budget_bytes=4,
        variant="q4",
        way=WAY,
        need_bytes=3,
        mapped_bytes=0,
        bundle_bytes=2,
        kl_mean=0.1,
    )
    document = tiers.build_tiers(
        **maker.stamp, context=2048, decisions={"ios-8gb": bundle}, signatures={"q4": "e" * 64}
    )
    return maker.write(tmp_path / "tiers", document)


def test_tiers_are_verified_like_a_bundle(tiers_folder: Path, public_key: Path) -> None:
    report = verify_tiers(tiers_folder, public_key, now=NOW, highest_release=7, model="demo")
    assert report.ok and isinstance(report.document, tiers.TiersDocument)
    assert report.document.bundles["q4"] == tiers.BundleReference(signature_sha256="e" * 64, release=7)
    late = verify_tiers(tiers_folder, public_key, now=NOW + timedelta(days=999), highest_release=8, model="other")
    assert kinds(late) == ["downgraded", "expired", "swapped"]


def test_tiers_and_bundles_are_not_taken_for_each_other(
    tiers_folder: Path, good_bundle: Path, public_key: Path
) -> None:
    assert kinds(check(tiers_folder, public_key)) == ["malformed-document"]
    assert kinds(verify_tiers(good_bundle, public_key, now=NOW)) == ["malformed-document"]


def test_another_curve_is_no_key_to_trust(good_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "p384.pem").write_bytes(public_pem(ec.generate_private_key(ec.SECP384R1()).public_key()))
    with pytest.raises(BundleError, match="secp384r1"):
        check(good_bundle, tmp_path / "p384.pem")
