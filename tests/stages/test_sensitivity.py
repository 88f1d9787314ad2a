"""The sensitivity stage: measured only where a budget reads it, kept while nothing changes; budgets planned by it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import yaml

from pipeline.artifact import plans
from pipeline.artifact.plans import plan_recipe
from pipeline.artifact.write import draft
from pipeline.checkpoint.architecture import read_architecture
from pipeline.config.recipes import load_recipe
from pipeline.config.typed_yaml import CONFIGS
from pipeline.errors import PipelineError
from pipeline.planning.budget import Solution
from pipeline.planning.memory import Memory, packed_memory
from pipeline.planning.recipes import make_plan
from pipeline.planning.sensitivity import read_sensitivity
from pipeline.preflight.guard import guarded
from pipeline.stages import calibrate, download, export, sensitivity
from pipeline.workspace import MODEL_FILE, Workspace
from tests import tiny


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The tiny model, calibrated."""
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    tiny.edit(CONFIGS / "sensitivity.yaml", texts={tiny.CALIBRATION: 64}, window=32, rows=64)
    download.run(tiny.MODEL)
    export.run(tiny.MODEL)
    calibrate.run(tiny.MODEL)
    return Workspace(tiny.MODEL)


def add_budget(**limits: object) -> None:
    recipe = {"title": "A budget", "version": 1, "gate": "q4", "budget": limits}
    (CONFIGS / "recipes" / "small.yaml").write_text(yaml.safe_dump(recipe))
    tiny.edit(CONFIGS / "pipeline.yaml", variants=["q4", "small"])


def test_measured_once_and_only_where_a_budget_reads_it(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.edit(CONFIGS / "pipeline.yaml", variants=["q4"])
    guarded("sensitivity", sensitivity.run, tiny.MODEL, if_needed=True)
    assert list(workspace.sensitivity.iterdir()) == []
    with pytest.raises(PipelineError, match="sensitivity"):
        read_sensitivity(workspace)
    add_budget(body_bits=3.5)
    guarded("sensitivity", sensitivity.run, tiny.MODEL, if_needed=True)
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in workspace.sensitivity.iterdir()}
    matrices = read_architecture(workspace.root / "reference" / "config.json").matrices
    assert set(read_sensitivity(workspace).nats) == {matrix.name for matrix in matrices}
    capsys.readouterr()
    sensitivity.run(tiny.MODEL)
    assert "kept" in capsys.readouterr().out
    assert before == {file.name: (file.stat().st_ino, file.read_bytes()) for file in workspace.sensitivity.iterdir()}
    tiny.edit(CONFIGS / "sensitivity.yaml", rows=32)
    sensitivity.run(tiny.MODEL)
    assert "kept" not in capsys.readouterr().out, "what other settings measured is not for this budget"


def test_every_budget_is_kept_to_the_byte_or_refused(workspace: Workspace) -> None:
    """The graph grows with splits, which no sum over matrices tells: the last bytes are fought for."""
    sensitivity.run(tiny.MODEL)
    architecture = read_architecture(workspace.root / "reference" / "config.json")
    source = onnx.load(workspace.export / MODEL_FILE, load_external_data=False)
    q4 = draft(source, make_plan(architecture, load_recipe("q4")), "stem", 1 << 30).bytes
    for size in range(q4 - 40_000, q4 + 40_000, 1_777):
        add_budget(bytes=size)
        planned = plan_recipe(load_recipe("small"), architecture, source, "small", tiny.MODEL)
        assert planned.draft.bytes <= size
    packed = sum(map(packed_memory, planned.draft.plan.tables))
    add_budget(packed=packed)
    planned = plan_recipe(load_recipe("small"), architecture, source, "small", tiny.MODEL)
    assert 0.9 * packed < sum(map(packed_memory, planned.draft.plan.tables)) <= packed
    add_budget(bytes=q4 // 3)
    with pytest.raises(PipelineError, match="at least"):
        plan_recipe(load_recipe("small"), architecture, source, "small", tiny.MODEL)


def test_a_graph_that_keeps_growing_is_caught_up_with(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that fills what it is given to the byte, and a graph that is 60 bytes larger with every other plan."""
    graphs = iter(range(60, 6000, 60))
    limit = 1_000_000
    monkeypatch.setattr(plans, "read_sensitivity", lambda _: None)
    monkeypatch.setattr(plans, "groups", lambda *_: [])
    monkeypatch.setattr(plans, "smallest", lambda *_: SimpleNamespace(bytes=0, tables=()))
    monkeypatch.setattr(plans, "solve", lambda _a, _c, room, _k: Solution(SimpleNamespace(bytes=room["bytes"]), 1, 1))
    monkeypatch.setattr(plans, "rotated", lambda plan, _: plan)
    monkeypatch.setattr(plans, "plan_memory", lambda *_: Memory(0, 0, 0, 0, 0))

    def drafted(_: object, plan: SimpleNamespace, *__: object) -> SimpleNamespace:
        return SimpleNamespace(bytes=plan.bytes and plan.bytes + next(graphs))

    monkeypatch.setattr(plans, "draft", drafted)
    add_budget(bytes=limit)
    architecture = read_architecture(workspace.root / "reference" / "config.json")
    planned = plan_recipe(load_recipe("small"), architecture, onnx.ModelProto(), "small", tiny.MODEL)
    assert limit - 2_000 < planned.draft.bytes <= limit
