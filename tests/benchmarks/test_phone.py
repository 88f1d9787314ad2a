"""A real model under hard limits of memory: it runs where it fits, is killed where it does not, thrashes when mapped.

The limits come from what the model takes without one, Python's own private memory included (21 MB of some 330), so half
a limit always holds Python and never the model.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import cgroups, phone, project, runtime
from benchmarks.limited import Request
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import write_lock
from pipeline.checkpoint.sources import fetch_model
from pipeline.config.models import load_model
from pipeline.errors import EvaluationError, ResourceError
from pipeline.stages import export, quantize
from pipeline.workspace import Workspace
from tests import tiny
from tests.recipes import FOLDER
from tests.smollm2 import MODEL, ROOT

MARGIN = 48_000_000  # bytes: file pages that a process cannot run without, and page tables


@pytest.fixture(scope="module", autouse=True)
def _may_make_groups() -> None:
    try:
        with cgroups.limited(MARGIN):
            pass
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2's q4, rounded to nearest, which needs no calibration."""
    root, store = tmp_path_factory.mktemp("project"), Store(Store().root.resolve())
    key = f"test-phone-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = store.workspace(key)
        shutil.copytree("configs", folder / "configs")
        shutil.copy(FOLDER / "q4.yaml", folder / "configs" / "recipes")
        tiny.edit(folder / "configs" / "recipes" / "q4.yaml", search="nearest")
        patch.setenv("PIPELINE_STORE", str(store.root))
        patch.chdir(folder)
        try:
            workspace = Workspace(MODEL)
            write_lock(workspace.lock, fetch_model(MODEL, load_model(MODEL), store))
            export.run(MODEL)
            quantize.run(MODEL, "q4")
            yield shutil.copytree(workspace.artifact("q4").resolve(), root / "q4")
        finally:
            patch.chdir(ROOT)
            store.clear(key)


