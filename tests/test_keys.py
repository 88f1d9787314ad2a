"""What runs again, asked of DVC itself: a change makes the stages stale whose result can change, and no others.

A repository in which every stage counts as run (its outputs are empty files), so that `dvc status` says which would run
again because of what they depend on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.exceptions import DvcException

from pipeline.files import read_json
from pipeline.keys.closure import Closure
from tests import tiny
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SIGNED = {"bundle", "sign", "tiers", "packs", "report"}
MEASURED = {"reference", "validate"}
TASKS = {"verdict", "bundle", "report"}
"""Seconds each: they read of the tasks what is judged and shown, and so import them."""


class Repository:
    """A project in which everything has run, and what DVC says of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def dvc(self, *arguments: str) -> str:
        """Output of a DVC command that must succeed."""
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def records(self) -> dict[str, dict[str, str]]:
        """SHA-256 of the modules that each record names, by its path."""
        code = self.folder / "artifacts/code"
        found = {path.relative_to(code).with_suffix(""): read_json(path) for path in code.rglob("*.json")}
        return {path.as_posix(): record["modules"] for path, record in found.items()}

    def stale(self) -> set[str]:
        """Stages that `dvc status` would run again; asked in this process, because DVC takes a second to start."""
        from dvc.repo import Repo

        with Repo(str(self.folder)) as repo:
            return {name.rpartition(":")[2].split("@")[0] for name in repo.status()}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """All outputs are there and locked with today's keys."""
    folder = tmp_path_factory.mktemp("keys") / "project"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tiny.copy_project(folder)
    made = Repository(folder)
    for stage in STAGES.values():
        outs = [*stage.get("outs", ()), *stage.get("metrics", ()), *stage.get("plots", ())]
        for out in (next(iter(entry)) if isinstance(entry, dict) else entry for entry in outs):
            for variant in tiny.VARIANTS:
                path = folder / out.replace("${item.model}", tiny.MODEL).replace("${item.variant}", variant)
                if path.suffix in (".json", ".html", ".txt", ".png", ".sig"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("{}")
                else:
                    path.mkdir(parents=True, exist_ok=True)
                    (path / "plan.json").write_text("{}")
    made.dvc("commit", "--force", "--quiet")
    assert made.stale() == set()
    return made


@pytest.fixture
def edited(repository: Repository) -> Iterator[Callable[..., set[str]]]:
    """Change the text of files; what is stale then. They are put back after the test."""
    kept: dict[Path, bytes] = {}

    def change(edit: Callable[[str], str], *names: str) -> set[str]:
        for path in (repository.folder / name for name in names):
            kept.setdefault(path, path.read_bytes())
            after = edit(path.read_text())
            assert after != path.read_text()
            path.write_text(after)
        return repository.stale()

    yield change
    for path, content in kept.items():
        path.write_bytes(content)


def longer(text: str) -> str:
    """Another module, or another comment of it: keys do not look inside."""
    return f"{text}\n# changed\n"


def yaml_with(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """An edit of a YAML file's values."""

    def edit(text: str) -> str:
        values = yaml.safe_load(text)
        change(values)
        return yaml.safe_dump(values, sort_keys=False)

    return edit


MODULES: dict[str, set[str]] = {
    "stages/download.py": {"download", "bundle"},
    "checkpoint/hub.py": {"download", "bundle"},
    "graph/decoder.py": {"export", "parity", "learn", "quantize", *MEASURED, "bundle"},
    "graph/genai.py": {"download", "export", "bundle"},
    "stages/calibrate.py": {"calibrate", "bundle"},
    "calibrate/damage.py": {"sensitivity", "bundle"},
    "parity/compare.py": {"parity", "bundle"},
    "learn/training.py": {"learn", "bundle"},
    "quantize/gptq.py": {"learn", "quantize", "bundle"},
    "quantize/factor.py": {"calibrate", "learn", "quantize", "bundle"},
    "artifact/write.py": {"learn", "quantize", "bundle"},
    "runtime/generate.py": {*MEASURED, *TASKS},
    "tasks/mmlu_scoring.py": {*MEASURED, *TASKS},
    "stages/validate.py": {*MEASURED, "bundle"},
    "judge/policy.py": {*MEASURED, *TASKS},  # which limits judge, and whether looks go on: items are kept
    "bundle/bom.py": {"bundle"},
    "stages/tiers.py": {"tiers"},
    "packs/android.py": {"packs"},
    "report/page.html.j2": {"report"},
    "preflight/needs.py": set(),  # says what a stage takes, decides nothing
    "cli.py": set(),
    "progress.py": set(),
    "engine/units.py": set(),
}
FAR: dict[str, tuple[set[str], set[str]]] = {  # what they reach, and what they do not
    "runtime/session.py": (
        {"calibrate", "sensitivity", "parity", *MEASURED},
        {"download", "export", "sign", "packs"},
    ),
    "graph/nodes.py": ({"export", "parity", "quantize"}, {"download", "sign", "packs", "tiers"}),
    "judge/gates.py": ({"verdict", "validate"}, {"quantize", "calibrate", "export"}),
}


def test_a_module_makes_the_stages_stale_that_import_it(
    repository: Repository, edited: Callable[..., set[str]]
) -> None:
    """All are edited and DVC is asked once, which takes seconds; records say which module made which stage stale."""
    before = repository.records()
    stale = edited(longer, *(f"pipeline/{module}" for module in (*MODULES, *FAR)))
    changed: dict[str, set[str]] = {module: set() for module in (*MODULES, *FAR)}
    for record, after in repository.records().items():
        for path in (path for path in after if after[path] != before[record][path]):
            changed[path.removeprefix("pipeline/")].add(record.split("/")[0])
    assert stale == set().union(*changed.values())
    assert {module: changed[module] for module in MODULES} == MODULES
    for module, (within, without) in FAR.items():
        assert within <= changed[module]
        assert not without & changed[module]


def test_every_stage_depends_on_its_own_module_and_every_library_it_imports() -> None:
    for stage, entry in STAGES.items():
        module = entry["cmd"].split()[3]
        closure = Closure.of(f"pipeline.stages.{module}")
        assert f"pipeline/stages/{module}.py" in closure.hashes(), stage
    assert "onnxruntime-genai" in Closure.of("pipeline.stages.validate").libraries()
    assert "numba" in Closure.of("pipeline.stages.quantize").libraries()


def test_another_version_of_a_library_makes_what_it_computes_stale(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "onnxruntime-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 9.9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = repository.stale()
    assert {"calibrate", "sensitivity", "parity", "verdict", *MEASURED} <= found
    assert {"download", "export"} <= found  # they prove the tokenizer with onnxruntime-genai
    assert not {"sign", "packs"} & found


def test_a_default_makes_the_stages_stale_that_read_it(edited: Callable[..., set[str]]) -> None:
    """`part_bytes` stands in no recipe; the class gives it."""
    found = edited(
        lambda text: re.sub(r"default=1_400_000_000", "default=1_300_000_000", text), "pipeline/config/recipes.py"
    )
    assert "quantize" in found
    assert not {"download", "export", "calibrate", "parity", *MEASURED, "sign", "packs"} & found


@pytest.mark.parametrize(
    ("file", "change", "stale"),
    [
        ("models/tiny.yaml", lambda entry: entry.update(mmlu_close_think=True), {*MEASURED, *TASKS}),
        ("models/tiny.yaml", lambda entry: entry.update(note="Read this."), {*MEASURED, "verdict", "bundle", "report"}),
        ("recipes/q4.yaml", lambda recipe: recipe.update(title="Other"), {"learn", "quantize", "validate", *TASKS}),
        ("gates.yaml", lambda gates: gates.update(ratchet=1.5), {"verdict", "bundle"}),
        (
            "signing.yaml",
            lambda signing: signing.update(key_id="0" * 64),
            {"bundle", "sign", "tiers", "packs", "report"},
        ),
        ("parity.yaml", lambda parity: parity.update(prompt_tokens=9), {"parity", "bundle"}),
    ],
    ids=["think", "note", "title", "gates", "key", "parity"],
)
def test_a_value_makes_the_stages_stale_that_read_it(
    edited: Callable[..., set[str]], file: str, change: Callable[[dict[str, Any]], object], stale: set[str]
) -> None:
    assert edited(yaml_with(change), f"configs/{file}") == stale


def test_comments_and_what_no_stage_reads_change_nothing(edited: Callable[..., set[str]]) -> None:
    commented = ("gates", "calibration", "recipes/q4", "models/tiny")
    assert edited(longer, *(f"configs/{name}.yaml" for name in commented)) == set()
    unread = ("configs/models/other.yaml", "configs/devices.yaml")  # a model that is not selected; a phone's title
    assert edited(lambda text: text.replace("title: ", "title: My ", 1), *unread) == set()


def test_a_single_stage_and_an_experiment_see_the_same_change(repository: Repository, tmp_path: Path) -> None:
    """`dvc repro -s` looks at no other stage, and `dvc exp run` changes values itself: keys are written in both."""
    copy = Repository(tmp_path / "project")
    shutil.copytree(repository.folder, copy.folder, symlinks=True)
    module = copy.folder / "pipeline/stages/sign.py"
    module.write_text(longer(module.read_text()))
    single = copy.dvc("repro", "--dry", "-s", f"sign@{tiny.MODEL}-q4")
    assert f"Running stage 'sign@{tiny.MODEL}-q4'" in single
    module.write_bytes((repository.folder / "pipeline/stages/sign.py").read_bytes())
    assert "Running stage" not in copy.dvc("repro", "--dry", "-s", f"sign@{tiny.MODEL}-q4")


def test_a_bad_value_is_said_before_anything_runs(repository: Repository, edited: Callable[..., set[str]]) -> None:
    with pytest.raises(DvcException, match=r"gates\.yaml: .*ratchett: unknown key; did you mean 'ratchet'"):
        edited(lambda text: text.replace("ratchet:", "ratchett:"), "configs/gates.yaml")
