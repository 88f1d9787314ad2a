"""Preflight: what does not fit is refused before it starts, and the table says so for every stage."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import cli, files, machine
from pipeline.checkpoint.blobs import Store
from pipeline.config.engine import VARIABLE
from pipeline.engine import Threads
from pipeline.errors import ResourceError
from pipeline.preflight import footprints, guard, needs
from pipeline.preflight import machine as preflight
from pipeline.preflight.machine import Room
from pipeline.preflight.needs import Needs
from pipeline.runtime import session
from pipeline.stages import calibrate, download, export
from pipeline.workspace import Workspace
from tests import tiny

GB = 10**9
ROOM = Room(memory=24 * GB, disk=60 * GB, store=60 * GB, shared=True)
SMALL = Needs("quantize", 1 * GB, 5 * GB, "exact", "q4")
STAGES = [
    "download",
    "export",
    "calibrate",
    "sensitivity",
    "parity",
    *["quantize"] * 3,
    "reference",
    *["validate"] * 3,
    *["bundle"] * 3,
]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`python -m pipeline preflight ARGUMENTS`: status and output."""
    monkeypatch.setattr(machine, "product_rate", lambda: 100e9)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", "preflight", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(done.value.code or 0), capsys.readouterr().out

    return run


def squeeze(monkeypatch: pytest.MonkeyPatch, memory: int = 24 * GB, disk: int = 60 * GB) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: memory)
    monkeypatch.setattr(files, "free_disk", lambda _: disk)


def test_what_fits_is_no_problem() -> None:
    assert preflight.problem("mimo-8b", SMALL, ROOM) is None


def test_too_little_memory_is_said_with_both_figures_and_the_way_out() -> None:
    wanted = replace(SMALL, stage="reference", variant=None, memory=117 * GB, why="weights in float32")
    text = preflight.problem("phi-4", wanted, ROOM) or ""
    assert text.startswith("reference phi-4: not enough memory: 117,000,000,000 bytes needed (weights in float32), ")
    assert "24,000,000,000 available" in text
    assert "dvc repro reference@phi-4 && dvc push" in text


def test_too_little_disk_is_said_with_what_to_free() -> None:
    text = preflight.problem("mimo-8b", SMALL, replace(ROOM, disk=3 * GB, store=3 * GB)) or ""
    assert text.startswith("quantize mimo-8b q4: not enough disk: 5,000,000,000 bytes needed (exact), 3,000,000,000 ")
    assert "Free at least 2,000,000,000 bytes" in text


def test_one_disk_holds_both_shares_and_two_disks_one_each() -> None:
    both = Needs("download", 0, 4 * GB, "a copy", store_disk=4 * GB)
    tight = replace(ROOM, disk=5 * GB, store=5 * GB)
    assert "8,000,000,000 bytes needed" in (preflight.problem("m", both, tight) or "")
    assert preflight.problem("m", both, replace(tight, shared=False)) is None
    text = preflight.problem("m", both, replace(tight, shared=False, store=GB)) or ""
    assert "4,000,000,000 bytes needed" in text
    assert "PIPELINE_STORE" in text


def test_stages_share_the_disk_in_their_order_but_scratch_is_given_back() -> None:
    assert ROOM.after(SMALL).disk == ROOM.after(SMALL).store == 55 * GB
    assert ROOM.after(replace(SMALL, scratch=True)) == ROOM
    apart = replace(ROOM, shared=False).after(replace(SMALL, store_disk=GB))
    assert (apart.disk, apart.store) == (55 * GB, 59 * GB)


