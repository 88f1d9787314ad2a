"""The verdict stage: who is judged by which limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError, EvaluationError
from pipeline.files import read_json, sha256_of, write_json
from pipeline.runtime.session import runtimes
from pipeline.stages import verdict
from pipeline.workspace import PLAN_FILE, REFERENCE, Workspace
from tests import tiny
from tests.conftest import ROOT


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The tiny model's, judged as `random` beside the classes that are shipped, with no measurement but its size."""
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    own, shipped = (yaml.safe_load((root / "configs/gates.yaml").read_text())["classes"] for root in (tmp_path, ROOT))
    tiny.edit(Path("configs/gates.yaml"), classes=own | shipped)
    workspace = Workspace(tiny.MODEL)
    workspace.metrics(REFERENCE).parent.mkdir(parents=True)
    for path in (workspace.metrics(REFERENCE), workspace.parity, workspace.artifact("q4") / PLAN_FILE):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    return workspace


def judge(workspace: Workspace, metrics: dict[str, Any]) -> None:
    write_json(workspace.metrics("q4"), metrics)
    verdict.run(tiny.MODEL, "q4")


def test_a_model_of_another_size_is_not_judged(workspace: Workspace) -> None:
    for parameters, way_out in ((7_600_000_000, "Use 7b-and-up"), (3_800_000_000, "Use 3b-to-4b"), (10**12, "Add a")):
        with pytest.raises(ConfigError, match=rf"'random' judges real models of 0 to 1,000,000 .*{way_out}"):
            judge(workspace, {"size": {"parameters": parameters}})
    assert not workspace.verdict("q4").exists()


def test_a_size_that_nobody_measured_judges_nothing(workspace: Workspace) -> None:
    for metrics in ({}, {"size": {}}, {"size": {"parameters": "many"}}):
        with pytest.raises(EvaluationError, match="do not say how many parameters"):
            judge(workspace, metrics)


@pytest.mark.parametrize(
    ("own", "mark", "way_out"),
    [
        ("under-1b", {"talking": "synthetic"}, "this talking one has 500,000. Use talking."),
        ("talking", {}, "'talking' judges talking models .* this real one has 500,000. Use .*under-1b"),
    ],
)
def test_talking_models_and_real_ones_are_judged_by_classes_of_their_own(
    workspace: Workspace, own: str, mark: dict[str, str], way_out: str
) -> None:
    tiny.edit(Path(f"configs/models/{tiny.MODEL}.yaml"), gate_class=own)
    with pytest.raises(ConfigError, match=way_out):
        judge(workspace, {"size": {"parameters": 500_000}, "identity": mark})


def test_without_measurements_the_verdict_is_an_error(workspace: Workspace) -> None:
    judge(workspace, {"size": {"parameters": 500_000}})
    assert read_json(workspace.verdict("q4"))["verdict"] == "ERROR"


def test_measurements_of_another_plan_or_runtime_are_no_evidence_until_measured_again(workspace: Workspace) -> None:
    own = runtimes() | {"plan_sha256": sha256_of(workspace.artifact("q4") / PLAN_FILE)}

    def evidence(variant: dict[str, str], reference: dict[str, str]) -> list[str]:
        write_json(workspace.metrics(REFERENCE), {"identity": reference})
        judge(workspace, {"size": {"parameters": 500_000}, "identity": variant})
        found = read_json(workspace.verdict("q4"))
        assert found["verdict"] == "ERROR"  # nothing else was measured here
        return [line["note"] for line in found["lines"] if line["name"] == "evidence"]

    assert evidence(own, runtimes()) == []
    for name, installed in runtimes().items():
        other = {name: "0.1"}
        for whose, pair in {"variant": (own | other, runtimes()), "reference": (own, runtimes() | other)}.items():
            (note,) = evidence(*pair)
            assert f"the {whose} was measured in {name} 0.1, installed is {installed}" in note
    write_json(workspace.artifact("q4") / PLAN_FILE, {"another": "plan"})
    (note,) = evidence(own, runtimes())
    assert "run `python -m pipeline validate` for this variant" in note
    assert evidence(own | {"plan_sha256": sha256_of(workspace.artifact("q4") / PLAN_FILE)}, runtimes()) == []
