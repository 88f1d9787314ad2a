"""The quantize stage: killed anywhere it continues, with anything changed it starts anew, it asks before it writes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from pipeline.artifact import work, write
from pipeline.artifact.quantizers import Compensated
from pipeline.calibrate.results import read_moments, read_products
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import UNROTATED, load_recipe
from pipeline.errors import PipelineError, ResourceError
from pipeline.files import read_json, write_json
from pipeline.partial import open_partial
from pipeline.planning.recipes import make_plan
from pipeline.preflight import guard
from pipeline.quantize.search import weighted
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import calibrate, download, export, quantize, sensitivity
from pipeline.workspace import Workspace
from tests import tiny
from tests.artifact.exported import PATIENCE, child, contents, finish, finished_units, lines
from tests.conftest import ROOT
from tests.families import make_checkpoint
from tests.graph.test_genai import assert_greedy, greedy, prompt
from tests.stages import crashing

CACHE = [f"layers.{layer}.{part}" for layer in range(3) for part in ("key", "value", "value.rotated")]
POINTS = 40  # calls to the system at which a run is killed, of about 200


SEARCHED = "q3_searched"
"""The solved q3 without error compensation: what is killed again and again, each time in a process of its own."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported, calibrated, and measured for budgets; its store is beside it."""
    root = tmp_path_factory.mktemp("quantize")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tiny.make_store(root / "store")
        (root / "project").mkdir()
        tiny.copy_configs(root / "project")
        patch.chdir(root / "project")
        patch.setenv("PIPELINE_STORE", str(root / "store"))
        recipe = {"extends": "q3", "title": "q3, searched", "version": 1, "search": "weighted"}
        Path(f"configs/recipes/{SEARCHED}.yaml").write_text(yaml.safe_dump(recipe))
        for stage in (download, export, calibrate, sensitivity):
            stage.run(tiny.MODEL)
    return root


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of the template, as the working directory."""
    shutil.copytree(template / "project", tmp_path / "project", copy_function=os.link)
    monkeypatch.setenv("PIPELINE_STORE", str(template / "store"))
    monkeypatch.chdir(tmp_path / "project")
    return Workspace(tiny.MODEL)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that are computed from now on."""
    names: list[str] = []

    def unit(item: work.Unit, *rest: Any) -> Any:
        names.append(item.name)
        return work.quantize_unit(item, *rest)

    monkeypatch.setattr(write, "quantize_unit", unit)
    return names


def begin(variant: str = "q4") -> None:
    """Interrupt the stage when all units are done, before the rest is."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_write_copies", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize.run(tiny.MODEL, variant)


def age(workspace: Workspace, variant: str) -> None:
    """Make the artifact one that another key wrote, which a run replaces."""
    path = workspace.artifact(variant) / quantize.PLAN_FILE
    write_json(path, read_json(path) | {"key": "another"})


def whole(workspace: Workspace, variant: str = "q4") -> dict[str, bytes]:
    """The artifact of a run that nothing came before."""
    shutil.rmtree(workspace.root / "partial", ignore_errors=True)
    quantize.run(tiny.MODEL, variant)
    return contents(workspace.artifact(variant))


# --- killed ----------------------------------------------------------------------------------------------------------


def journal(workspace: Workspace, variant: str) -> set[str]:
    """The units that are finished."""
    return finished_units(workspace.root / "partial" / f"{variant}.journal")


@pytest.mark.long
def test_killed_at_any_call_to_the_system(template: Path, workspace: Workspace) -> None:
    """Also between the last unit and the end: configuration, plan, renames. The next run leaves nothing but the
    artifact, which is the same, and computes nothing that was finished."""
    expected = whole(workspace, SEARCHED)
    age(workspace, SEARCHED)
    folder = Path.cwd()
    assert finish(child(crashing.run, folder, template / "store", SEARCHED, None)) == 0
    calls = lines(folder / "calls")
    assert set(calls) >= {"truncate", "pwrite", "fsync", "replace", "rmdir"}
    chance = random.Random(0)
    ends = range(len(calls) - 20, len(calls) + 1)  # an old artifact is replaced: every step of that
    points = sorted({*ends, *chance.sample(range(1, len(calls)), POINTS - len(ends))})
    for point in points:
        (folder / "computed").unlink(missing_ok=True)
        age(workspace, SEARCHED)
        process = child(crashing.run, folder, template / "store", SEARCHED, point)
        assert finish(process) == -signal.SIGKILL, point
        before = journal(workspace, SEARCHED) if workspace.partial(SEARCHED).exists() else set()
        (folder / "computed").unlink(missing_ok=True)
        assert finish(child(crashing.run, folder, template / "store", SEARCHED, None)) == 0
        assert not before & set(lines(folder / "computed")), point
        assert contents(workspace.artifact(SEARCHED)) == expected, point
        assert [path.name for path in workspace.artifact(SEARCHED).parent.iterdir()] == [SEARCHED], point
        assert not (workspace.root / "partial").exists(), point


SLOW = """
import os, time
pwrite = os.pwrite
def slow(*arguments):
    time.sleep(0.02)
    return pwrite(*arguments)