@pytest.fixture(scope="module")
def mapped(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same model with its weights in a prepacked file."""
    with runtime.prepacked_folder(runtime.open_artifact(artifact), tmp_path_factory.mktemp("scratch")) as (folder, _):
        yield folder


def request(folder: Path, **changes: Any) -> Request:
    """512 tokens and 8 more, without an app around."""
    return replace(Request(str(folder), {}, 0, phone.PROMPT_TOKENS, 8, 120), **changes)


def test_a_model_runs_where_its_private_bytes_fit_and_is_killed_at_half(artifact: Path) -> None:
    free = phone.run(request(artifact), None)
    assert (free.ended, free.step, free.way) == ("finished", None, "private")
    assert free.steps["load"]["read"] > 0.9 * runtime.open_artifact(artifact).bytes  # nothing was in the page cache
    assert 2 * free.steps["import"]["private"] < free.private_bytes  # the model is most of it
    limit = free.private_bytes + MARGIN
    (row,) = phone.rehearse(request(artifact), {"need": limit}, half=True)
    assert (row["run"]["ended"], row["run"]["limit"], row["way"]) == ("finished", limit, "private")
    assert row["run"]["private_bytes"] <= row["run"]["charged_bytes"] <= limit
    assert (row["half"]["ended"], row["half"]["limit"]) == ("killed", limit // 2)
    assert row["half"]["step"] in {"load", "prefill"}
    record = {"name": "small q4", "tier": "android-4gb", "request": {"new_tokens": 8, "reserve": 0}}
    assert f"| killed in {row['half']['step']} |" in phone.tables([{**record, "rows": [row]}])
    slow = {"steps": {"decode": {"seconds": 4.0, "read": 8}}, "ended": "finished", "step": None}
    assert "| finished at 2.00 |" in phone.tables([{**record, "rows": [row | {"half": slow}]}])


def test_mapped_weights_run_where_they_fit_and_are_read_again_where_they_do_not(mapped: Path) -> None:
    free = phone.run(request(mapped), None)
    size = free.steps["decode"]["model_mapped"]
    assert (free.ended, free.way) == ("finished", "mapped") and size > 100_000_000
    resident = phone.run(request(mapped), free.private_bytes + free.mapped_bytes + MARGIN)
    assert resident.ended == "finished" and resident.steps["decode"]["read"] < size
    budget = phone.run(request(mapped), free.private_bytes + MARGIN)
    assert budget.ended == "finished" and budget.steps["decode"]["read"] > 4 * size  # of 8 tokens
    assert budget.steps["decode"]["faults"] > 2 * resident.steps["decode"]["faults"]  # how many: the kernel's readahead


def test_the_app_and_the_overlay_count(artifact: Path) -> None:
    """What the app holds is private memory; a smaller chunk of the prompt takes less."""
    whole = phone.run(request(artifact, reserve=100_000_000), None)
    assert whole.steps["reserve"]["private"] == pytest.approx(100_000_000, rel=0.01)
    short, long = (
        phone.run(request(artifact, reserve=0, overlay={"search": {"chunk_size": tokens}}), None).private_bytes
        for tokens in (16, 512)
    )
    assert short < long and short < whole.private_bytes - 70_000_000


def test_a_run_that_takes_too_long_ends(artifact: Path) -> None:
    found = phone.run(request(artifact, prompt_tokens=8, new_tokens=2000, seconds=4), None)
    assert (found.ended, found.step) == ("out of time", "decode")


def test_only_the_kernels_own_kills_count() -> None:
    assert phone._ended(-signal.SIGKILL, 1, "q4") == "killed"
    with pytest.raises(EvaluationError, match="q4: ended with status -9 and 0 kills"):
        phone._ended(-signal.SIGKILL, 0, "q4")


def test_files_that_another_process_maps_are_refused(artifact: Path) -> None:
    code = (
        "import mmap, sys\nwith open(sys.argv[1]) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held:\n"
        "    held[:]\n    print(flush=True)\n    sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", code, next(artifact.glob("*.data.0"))], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout and holder.stdout.readline()
        with pytest.raises(EvaluationError, match=r"stay in the page cache.*End it and measure again"):
            phone.run(request(artifact), None)
        holder.kill()


def test_the_command_writes_a_record_and_a_table(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "RESULTS", tmp_path)
    arguments = [str(artifact), "--tier", "android-4gb", "--new-tokens", "4", "--name", "small q4"]
    done = CliRunner().invoke(phone.main, arguments)
    assert done.exit_code == 0, done.output
    assert "small q4, private | android-4gb | budget: 1.925" in done.output and "resident: 2.275" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["phone-small-q4-private-android-4gb.json"]
    tight = ["--limit", "100000000", "--reserve", "0", "--half", "--overlay", '{"search": {"chunk_size": 16}}']
    done = CliRunner().invoke(phone.main, [*arguments, *tight])
    assert done.exit_code == 0 and "given: 0.100" in done.output and done.output.count("killed in") == 2
    wrong = CliRunner().invoke(phone.main, [*arguments[:2], "android-5gb"])
    assert wrong.exit_code == 1 and "Did you mean 'android-" in wrong.output
    wrong = CliRunner().invoke(phone.main, [str(tmp_path), *arguments[1:3], "--overlay", "[nothing"])
    assert wrong.exit_code == 2 and "neither a JSON object nor a file that holds one" in wrong.output
    wrong = CliRunner().invoke(phone.main, [str(tmp_path), *arguments[1:3]])
    assert wrong.exit_code == 1 and "not a folder that onnxruntime-genai loads" in wrong.output


def test_make_bench_rehearses_what_is_meant_for_a_tier(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, str, str]] = []
    monkeypatch.setattr(phone, "measure", lambda folder, *names, **_: made.append((folder.name, *names)))
    phone.bench(artifact, "phi-4", "q4", tmp_path)
    assert made == []
    phone.bench(artifact, "mimo-8b", "q3", tmp_path)
    assert [names for _, *names in made] == [["mimo-8b q3", "android-8gb"]] * 2
    assert made[0][0] == "q4" and made[1][0] != "q4"  # as made, then the prepacked folder, which is gone
    assert list(tmp_path.iterdir()) == []

    def refuse(*_: object, **__: object) -> None:
        raise ResourceError("no group")

    monkeypatch.setattr(phone, "measure", refuse)
    phone.bench(artifact, "mimo-8b", "q4", tmp_path)
    assert "mimo-8b q4 on android-12gb is not rehearsed: no group" in capsys.readouterr().err
