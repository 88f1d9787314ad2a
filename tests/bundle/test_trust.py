"""The memory of releases: it only grows, survives what kills a write, and is never mistaken for empty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.bundle.trust import ReleaseMemory
from pipeline.errors import BundleError


@pytest.fixture
def memory(tmp_path: Path) -> ReleaseMemory:
    return ReleaseMemory(tmp_path / "deep/state.json")


def test_it_remembers_the_highest_of_each_subject(memory: ReleaseMemory) -> None:
    assert memory.highest("demo") is None
    memory.record("demo", 7)
    memory.record("demo", 9)
    memory.record("demo", 9)
    memory.record("demo/q4", 1)
    assert (memory.highest("demo"), memory.highest("demo/q4"), memory.highest("demo/q3")) == (9, 1, None)
    assert json.loads(memory.path.read_text()) == {"releases": {"demo": 9, "demo/q4": 1}}


def test_a_lower_release_is_refused_and_changes_nothing(memory: ReleaseMemory) -> None:
    memory.record("demo", 9)
    before = memory.path.read_bytes()
    with pytest.raises(BundleError, match="release 9 of demo was accepted before, so 8 is a rollback"):
        memory.record("demo", 8)
    assert memory.path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"releases": {"demo": "9"}}', '{"releases": {}, "releases": {}}', "{}x"]
)
def test_a_spoilt_file_is_not_a_fresh_start(memory: ReleaseMemory, content: str) -> None:
    memory.path.parent.mkdir()
    memory.path.write_text(content)
    with pytest.raises(BundleError, match="is no record of releases"):
        memory.highest("demo")
    with pytest.raises(BundleError, match="is no record of releases"):
        memory.record("demo", 9)
    assert memory.path.read_text() == content


def test_a_folder_in_its_place_is_an_error(memory: ReleaseMemory) -> None:
    memory.path.mkdir(parents=True)
    with pytest.raises(BundleError, match="cannot be read: Is a directory"):
        memory.highest("demo")


def test_records_made_together_are_all_kept(memory: ReleaseMemory) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: memory.record(f"model-{number}", number + 1), range(24)))
    assert [memory.highest(f"model-{number}") for number in range(24)] == list(range(1, 25))


def verify(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "verify", str(bundle), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_records_only_what_is_good(good_bundle: Path, public_key: Path, tmp_path: Path) -> None:
    state = ReleaseMemory(tmp_path / "state.json")
    good = ["--public-key", str(public_key), "--state", str(state.path)]
    assert verify(good_bundle, *good, "--variant", "q3", "--record").returncode == 1
    assert verify(good_bundle, *good).returncode == 0
    assert not state.path.exists()
    assert verify(good_bundle, *good, "--record").returncode == 0
    assert state.highest("demo/q4") == 7
    state.record("demo/q4", 8)
    done = verify(good_bundle, *good, "--record")
    assert done.returncode == 1 and "downgraded: content/release.json: expected release 8 or later" in done.stdout
    assert state.highest("demo/q4") == 8 and sorted(os.listdir(tmp_path)) == [
        ".state.json.lock",
        "public.pem",
        "state.json",
    ]
    assert verify(good_bundle, "--public-key", str(public_key), "--record").returncode == 2
