"""Every verifier gives the same answer to every vector: ours, the one for Node and the one for the JVM."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundle import vectors
from pipeline.bundle.release import parse_time
from pipeline.bundle.verify import Kind, verify, verify_tiers
from pipeline.errors import BundleError
from tests.phone.conftest import PHONE

Program = Callable[[str], list[str]]
CASES = sorted(vectors.cases())


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All vectors; never changed by a test."""
    folder = tmp_path_factory.mktemp("vectors") / "all"
    assert vectors.write(folder) == CASES == sorted(entry.name for entry in folder.iterdir())
    return folder


def python_answer(folder: Path, vector: dict[str, Any], keys: Path) -> list[list[str]]:
    pinned = []
    for number, key in enumerate(vector["pinned_keys"]):
        pinned.append(keys / f"{number}.pem")
        pinned[-1].write_text(f"-----BEGIN PUBLIC KEY-----\n{key}\n-----END PUBLIC KEY-----\n")
    options = {name: vector[name] for name in ("highest_release", "allow_development", "app_version", "tier", "model")}
    options["now"] = parse_time(vector["now"])
    if vector["kind"] == "tiers":
        report = verify_tiers(folder / "bundle", pinned, **options)
    else:
        report = verify(folder / "bundle", pinned, **options, variant=vector["variant"])
    return [list(pair) for pair in sorted({(str(found.kind), found.file) for found in report.findings})]


@pytest.mark.parametrize("name", CASES)
def test_python_agrees(written: Path, tmp_path: Path, name: str) -> None:
    vector = json.loads((written / name / "vector.json").read_text())
    assert python_answer(written / name, vector, tmp_path) == vector["findings"]


def test_every_kind_of_finding_has_a_vector(written: Path) -> None:
    found = [json.loads((written / name / "vector.json").read_text())["findings"] for name in CASES]
    assert {kind for findings in found for kind, _ in findings} == set(Kind)
    assert sum(1 for findings in found if findings) >= 80 and sum(1 for findings in found if not findings) >= 8


def test_the_same_bytes_are_written_again(written: Path, tmp_path: Path) -> None:
    """Keys, signatures and documents come from constants, not from the clock, the machine or an earlier call."""
    vectors.known_key.cache_clear()
    for name in ("good", "document-channel", "good-tiers", "statement-root"):
        vectors.cases()[name].make(tmp_path / name)
        for path in (written / name / "bundle").rglob("*.*"):
            again = tmp_path / name / path.relative_to(written / name / "bundle")
            assert again.read_bytes() == path.read_bytes()


def test_a_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(BundleError, match="'precious', which is no vector"):
        vectors.write(tmp_path)
    assert (tmp_path / "precious").is_dir()


@pytest.mark.parametrize(
    "name", ["javascript/bundle-verifier.mjs", "kotlin/BundleVerifier.kt", "swift/BundleVerifier.swift"]
)
def test_every_verifier_knows_every_kind(name: str) -> None:
    source = (PHONE / name).read_text()
    assert [kind for kind in Kind if f'"{kind}"' not in source] == []


def wrong_vector(written: Path, folder: Path) -> Path:
    """One vector whose expectation is not what a verifier must answer."""
    shutil.copytree(written / "file-flipped", folder / "file-flipped", symlinks=True)
    path = folder / "file-flipped/vector.json"
    path.write_text(path.read_text().replace('"modified"', '"extra"'))
    return folder


def run_all(command: list[str], written: Path, wrong: Path) -> None:
    """`command` agrees with all vectors, and says so when it does not."""
    done = subprocess.run([*command, str(written)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(CASES)} of {len(CASES)} vectors agree\n"), done.stderr
    done = subprocess.run([*command, str(wrong)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "0 of 1 vectors agree" in done.stdout
    assert "file-flipped: expected [extra: content/demo.onnx.data.0], found [modified: " in done.stdout


def test_javascript_agrees(javascript: Program, written: Path, tmp_path: Path) -> None:
    run_all(javascript("vectors"), written, wrong_vector(written, tmp_path))


def test_the_jvm_agrees(kotlin: Program, written: Path, tmp_path: Path) -> None:
    run_all(kotlin("VectorsKt"), written, wrong_vector(written, tmp_path))


def test_swift_agrees(swift: list[str], written: Path, tmp_path: Path) -> None:
    run_all(swift, written, wrong_vector(written, tmp_path))
