"""The packs stage and check-packs: only what verifies is packed, and the status says whether a store would take it."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.bundle import keys
from pipeline.cli import cli
from pipeline.errors import BundleError, PipelineError
from pipeline.files import sha256_of
from pipeline.packs.app_bundle import GROUPS
from pipeline.stages import packs
from pipeline.workspace import Workspace, public_key_path
from tests.bundle.conftest import Maker
from tests.packs.storefront import MODEL, Shop, open_shop

ANDROID, IOS = Path(f"artifacts/packs/{MODEL}/android"), Path(f"artifacts/packs/{MODEL}/ios")


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def today(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Signed today: the stage compares with the clock."""
    return open_shop(maker, tmp_path_factory.mktemp("shop"), created=datetime.now(UTC))


@pytest.fixture
def workspace(maker: Maker, today: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A working tree after the tiers stage, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/signing.yaml").write_text(yaml.safe_dump(maker.config.model_dump()))
    keys.export_public_key(maker.key, public_key_path(maker.key.identity.id))
    workspace = Workspace(MODEL)
    shutil.copytree(today.tiers, workspace.tiers)
    for variant, folder in today.folders.items():
        shutil.copytree(folder, workspace.bundle(variant))
    return workspace


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_both_stores_from_what_was_signed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    packs.run(MODEL)
    assert sorted(os.listdir(workspace.packs)) == ["android", "ios"]
    printed = capsys.readouterr().out
    assert "of 4 GB" in printed and "of 30 GB" in printed and "of 200 GB" in printed
    part = workspace.bundle("q4") / "content/demo_q4.onnx.data.1"
    (packed,) = ANDROID.rglob("demo_q4.onnx.data.1")
    assert packed.samefile(part)
    before = tree(workspace.packs)
    packs.run(MODEL)  # again: the same bytes
    assert tree(workspace.packs) == before
    for folder in (ANDROID, IOS):
        assert packs.check(folder, None, None, None) == 0


def resign(workspace: Workspace, maker: Maker) -> None:
    folder = workspace.bundle("q4")
    (folder / "content/LICENSE").write_text("Other terms.\n")
    maker.sign(folder)


SPOILT: dict[str, tuple[Callable[[Workspace, Any], object], str]] = {
    "a part was changed": (
        lambda w, m: (w.bundle("q4") / "content/demo_q4.onnx.data.1").write_bytes(bytes(16384)),
        r"does not verify.*modified: content/demo_q4\.onnx\.data\.1",
    ),
    "tiers were edited": (
        lambda w, m: (w.tiers / "content/tiers.json").write_text("{}"),
        r"does not verify.*modified: content/tiers\.json",
    ),
    "signed again after the tiers": (
        resign,
        r"names the bundle whose model\.sig has sha256 .* found",
    ),
    "no tiers": (lambda w, m: (w.tiers / "model.sig").unlink(), "python -m pipeline tiers demo"),
    "no signature": (lambda w, m: (w.bundle("q4") / "model.sig").unlink(), "python -m pipeline sign demo q4"),
    "no public key": (lambda w, m: shutil.rmtree("artifacts/keys"), r"\.pem cannot be read"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_nothing_is_packed_that_does_not_verify(workspace: Workspace, maker: Maker, case: str) -> None:
    spoil, message = SPOILT[case]
    spoil(workspace, maker)
    with pytest.raises(PipelineError, match=f"(?s){message}"):
        packs.run(MODEL)
    assert not workspace.packs.exists()


def test_what_a_store_would_refuse_leaves_the_old_folders(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs.run(MODEL)
    before = tree(workspace.packs)
    monkeypatch.setattr("pipeline.packs.android_rules.PACK_LIMIT", 10_000)
    with pytest.raises(BundleError, match=r"stores would refuse these packs: error \[pack-size\] demo_p1"):
        packs.run(MODEL)
    assert tree(workspace.packs) == before


# --- check-packs -----------------------------------------------------------------------------------------------------


def check(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["check-packs", *map(str, arguments)])
    return result.exit_code, result.output + str(result.exception or "")


def app_bundle(path: Path, android: Path, without: str = "", groups: str = f"{GROUPS}.pb") -> Path:
    """An archive with the modules' assets where Gradle puts them."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("BundleConfig.pb", b"")
        archive.writestr(groups, b"")
        for file in sorted(android.glob("*/src/main/assets/**/*")):
            name = str(file.relative_to(android)).replace("/src/main/assets/", "/assets/")
            if file.is_file() and name != without:
                archive.write(file, name)
    return path


def test_the_status_says_whether_a_rule_is_broken(workspace: Workspace) -> None:
    packs.run(MODEL)
    assert check(ANDROID)[0] == check(IOS)[0] == 0
    (IOS / "stray").write_bytes(b"")
    status, output = check(IOS)
    assert status == 1 and "error [no-stray-files] stray" in output and "1 errors" in output


def test_an_id_is_compared_with_the_earlier_release(workspace: Workspace, today: Shop, tmp_path: Path) -> None:
    packs.run(MODEL)
    packed = today.bundles["q4"]
    place = "bundle/content/LICENSE"
    files = packed.files | {place: packed.files[place].model_copy(update={"sha256": "f" * 64})}
    earlier = replace(today, bundles=today.bundles | {"q4": replace(packed, files=files)})
    packs.write_ios(tmp_path / "earlier", packs.plan_ios(earlier.document, earlier.bundles), earlier.bundles)
    status, output = check(IOS, "--previous", tmp_path / "earlier")
    assert status == 1 and "error [immutable] demo-q4-r7-p1" in output


def test_the_app_bundle_must_hold_what_the_modules_hold(workspace: Workspace, tmp_path: Path) -> None:
    packs.run(MODEL)
    assert check(ANDROID, "--aab", app_bundle(tmp_path / "good.aab", ANDROID))[0] == 0
    status, output = check(ANDROID, "--aab", app_bundle(tmp_path / "b.aab", ANDROID, groups="x"))
    assert status == 1 and "error [aab-groups]" in output and "gradle.properties" in output
    lost = "demo_p1/assets/demo_p1#group_ram_12gb/bundle/model.sig"
    status, output = check(ANDROID, "--aab", app_bundle(tmp_path / "c.aab", ANDROID, without=lost))
    assert status == 1 and f"error [aab-assets] {lost}" in output
    old = app_bundle(tmp_path / "d.aab", ANDROID)
    changed = ANDROID / lost.replace("/assets/", "/src/main/assets/")
    changed.unlink()
    changed.write_bytes(b"x" * (today_size := zipfile.ZipFile(old).getinfo(lost).file_size))
    status, output = check(ANDROID, "--aab", old)
    assert status == 1 and f"other bytes ({today_size:,})" in output


def stand_in_java(folder: Path, status: int) -> Path:
    """A `java` that notes its arguments and answers as bundletool would."""
    folder.mkdir()
    (folder / "java").write_text(
        f'#!/bin/sh\necho "$@" > "{folder}/log"\necho "[BT:1.17] Error: no" >&2\nexit {status}\n'
    )
    (folder / "java").chmod(0o755)
    return folder


@pytest.mark.parametrize("status", [0, 1])
def test_bundletool_runs_on_the_app_bundle(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    packs.run(MODEL)
    aab, jar = app_bundle(tmp_path / "app.aab", ANDROID), tmp_path / "bundletool.jar"
    jar.write_bytes(b"")
    monkeypatch.setenv("PATH", str(stand_in_java(tmp_path / "bin", status)))
    code, output = check(ANDROID, "--aab", aab, "--bundletool", jar)
    assert (tmp_path / "bin/log").read_text() == f"-jar {jar} validate --bundle={aab}\n"
    assert code == status
    assert ("bundletool validate app.aab: OK" if status == 0 else "[BT:1.17] Error: no") in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no packs.json that says for which store"),
        ([ANDROID, "--previous", "x"], "--previous is for iOS"),
        ([IOS, "--aab", "x"], "--aab and --bundletool are for an Android folder"),
        ([ANDROID, "--bundletool", "x.jar"], "gradlew :app:bundleRelease"),
        ([ANDROID, "--aab", "nowhere.aab"], "cannot be read as an app bundle"),
        ([ANDROID, "--aab", "configs/signing.yaml"], "cannot be read as an app bundle"),
        ([IOS, "--previous", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_bad_questions_are_answered_in_a_sentence(workspace: Workspace, arguments: list[Any], message: str) -> None:
    packs.run(MODEL)
    status, output = check(*arguments)
    assert status == 1 and message in output


def test_bundletool_that_cannot_be_run(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs.run(MODEL)
    aab = app_bundle(tmp_path / "app.aab", ANDROID)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no java on the PATH" in check(ANDROID, "--aab", aab, "--bundletool", "x.jar")[1]
    monkeypatch.setenv("PATH", str(stand_in_java(tmp_path / "bin", 0)))
    assert "x.jar is not there" in check(ANDROID, "--aab", aab, "--bundletool", "x.jar")[1]