os.pwrite = slow
"""


def test_control_c_on_the_command_line(workspace: Workspace, computed: list[str], tmp_path: Path) -> None:
    """One line, status 1, and the work stays."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "pipeline", "quantize", tiny.MODEL, SEARCHED]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while len(journal(workspace, SEARCHED)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert error.strip() == "Aborted!"
    assert not workspace.artifact(SEARCHED).exists()
    before = journal(workspace, SEARCHED)
    quantize.run(tiny.MODEL, SEARCHED)
    assert len(before) >= 5
    assert not before & {*computed}
    assert contents(workspace.artifact(SEARCHED)) == whole(workspace, SEARCHED)


# --- changed ---------------------------------------------------------------------------------------------------------


def other_source(workspace: Workspace) -> None:
    """Other weights, downloaded; without DVC nobody exports again."""
    shutil.copytree("checkpoint", "other")
    make_checkpoint(Path("other"), tiny.CASE, seed=1)
    tiny.edit(Path("configs/models/tiny.yaml"), source={"kind": "local", "path": "other"})
    download.run(tiny.MODEL)


def other_export(workspace: Workspace) -> None:
    tokenizer = workspace.export / "tokenizer_config.json"
    text = tokenizer.read_text()
    tokenizer.unlink()  # a hard link of the template's
    tokenizer.write_text(text.replace("}", " }", 1))


def other_moments(workspace: Workspace) -> None:
    moments = load_file(workspace.moments)
    workspace.moments.unlink()  # a hard link of the template's
    save_file({name: np.ascontiguousarray(values[::-1]) for name, values in moments.items()}, workspace.moments)


def other_recipe(workspace: Workspace) -> None:
    recipe = Path("configs/recipes/q4.yaml")
    text = recipe.read_text()
    recipe.unlink()
    recipe.write_text(text.replace("format: w4b64a", "format: w4b32a"))