def test_require_raises_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    squeeze(monkeypatch)
    preflight.require("mimo-8b", SMALL)
    squeeze(monkeypatch, memory=GB // 2)
    with pytest.raises(ResourceError, match=r"quantize mimo-8b q4: not enough memory"):
        preflight.require("mimo-8b", SMALL)


def test_the_table_before_anything_has_run(project: Path, table: Callable[..., tuple[int, str]]) -> None:
    status, text = table()
    lines = text.splitlines()
    assert status == 0, text
    assert lines[1] == tiny.MODEL
    assert [line.split()[0] for line in lines[2 : 2 + len(STAGES)]] == STAGES
    assert all(line.endswith("ok") for line in lines[2 : 2 + len(STAGES)])
    assert max(map(len, lines)) <= 118
    assert not (project / "artifacts").exists()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_cluster_that_is_not_there_can_be_asked_about(project: Path, table: Callable[..., tuple[int, str]]) -> None:
    status, text = table(tiny.MODEL, "--workers", "4", "--cores", "16")
    assert status == 0, text
    assert f"4 workers × 16 cores: {tiny.MODEL}, suite seconds: " in flat(text)
    assert "A worker takes at most " in text
    assert max(map(len, text.splitlines())) <= 118
    assert "1 worker × 1 core: " in flat(table(tiny.MODEL, "--workers", "1")[1]), "cores of configs/engine.yaml"
    assert "workers" not in table(tiny.MODEL)[1]
    assert table("--cores", "2")[0] == 2


def test_the_configured_workers_are_counted(
    project: Path, table: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "ray")
    monkeypatch.setattr(preflight, "chosen", lambda: Threads(3))
    status, text = table()
    assert status == 0, text
    assert f"3 workers × 1 core: {tiny.MODEL}" in flat(text)


def test_an_engine_that_cannot_be_had_is_named_and_this_machine_estimated(
    project: Path, table: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    status, text = table()
    assert status == 1
    assert "NO: `engine: ray` needs the package ray: python -m pip install" in flat(text)
    assert [line.split()[0] for line in text.splitlines() if "~" in line and line.endswith("ok")]
    assert table("--workers", "2")[0] == 0, "what is asked about needs no engine"


def test_workers_shorten_the_estimates_of_a_large_model(
    project: Path, table: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    squeeze(monkeypatch, memory=60 * GB, disk=200 * GB)
    tiny.edit(project / "configs/pipeline.yaml", variants=["q4"], suite="release")
    monkeypatch.setattr(preflight, "outlook", lambda *_: "")  # takes seconds

    def estimate(*arguments: str) -> str:
        return next(line for line in table("mimo-8b", *arguments)[1].splitlines() if "validate" in line)

    assert " h  ok" in estimate()
    assert " min  ok" in estimate("--workers", "64", "--cores", "16")


def test_the_table_refuses_what_does_not_fit_and_only_that(
    project: Path, table: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    squeeze(monkeypatch, memory=needs.TOKENIZER_BYTES + 10**8)
    monkeypatch.setattr(needs, "LOGIT_COPIES", 4000)  # what validate holds and the others do not
    status, text = table("--model", tiny.MODEL)
    assert status == 1
    refused = [line.split()[0] for line in text.splitlines() if line.endswith("NO")]
    assert refused == ["validate"] * 3
    assert text.count("NO: validate tiny") == 3


@pytest.mark.parametrize(("way", "layered"), [("auto", True), ("memory", False), ("layers", True)])
def test_a_reference_that_does_not_fit_is_planned_layer_by_layer_unless_the_suite_forbids_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, way: str, layered: bool
) -> None:
    monkeypatch.setattr(session, "_HEADROOM", 1e6)
    tiny.edit(project / "configs/evaluation/seconds.yaml", reference=way)
    rows = preflight.stage_needs(tiny.MODEL, tiny.VARIANTS, 24 * GB)
    (row,) = [wanted for wanted in rows if wanted.stage == "reference"]
    assert [one.title for one in row.writing] == ["HumanEval"] * layered
    assert (preflight.problem(tiny.MODEL, row, ROOM) is None) == layered


def test_a_reference_that_fits_is_held_in_memory(project: Path) -> None:
    rows = preflight.stage_needs(tiny.MODEL, tiny.VARIANTS, 24 * GB)
    assert [wanted.why.startswith("weights in float32") for wanted in rows if wanted.stage == "reference"] == [True]


def test_the_plan_is_the_artifacts_exact_size(project: Path) -> None:
    def planned() -> list[int]:
        found = preflight.stage_needs(tiny.MODEL, tiny.VARIANTS, 24 * GB)
        return [wanted.disk for wanted in found if wanted.stage == "quantize"]

    before = planned()
    download.run(tiny.MODEL)
    export.run(tiny.MODEL)
    from pipeline.stages import quantize

    calibrate.run(tiny.MODEL)
    quantize.run(tiny.MODEL, "q4")
    plan = Workspace(tiny.MODEL).read(Workspace(tiny.MODEL).artifact("q4") / quantize.PLAN_FILE, "quantize", "q4")
    assert planned()[0] == plan["bytes"] + needs.SMALL_FILES_BYTES
    assert before == pytest.approx(planned(), abs=1000)


def test_a_stage_with_an_output_neither_refuses_nor_counts(
    project: Path, table: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variant in tiny.VARIANTS:
        Workspace(tiny.MODEL).evaluation(variant).mkdir(parents=True)
    squeeze(monkeypatch, memory=needs.TOKENIZER_BYTES + 10**8)
    status, text = table()
    assert status == 0, text
    assert sum(line.endswith("there already") for line in text.splitlines()) == 3


def test_a_model_that_only_a_download_can_describe_says_so(
    project: Path, table: Callable[..., tuple[int, str]]
) -> None:
    tiny.edit(project / "configs/shapes.yaml", models={})
    status, text = table("--model", "phi-4")
    assert status == 0
    assert "python -m pipeline download phi-4" in " ".join(text.split())


def test_a_model_of_known_shapes_is_planned_before_its_download(
    project: Path, table: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    squeeze(monkeypatch)
    tiny.edit(project / "configs/pipeline.yaml", variants=["q4"], suite="smoke")
    status, text = table("--model", "phi-4")
    assert status == 0, text
    assert [line.split()[:2] for line in text.splitlines() if "quantize" in line] == [["quantize", "q4"]]
    assert "29.35 GB" in next(line for line in text.splitlines() if "download" in line)  # 2 bytes a parameter
    assert "HumanEval of phi-4, layer by layer" in text
    assert "configs/shapes.yaml: not downloaded yet" in " ".join(text.split())


def test_a_recipe_that_cannot_be_planned_is_a_refusal(project: Path, table: Callable[..., tuple[int, str]]) -> None:
    tiny.edit(project / "configs" / "recipes" / "q4.yaml", body=[{"roles": ["q_proj"], "format": "w4b32a"}])
    status, text = table()
    assert status == 1
    assert "NO: tiny: recipe" in text


def test_a_lock_without_its_blobs_does_not_stop_the_download_that_mends_it(project: Path) -> None:
    download.run(tiny.MODEL)
    shutil.rmtree(project / "store" / "sha256")
    assert footprints.find_source(tiny.MODEL, Store()) is not None  # from the local folder
    download.run(tiny.MODEL)
    found = footprints.find_source(tiny.MODEL, Store())
    assert found is not None
    assert found.missing == 0


def test_download_names_the_stages_that_will_not_fit(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    download.run(tiny.MODEL)
    squeeze(monkeypatch, memory=needs.TOKENIZER_BYTES + 10**8)
    monkeypatch.setattr(needs, "LOGIT_COPIES", 4000)
    guard.guarded("download", download.run, tiny.MODEL)
    error = capsys.readouterr().err
    assert error.count("will not run here: validate tiny") == 3


@pytest.mark.parametrize("stage", ["download", "calibrate", "parity", "reference", "validate"])
def test_every_heavy_stage_refuses_first_and_writes_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model, workspace = tiny.MODEL, Workspace(tiny.MODEL)
    if stage != "download":
        download.run(model)
        export.run(model)
    if stage == "validate":
        calibrate.run(model)
        from pipeline.stages import quantize

        quantize.run(model, "q4")
        for section in ("mmlu", "divergence"):
            (workspace.evaluation("reference") / section).mkdir(parents=True)
    variant = {"reference": "reference", "validate": "q4"}.get(stage, "")
    squeeze(monkeypatch, disk=1)
    with pytest.raises(ResourceError, match=rf"^{stage} tiny( q4)?: not enough disk"):
        guard.before("validate" if variant else stage, model, variant)
    outputs = {
        "download": workspace.lock,
        "calibrate": workspace.moments,
        "parity": workspace.parity,
        "reference": workspace.evaluation("reference"),
        "validate": workspace.evaluation("q4"),
    }
    assert not outputs[stage].exists()