@pytest.mark.parametrize("change", [other_source, other_export, other_moments, other_recipe])
def test_what_decides_the_bytes_starts_anew(
    change: Callable[[Workspace], None],
    workspace: Workspace,
    computed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin()
    units = len(computed)
    change(workspace)
    computed.clear()
    capsys.readouterr()
    quantize.run(tiny.MODEL, "q4")
    assert "q4: what an earlier run left belongs to another source, recipe or code: dropped" in capsys.readouterr().err
    assert len(computed) == units == len(set(computed))
    assert contents(workspace.artifact("q4")) == whole(workspace)


def test_other_code_starts_anew(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its key is made of: tests/test_keys.py."""
    begin()
    monkeypatch.setattr(quantize.keys, "code", lambda _: "other")
    quantize.run(tiny.MODEL, "q4")
    assert "another source, recipe or code" in capsys.readouterr().err


def test_the_same_goes_on(workspace: Workspace, computed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is computed again; another variant's unfinished work is left alone; whoever wrote the files last."""
    begin("q4_k_m")
    begin()
    computed.clear()
    os.utime("configs/recipes/q4.yaml")
    quantize.run(tiny.MODEL, "q4")
    assert computed == []
    assert "dropped" not in capsys.readouterr().err
    assert workspace.partial("q4_k_m").exists()
    quantize.run(tiny.MODEL, "q4_k_m")
    assert computed == []


# --- before it writes ------------------------------------------------------------------------------------------------


def test_the_written_size_is_the_planned_one(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    for variant in tiny.VARIANTS:
        quantize.run(tiny.MODEL, variant)
        folder = workspace.artifact(variant)
        planned = read_json(folder / quantize.PLAN_FILE)["bytes"]
        stem = f"tiny_{variant}"
        assert sum(file.stat().st_size for file in folder.glob(f"{stem}.*")) == planned
        assert f"tiny {variant}: {planned:,} bytes written, as planned" in capsys.readouterr().out


def test_a_dry_run_tells_the_size_and_writes_nothing(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path("artifacts").rglob("*"))
    quantize.run(tiny.MODEL, "q4", dry_run=True)
    told = capsys.readouterr().out
    assert sorted(Path("artifacts").rglob("*")) == before
    assert "estimate: about" in told
    quantize.run(tiny.MODEL, "q4")
    size = read_json(workspace.artifact("q4") / quantize.PLAN_FILE)["bytes"]
    assert f"  {size:,} bytes in 1 part(s) and the graph" in told


def bytes_needed(patch: pytest.MonkeyPatch) -> int:
    """What the stage asks for on a disk with 1,000 bytes left."""
    with patch.context() as full, pytest.raises(ResourceError, match="1,000 free") as caught:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        guard.before("quantize", tiny.MODEL, "q4")
    return int(re.search(r"([\d,]+) bytes needed", str(caught.value))[1].replace(",", ""))


def test_too_little_disk_is_found_before_writing(
    workspace: Workspace, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that unfinished work holds already are not asked for again."""
    fresh = bytes_needed(monkeypatch)
    begin()
    computed.clear()
    size = (workspace.partial("q4") / "tiny_q4.data.0").stat().st_size
    assert fresh - bytes_needed(monkeypatch) >= size
    quantize.run(tiny.MODEL, "q4")
    assert computed == []


def test_one_process_at_a_time(workspace: Workspace, computed: list[str]) -> None:
    with open_partial(workspace.partial("q4"), "theirs") as theirs:
        (theirs.folder / "data").write_bytes(b"theirs")
        with pytest.raises(ResourceError, match=r"another process is writing artifacts/tiny/partial/q4\. Wait for it"):
            quantize.run(tiny.MODEL, "q4")
        assert contents(theirs.folder) == {"data": b"theirs"}
    assert computed == []
    assert not workspace.artifact("q4").exists()


# --- numbers that vanish ---------------------------------------------------------------------------------------------

UP, TABLE = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


def odd_source(change: Callable[[dict[str, np.ndarray]], object], *stages: Callable[[str], object]) -> None:
    """Other weights of the tiny model, and what comes before quantize."""
    shutil.copytree("checkpoint", "odd")
    tensors = load_file("odd/model.safetensors")
    change(tensors)
    Path("odd/model.safetensors").unlink()
    save_file(tensors, "odd/model.safetensors")
    tiny.edit(Path(f"configs/models/{tiny.MODEL}.yaml"), source={"kind": "local", "path": "odd"})
    for stage in stages or (download.run, export.run, calibrate.run):
        stage(tiny.MODEL)


def edit_recipe(variant: str, **changes: Any) -> None:
    path = Path(f"configs/recipes/{variant}.yaml")
    text = yaml.safe_load(path.read_text())
    path.unlink()  # a hard link of the template's
    path.write_text(yaml.safe_dump(text | changes))


@pytest.mark.parametrize("variant", ["q4", "q4_k_m", "q3"])
def test_a_tensor_that_vanishes_is_refused_until_that_is_accepted(
    variant: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    odd_source(lambda tensors: tensors[UP].__imul__(np.float32(1e-9)))
    with pytest.raises(PipelineError, match=rf"'{UP}' as .*become zero.*100\.00% of the tensor's energy") as caught:
        quantize.run(tiny.MODEL, variant)
    assert not workspace.artifact(variant).exists()
    (asked,) = re.findall(r"`lost_max: ([\d.e-]+)`", str(caught.value))
    edit_recipe(variant, lost_max=float(asked))
    capsys.readouterr()
    quantize.run(tiny.MODEL, variant)
    assert re.search(rf"^  {UP}: [\d,]+ of [\d,]+ blocks become zero, with", capsys.readouterr().out, re.MULTILINE)
    lost = read_json(workspace.artifact(variant) / quantize.PLAN_FILE)["lost"]
    assert lost.keys() == {UP} and lost[UP]["share"] == 1.0
    edit_recipe(variant, lost_max=0.5)
    with pytest.raises(PipelineError, match=r"50\.00% may vanish"):
        quantize.run(tiny.MODEL, variant)


def test_a_few_rows_that_vanish_are_recorded_whoever_wrote_them(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    odd_source(lambda tensors: tensors[TABLE][-3:].__imul__(np.float32(1e-9)))
    begin()
    quantize.run(tiny.MODEL, "q4")
    told = capsys.readouterr().out
    assert f"  {TABLE}: " in told and "blocks become zero" in told
    written = contents(workspace.artifact("q4"))
    (lost,) = read_json(workspace.artifact("q4") / quantize.PLAN_FILE)["lost"].values()
    assert 0 < lost["vanished"] < lost["blocks"] and lost["weights"] == 3 * 128 and lost["share"] < 1e-15
    quantize.run(tiny.MODEL, "q4")
    assert "written before" in capsys.readouterr().out
    assert contents(workspace.artifact("q4")) == written == whole(workspace)


def test_a_weight_beyond_float16_is_refused_until_it_gets_more_bits(workspace: Workspace) -> None:
    odd_source(lambda tensors: tensors[UP].__setitem__((3, 5), np.float32(3e6)))
    with pytest.raises(
        PipelineError, match=rf"'{UP}' as .*exceeds float16's 65,504 \(largest weight 3e\+06\)"
    ) as caught:
        quantize.run(tiny.MODEL, "q4")
    assert not workspace.artifact("q4").exists()
    ((role, fmt),) = re.findall(r"give (\S+) the format (\S+) in the recipe", str(caught.value))
    recipe = yaml.safe_load(Path("configs/recipes/q4.yaml").read_text())
    edit_recipe("q4", body=[{"roles": [role], "format": fmt}, *recipe["body"]])
    quantize.run(tiny.MODEL, "q4")
    assert "lost" not in read_json(workspace.artifact("q4") / quantize.PLAN_FILE)


# --- error compensation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["q4", "q3"])
def test_compensation_goes_on(variant: str, workspace: Workspace, computed: list[str]) -> None:
    """Interrupted half-way, what is finished is not quantized again: the same bytes."""
    expected = whole(workspace, variant)
    stop = computed[len(computed) // 2]

    def interrupted(item: work.Unit, *rest: Any) -> Any:
        if item.name == stop:
            raise KeyboardInterrupt
        return work.quantize_unit(item, *rest)

    shutil.rmtree(workspace.artifact(variant))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "quantize_unit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize.run(tiny.MODEL, variant)
    done = journal(workspace, variant)
    computed.clear()
    quantize.run(tiny.MODEL, variant)
    assert done and not done & set(computed)
    assert contents(workspace.artifact(variant)) == expected


def test_the_body_is_compensated_and_the_head_is_searched(workspace: Workspace) -> None:
    """On the calibration text every product of the body loses less than the search leaves."""
    store = Store()
    folder = workspace.reference(store)
    architecture, checkpoint = read_architecture(folder / "config.json"), Checkpoint(folder)
    moments, asked = read_moments(workspace), dict[str, tuple[np.ndarray, float]]()
    search = Compensated(moments, lambda name: asked.setdefault(name, read_products(workspace, name, moments[name])))
    plan = make_plan(architecture, load_recipe("q4").model_copy(update={"rotation": UNROTATED}))
    for item in plan.body:
        weights, fmt = checkpoint.rows(item.matrix.name), item.pieces[0].format
        losses = []
        for (found,) in (search.of(item, {})(weights), [weighted(weights, search.moments[item.matrix.input], fmt)]):
            error = weights - found.dequantize()
            losses.append(np.einsum("ri,ij,rj->", error, asked[item.matrix.input][0], error, optimize=True))
        assert losses[0] < losses[1], item.matrix.name
    (head,) = search.of(plan.head, {})(checkpoint.rows(plan.head.matrix.name))
    plain = weighted(checkpoint.rows(plan.head.matrix.name), search.moments["head"], plan.head.pieces[0].format)
    np.testing.assert_array_equal(head.codes, plain.codes)


# --- int8 KV cache ---------------------------------------------------------------------------------------------------

WIDE_CACHE = "extends: q4\ntitle: Q4 with a float32 KV cache\nversion: 1\ngate: q4\nkv_cache: float32\n"


def test_an_int8_cache_is_said_everywhere_and_decoded_by_genai(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("configs/recipes/q4_kv32.yaml").write_text(WIDE_CACHE)
    quantize.run(tiny.MODEL, "q4_kv32")
    told = capsys.readouterr().out
    assert "KV cache" not in told
    assert "rotated: values by heads, attention in runs of 32 when it runs, down in runs of 32" in told
    quantize.run(tiny.MODEL, "q4")
    assert "KV cache in int8: 384 bytes per token" in capsys.readouterr().out  # 3 layers, keys and values of 64
    plans = [read_json(workspace.artifact(variant) / quantize.PLAN_FILE) for variant in ("q4_kv32", "q4")]
    assert [plan["kv_cache"] for plan in plans] == [
        {"type": "float32", "bytes_per_token": 1536},
        {"type": "int8", "bytes_per_token": 384},
    ]
    ids = prompt(40)
    artifact = workspace.artifact("q4")
    written = greedy(artifact, ids, 24)
    logits, _ = OnnxDecoder(artifact / "tiny_q4.onnx").run(ids + written[:-1])
    assert len(written) > 4
    assert_greedy(written, logits[len(ids) - 1 :])


def test_an_int8_cache_needs_ranges(workspace: Workspace) -> None:
    workspace.ranges.unlink()
    with pytest.raises(PipelineError, match=r"ranges\.safetensors is not there.*python -m pipeline calibrate tiny"):
        quantize.run(tiny.MODEL, "q4")
    assert not workspace.artifact("q4").exists()
    Path("configs/recipes/q4_kv32.yaml").write_text(WIDE_CACHE)
    quantize.run(tiny.MODEL, "q4_kv32")  # which needs none


def test_other_ranges_start_an_int8_cache_anew(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    begin("q4")
    workspace.ranges.unlink()
    save_file(dict.fromkeys(CACHE, np.ones(64, np.float32)), workspace.ranges)
    quantize.run(tiny.MODEL, "q4")
    assert "dropped" in capsys.readouterr().err
