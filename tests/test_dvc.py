"""`dvc repro` of a whole tiny project: all is built once, killed runs continue, and only what changed runs again.

One project per session; the tests run in the order of the file, each from a committed state to a committed state.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.bundle.keys import key_id, public_pem
from tests import tiny
from tests.conftest import ROOT
from tests.documented import blocks

MODEL_STAGES = {"download", "export", "calibrate", "sensitivity", "parity", "reference", "tiers", "packs"}
LEARN = [f"learn@tiny-{variant}" for variant in tiny.VARIANTS]
QUANTIZE = [f"quantize@tiny-{variant}" for variant in tiny.VARIANTS]
BUNDLE = [f"bundle@tiny-{variant}" for variant in tiny.VARIANTS]
VARIANT_STAGES = ("learn", "quantize", "validate", "verdict", "bundle", "sign")  # in their order
PATIENCE = 600.0  # seconds that a stage may take before a test gives up on it
METRICS = ("metrics", "speed")  # folders of what DVC compares; git tracks the first
SLOW_WRITES = """
import os, time
pwrite = os.pwrite
def slow(*arguments):
    time.sleep(0.005)
    return pwrite(*arguments)
os.pwrite = slow
"""


@dataclass(frozen=True)
class Project:
    """The tiny project and how commands run in it."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`python -m ARGUMENTS` in the project, as its own process group."""
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Output of `python -m ARGUMENTS`, which must exit with `status`."""
        process = self.start(*arguments)
        output, _ = process.communicate()
        assert process.returncode == status, output
        return output

    def dvc(self, *arguments: str) -> str:
        """Output of a DVC command that must succeed."""
        return self.run("dvc", *arguments)

    def git(self, *arguments: str) -> str:
        """Output of a git command that must succeed."""
        return subprocess.run(["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=True).stdout

    def status(self) -> set[str]:
        """Stages whose own dependencies or outputs changed."""
        return set(json.loads(self.dvc("status", "--json")))

    def metrics(self, kind: str, variant: str) -> dict[str, Any]:
        """What a folder has of a variant: METRICS, or all measurements."""
        found: dict[str, Any] = json.loads(self.artifact(f"{kind}/tiny/{variant}.json").read_text())
        return found

    def artifact(self, name: str) -> Path:
        """A path below artifacts/."""
        return self.folder / "artifacts" / name

    def slow(self) -> Project:
        """This project with processes that write artifacts slowly: a kill then falls between any two units."""
        slow = self.folder.parent / "slow"
        slow.mkdir(exist_ok=True)
        (slow / "sitecustomize.py").write_text(SLOW_WRITES)
        return replace(self, environment=self.environment | {"PYTHONPATH": str(slow)})

    def finished_units(self, variant: str) -> list[str]:
        """What the journal of an unfinished artifact records, in its order."""
        journal = self.artifact(f"tiny/partial/{variant}.journal")
        return journal.read_text().splitlines()[1:] if journal.exists() else []


def ran(output: str) -> list[str]:
    """The stages that `dvc repro` ran, in order."""
    return re.findall(r"^Running stage '(.+)':$", output, re.MULTILINE)


def after(stage: str, *variants: str) -> set[str]:
    """`stage` of some variants and the stages of those variants that follow it, tiers, packs and report included."""
    following = VARIANT_STAGES[VARIANT_STAGES.index(stage) :]
    own = {f"{name}@tiny-{variant}" for name in following for variant in variants}
    return own | {"tiers@tiny", "packs@tiny", "report"}


def all_of(model: str) -> set[str]:
    """Every stage of a model."""
    return {f"{stage}@{model}" for stage in MODEL_STAGES} | {
        f"{stage}@{model}-{variant}" for stage in VARIANT_STAGES for variant in tiny.VARIANTS
    }


def bundles(*variants: str) -> set[str]:
    """The bundle stages: provenance names the files that decided, so a change to one makes another bundle."""
    return {f"bundle@tiny-{variant}" for variant in variants or tiny.VARIANTS}


def kill_during(project: Project, unfinished: Callable[[], bool], *, slowly: bool = False) -> None:
    """Start `dvc repro` and kill its whole process group as soon as `unfinished()`."""
    process = (project.slow() if slowly else project).start("dvc", "repro")
    deadline = time.monotonic() + PATIENCE
    while not unfinished():
        assert process.poll() is None, f"finished too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "never came so far"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def fresh(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project, nothing built."""
    root = tmp_path_factory.mktemp("dvc")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tiny.make_store(root / "store")
        folder = tiny.copy_project(root / "project")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "DVC_", "GIT_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # dvc.yaml says `python`
    return Project(folder, kept | {"PATH": path, "PIPELINE_STORE": str(root / "store"), "NO_COLOR": "1"})


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project of all tests but those of kills."""
    return fresh(tmp_path_factory)


@pytest.fixture(scope="session")
def built(project: Project) -> str:
    """What the run that made the project printed."""
    output = project.dvc("repro")
    tiny.commit(project.folder, "built")
    return output


@dataclass
class Interrupted:
    """What lay there unfinished after each kill, and what the run that completed the project printed."""

    project: Project
    output: str
    units: dict[str, list[list[str]]]
    folders: list[Path]


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """`dvc repro` killed at random points of writing two artifacts, again while it measured, and then not."""
    project = fresh(tmp_path_factory)
    chance = random.Random(0)
    units: dict[str, list[list[str]]] = {}
    for variant, kills in (("q4", 3), ("q3", 2)):  # in DVC's order
        units[variant] = []
        for count in sorted(chance.sample(range(1, 18), kills)):
            # More than before: a kill takes a moment, in which the last run may have come as far as this one is to.
            least = max(count, 1 + len(project.finished_units(variant)))
            kill_during(project, lambda: len(project.finished_units(variant)) >= least, slowly=True)  # noqa: B023
            units[variant].append(project.finished_units(variant))
            assert not project.artifact(f"tiny/variants/{variant}").exists()
    items = project.artifact("tiny/partial/evaluation.reference/mmlu/mmlu.jsonl")
    kill_during(project, lambda: items.exists() and len(items.read_bytes().splitlines()) > 5)
    assert not project.artifact("tiny/evaluation/reference").exists()
    folders = [*project.artifact("tiny/partial").iterdir()]
    return Interrupted(project, project.dvc("repro"), units, folders)


@pytest.fixture
def undo(project: Project) -> Any:
    """Put configuration, lock and outputs back to the last commit after the test."""
    yield
    subprocess.run(["git", "checkout", "-q", "."], cwd=project.folder, check=True)
    project.dvc("checkout", "-q")


def edit(project: Project, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a YAML file below configs/."""
    path = project.folder / "configs" / name
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_run_continues_where_it_was(interrupted: Interrupted) -> None:
    """What had finished is kept, what had not is made again, and no unfinished folder is taken for an output."""
    stages = ran(interrupted.output)
    assert "download@tiny" not in stages
    assert "calibrate@tiny" not in stages
    assert "reference@tiny" in stages
    assert {path.name for path in interrupted.folders} == {"evaluation.reference", "evaluation.reference.journal"}
    assert not [path for path in interrupted.folders if path.exists()], "gigabytes at full size"
    lock = (interrupted.project.folder / "dvc.lock").read_text()
    assert not [path.name for path in interrupted.folders if path.name in lock]


@pytest.mark.long
def test_killed_artifacts_are_those_of_an_undisturbed_run(interrupted: Interrupted, tmp_path: Path) -> None:
    """Each run went on from the journal of the one before, though `dvc repro` deletes outputs, to the same bytes."""
    project = interrupted.project
    for journals in interrupted.units.values():
        for before, after in pairwise(journals):
            assert 0 < len(before) < len(after)
            assert after[: len(before)] == before, "a unit recorded twice, or lost"
    assert not project.artifact("tiny/partial").exists()
    undisturbed = Project(tmp_path / "project", project.environment)
    shutil.copytree(project.folder, undisturbed.folder, ignore=shutil.ignore_patterns(".dvc", ".git", "variants"))
    for variant in interrupted.units:
        undisturbed.run("pipeline", "quantize", "tiny", variant)
        ours, theirs = (here.artifact(f"tiny/variants/{variant}") for here in (project, undisturbed))
        assert {file.name: file.read_bytes() for file in ours.iterdir()} == {
            file.name: file.read_bytes() for file in theirs.iterdir()
        }


def test_every_stage_ran_and_every_output_exists(built: str, project: Project) -> None:
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]
    assert set(lock) == all_of("tiny") | {"report"}
    for stage in lock.values():
        for out in stage["outs"]:
            assert (project.folder / out["path"]).exists(), out["path"]
    for name in ("report.html", "report.txt", "pareto.png", "pareto.json"):
        assert project.artifact(f"report/{name}").stat().st_size > 100


def test_passing_variants_are_bundles_and_the_failing_one_is_a_refusal(built: str, project: Project) -> None:
    for variant in tiny.VARIANTS:
        verdict = json.loads(project.artifact(f"verdicts/tiny/{variant}.json").read_text())["verdict"]
        content = project.artifact(f"bundles/tiny/{variant}/content")
        names = {file.name for file in content.iterdir()}
        if variant == "q3":
            assert (verdict, names) == ("FAIL", {"refusal.json"})
            continue
        assert verdict == "PASS"
        assert {"release.json", "genai_config.json", "tokenizer.json", f"tiny_{variant}.onnx"} <= names
        assert onnxruntime.InferenceSession(content / f"tiny_{variant}.onnx").get_outputs()[0].name == "logits"


def test_bundles_verify_and_refusals_do_not(built: str, project: Project) -> None:
    (key,) = project.artifact("keys").iterdir()
    for variant in tiny.VARIANTS:
        bundle = str(project.artifact(f"bundles/tiny/{variant}"))
        options = ("--public-key", str(key), "--allow-development", "--model", "tiny", "--variant", variant)
        output = project.run("pipeline", "verify", bundle, *options, status=int(variant == "q3"))
        assert ("refusal" if variant == "q3" else "OK") in output


def test_tiers_name_only_passing_bundles(built: str, project: Project) -> None:
    document = json.loads(project.artifact("tiers/tiny/content/tiers.json").read_text())
    text = json.dumps(document)
    assert '"q3"' not in json.dumps([tier.get("variant") for tier in document["tiers"].values()])
    assert '"q4' in text
    assert project.artifact("tiers/tiny/model.sig").exists()


def test_gate_tells_the_failure(built: str, project: Project) -> None:
    assert "tiny q3: FAIL" in project.run("pipeline", "gate", status=1)
    project.run("pipeline", "gate", "--variant", "q4", "--variant", "q4_k_m")


def test_two_variants_can_be_compared_and_talk(built: str, project: Project) -> None:
    found = json.loads(project.run("pipeline", "compare", "q4", "q4_k_m", "--json", "--prompt", "Good morning."))
    assert found["notes"] == []
    assert found["figures"]["divergence.kl_mean"]["difference"]["detectable"] > 0
    assert found["flips"].keys() == {"mmlu", "humaneval"}
    assert len(found["answers"][0]["answers"]) == 2
    told = project.run(
        "pipeline", "chat", "artifacts/bundles/tiny/q4", "--prompt", "Good morning.", "--max-tokens", "4"
    )
    assert "OK, tiny release" in told


def test_the_report_names_what_was_judged(built: str, project: Project) -> None:
    text = project.artifact("report/report.txt").read_text()
    assert "random/q4_k_m of configs/gates.yaml" in text
    assert f"onnxruntime {onnxruntime.__version__}" in text
    commit = project.git("log", "-1", "--format=%H", "--diff-filter=A", "--", "dvc.yaml").strip()
    assert f"{commit} of " in text


def test_the_private_key_is_in_no_output(built: str, project: Project) -> None:
    pem = (project.folder / ".keys/development.pem").read_bytes()
    lines = [line for line in pem.splitlines() if not line.startswith(b"-----")]
    assert ".keys" not in project.git("ls-files")
    searched = 0
    for folder in ("artifacts", ".dvc", "configs"):
        for file in (path for path in (project.folder / folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            assert b"PRIVATE KEY" not in content, file
            assert not [line for line in lines if line in content], file
            searched += 1
    assert searched > 50
    lock = (project.folder / "dvc.lock").read_bytes()
    assert b".keys" not in lock
    assert lines[0] not in lock


def test_nothing_runs_twice(built: str, project: Project) -> None:
    output = project.dvc("repro")
    assert ran(output) == []
    assert "Data and pipelines are up to date." in output


def test_a_dozen_metrics_of_every_variant_can_be_shown(built: str, project: Project) -> None:
    """Git tracks those that no machine's speed changes."""
    metrics = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert set(project.git("ls-files", "artifacts").split()) == {
        f"artifacts/metrics/tiny/{variant}.json" for variant in tiny.VARIANTS
    }
    assert metrics.keys() == {f"artifacts/{it}/tiny/{variant}.json" for it in METRICS for variant in tiny.VARIANTS}
    assert list(project.metrics("speed", "q4")) == ["tokens_per_second"]
    shown = project.metrics("metrics", "q4")
    figures = [(name, key) for name, section in shown.items() if name != "verdict" for key in section]
    assert len(figures) + len(METRICS) == 12, "ten, the verdict and the speed: they fit a screen"
    measured = json.loads(project.artifact("measurements/tiny/q4.json").read_text())
    assert shown.pop("verdict") == "PASS"
    for name, key in figures:
        assert shown[name][key] == pytest.approx(measured[name][key], rel=1e-3), (name, key)
    assert shown["size"]["packed_bytes"] > 0


def test_plots_are_shown_without_a_network(built: str, project: Project) -> None:
    project.dvc("plots", "show", "-o", "shown")
    page = (project.folder / "shown/index.html").read_text()
    assert "http" not in page
    (image,) = re.findall('src="(.+?)"', page)
    assert (project.folder / "shown" / image).read_bytes() == project.artifact("report/pareto.png").read_bytes()
    shutil.rmtree(project.folder / "shown")


# --- what runs again -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("built", "undo")
def test_an_experiment_on_one_recipe_runs_only_that_variant(project: Project) -> None:
    """Also what is shown of it: the parameter that changed and what it did to the measurements."""
    before = project.metrics("metrics", "q4")
    output = project.dvc("exp", "run", "-S", "configs/recipes/q4.yaml:head=w4b32s")
    assert set(ran(output)) == after("learn", "q4")
    assert project.status() == set()
    params = json.loads(project.dvc("params", "diff", "--json"))
    assert params["configs/recipes/q4.yaml"]["head"] == {"old": "w6b64a", "new": "w4b32s"}
    diff = json.loads(project.dvc("metrics", "diff", "--json"))
    assert set(diff) == {"artifacts/metrics/tiny/q4.json", "artifacts/speed/tiny/q4.json"}
    kl = diff["artifacts/metrics/tiny/q4.json"]["divergence.kl_mean"]
    assert kl["old"] == before["divergence"]["kl_mean"]
    assert kl["new"] > kl["old"]  # a tied 4-bit head is the embedding too
    assert diff["artifacts/metrics/tiny/q4.json"]["size.bytes_on_disk"]["diff"] < 0


@pytest.mark.long
@pytest.mark.usefixtures("built", "undo")
def test_a_recipe_put_back_computes_nothing_again(project: Project) -> None:
    """Though another artifact lies in its place, which no cache has."""
    kept = project.artifact("tiny/variants/q4/plan.json").read_bytes()
    edit(project, "recipes/q4.yaml", lambda recipe: recipe.update(head="w4b64s"))
    stages = [f"{stage}@tiny-q4" for stage in ("learn", "quantize", "validate", "verdict")]
    assert ran(project.dvc("repro", stages[-1])) == stages
    project.artifact("tiny/variants/q4/plan.json").unlink()
    edit(project, "recipes/q4.yaml", lambda recipe: recipe.update(head="w6b64a"))
    output = project.dvc("repro")
    assert ran(output) == []
    assert re.findall(r"^Stage '(.+)' is cached - skipping run", output, re.MULTILINE) == stages
    assert project.artifact("tiny/variants/q4/plan.json").read_bytes() == kept
    assert project.status() == set()


@pytest.mark.long
@pytest.mark.usefixtures("built", "undo")
def test_what_leaves_the_lists_stays(project: Project) -> None:
    """Variants, measurements and bundles, though DVC deletes what it linked and no stage names; and they come back
    without computing."""

    def files() -> dict[Path, bytes]:
        found = (file for file in project.artifact("").rglob("*") if file.is_file() and "q3" in file.as_posix())
        return {file: file.read_bytes() for file in found}

    before = files()
    project.dvc("exp", "run", "-S", "configs/pipeline.yaml:variants=[q4]")
    project.dvc("checkout")
    assert files() == before
    assert project.artifact("bundles/tiny/q3/model.sig") in before
    edit(project, "pipeline.yaml", lambda pipeline: pipeline.update(variants=list(tiny.VARIANTS)))
    assert not {stage for stage in ran(project.dvc("repro")) if stage.startswith(("quantize", "validate"))}


@pytest.mark.usefixtures("built", "undo")
def test_new_limits_judge_again_and_measure_nothing(project: Project) -> None:
    edit(project, "gates.yaml", lambda gates: gates["classes"]["random"]["variants"].update(q4_k_m=tiny.IMPOSSIBLE))
    assert project.status() == {"verdict@tiny-q4_k_m", "bundle@tiny-q4_k_m"}
    assert set(ran(project.dvc("repro"))) == {"verdict@tiny-q4_k_m"} | after("bundle", "q4_k_m")
    assert project.artifact("bundles/tiny/q4_k_m/content/refusal.json").exists()


@pytest.mark.usefixtures("built", "undo")
def test_another_key_signs_again_and_only_that(project: Project) -> None:
    """The bundle names its key, so it is assembled again; models are neither built nor measured."""
    edit(project, "signing.yaml", lambda signing: signing.update(key_id="0" * 64))
    stale = {f"{stage}@tiny-{variant}" for stage in ("bundle", "sign") for variant in tiny.VARIANTS}
    assert project.status() == stale | {"tiers@tiny", "packs@tiny", "report"}


@pytest.mark.usefixtures("built", "undo")
@pytest.mark.parametrize(
    ("name", "change", "stale"),
    [
        (
            "recipes/q3.yaml",
            lambda recipe: recipe.update(version=99),
            {"learn@tiny-q3", "quantize@tiny-q3"} | bundles("q3"),
        ),
        ("released.yaml", lambda released: released.update(models={"other": {}}), set()),
        (
            "calibration.yaml",
            lambda calibration: calibration.update(window=32),
            {"calibrate@tiny", *LEARN} | bundles(),  # what calibrate writes then makes quantize stale
        ),
        ("parity.yaml", lambda parity: parity.update(prompt_tokens=9), {"parity@tiny"} | bundles()),
        ("tiers.yaml", lambda tiers: tiers.update(context=77), {*LEARN, *QUANTIZE, *BUNDLE, "tiers@tiny", "report"}),
        (
            "evaluation/seconds.yaml",
            lambda suite: suite["mmlu"].update(questions=58),
            {"reference@tiny", *(f"validate@tiny-{variant}" for variant in tiny.VARIANTS), "report"} | bundles(),
        ),
        ("models/other.yaml", lambda model: model.update(title="Not selected"), set()),
    ],
    ids=["recipe", "releases", "calibration", "parity", "tiers", "suite", "unselected model"],
)
def test_a_parameter_makes_only_its_stages_stale(
    project: Project, name: str, change: Callable[[dict[str, Any]], object], stale: set[str]
) -> None:
    edit(project, name, change)
    assert project.status() == stale


@pytest.mark.usefixtures("built", "undo")
def test_another_model_is_a_parameter(project: Project) -> None:
    edit(project, "pipeline.yaml", lambda pipeline: pipeline.update(models=["tiny", "other"]))
    assert project.status() == all_of("other") | {"report"}
    planned = project.dvc("repro", "--dry", "--glob", "download@*")
    assert ran(planned) == ["download@other"]


# --- what is kept of a measurement, and shared by machines ------------------------------------------------------------


@pytest.mark.usefixtures("built", "undo")
def test_more_questions_ask_only_the_new_ones(project: Project) -> None:
    """Though `dvc repro` runs the stages: their outputs lie there until each section has looked at its own key."""
    before = project.metrics("measurements", "q4")
    cached = project.artifact("tiny/evaluation/q4/mmlu/mmlu.jsonl")
    inode, content = cached.stat().st_ino, cached.read_bytes()
    edit(project, "evaluation/seconds.yaml", lambda suite: suite["mmlu"].update(questions=58))
    output = project.dvc("repro", "reference@tiny", "validate@tiny-q4")
    assert set(ran(output)) == {"reference@tiny", "validate@tiny-q4"}
    assert output.count("mmlu: 57 items kept") == 2
    assert output.count("kept as measured before") == 2 * 4
    after = project.metrics("measurements", "q4")
    assert (before.pop("mmlu")["n"], after.pop("mmlu")["n"]) == (57, 58)
    assert before == after
    grown = project.artifact("tiny/evaluation/q4/mmlu/mmlu.jsonl")
    assert grown.stat().st_ino != inode
    assert grown.read_bytes().startswith(content)


@pytest.mark.long
@pytest.mark.usefixtures("built", "undo")
def test_a_machine_without_the_references_memory_pulls_its_results(project: Project, tmp_path: Path) -> None:
    """Another clone, with a cache of its own, measures a new variant against what the first machine measured."""
    project.dvc("remote", "add", "--default", "shared", str(tmp_path / "remote"))
    project.dvc("push", "-q")
    other = Project(tmp_path / "other", project.environment)
    subprocess.run(["git", "clone", "-q", str(project.folder), str(other.folder)], check=True)
    shutil.copy(project.folder / ".dvc/config", other.folder / ".dvc/config")
    shutil.copytree(project.folder / "pipeline", other.folder / "pipeline", dirs_exist_ok=True)  # with what is compiled
    other.dvc("pull", "-q")
    assert other.status() == set()
    edit(other, "evaluation/seconds.yaml", lambda suite: suite.update(reference="memory"))
    edit(other, "recipes/q4.yaml", lambda recipe: recipe.update(head="w4b32s"))
    other.run("pipeline", "quantize", "tiny", "q4")
    output = other.run("pipeline", "validate", "tiny", "q4")
    assert "divergence: measured again: files changed" in output
    ours, theirs = (one.metrics("measurements", "q4") for one in (project, other))
    assert theirs["divergence"]["perplexity_reference"] == ours["divergence"]["perplexity_reference"]
    assert theirs["divergence"]["kl_mean"] > ours["divergence"]["kl_mean"]


@pytest.mark.long
def test_a_clone_that_builds_all_again_differs_in_the_ledger_only(built: str, project: Project, tmp_path: Path) -> None:
    """Not in what git tracks of the results: speeds, memory and the development key belong to the machine."""
    other = Project(tmp_path / "clone", project.environment)
    subprocess.run(["git", "clone", "-q", str(project.folder), str(other.folder)], check=True)
    other.dvc("repro")
    assert other.git("status", "--porcelain") == " M dvc.lock\n"


# --- a release, from its tag ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tagged:
    """What the release machines get: the repository with its tag, the DVC remote, and the two halves of the key."""

    repository: Path
    remote: Path
    key: Path
    public: Path


@pytest.fixture(scope="session")
def tagged(project: Project, built: str, tmp_path_factory: pytest.TempPathFactory) -> Tagged:
    """The built project pushed and tagged as release 1 of a release key that the build machine does not have."""
    folder = tmp_path_factory.mktemp("release")
    private = ec.generate_private_key(ec.SECP256R1())
    (folder / "release.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (folder / "release.pub.pem").write_bytes(public_pem(private.public_key()))
    subprocess.run(["git", "clone", "-q", str(project.folder), str(folder / "repository")], check=True)
    release = Project(folder / "repository", project.environment)
    edit(
        release, "signing.yaml", lambda signing: signing.update(channel="release", key_id=key_id(private.public_key()))
    )
    tiny.commit(release.folder, "Release 1")
    subprocess.run(["git", "tag", "release-1"], cwd=release.folder, check=True)
    project.dvc("remote", "add", "--local", "--default", "shared", str(folder / "remote"))
    project.dvc("push", "-q")
    project.dvc("remote", "remove", "--local", "shared")
    return Tagged(release.folder, folder / "remote", folder / "release.pem", folder / "release.pub.pem")


def release_machine(folder: Path, tagged: Tagged, project: Project) -> tuple[Project, str]:
    """A clean clone of the tag with nothing but the remote and the key, and what `dvc repro` said there."""
    subprocess.run(["git", "clone", "-q", "--branch", "release-1", str(tagged.repository), str(folder)], check=True)
    own = {"PIPELINE_STORE": str(folder.parent / "no-store"), "PIPELINE_SIGNING_KEY_FILE": str(tagged.key)}
    machine = Project(folder, project.environment | own)
    machine.dvc("remote", "add", "--local", "--default", "shared", str(tagged.remote))
    return machine, machine.dvc("repro", "--pull", "--allow-missing")


def published(folder: Path) -> dict[str, bytes]:
    """All bytes that leave the building: bundles, tiers and packs."""
    roots = [folder / "artifacts" / name for name in ("bundles", "tiers", "packs")]
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.long
def test_a_tag_becomes_published_bundles_and_the_same_bytes_again(
    tagged: Tagged, project: Project, tmp_path: Path
) -> None:
    first, output = release_machine(tmp_path / "first" / "clone", tagged, project)
    variants = [f"{stage}@tiny-{variant}" for stage in ("bundle", "sign") for variant in tiny.VARIANTS]
    assert set(ran(output)) == {*variants, "tiers@tiny", "packs@tiny", "report"}, "nothing is measured again"
    assert not (tmp_path / "first" / "no-store" / "sha256").exists(), "no checkpoint is needed"
    first.run("pipeline", "gate", "--variant", "q4", "--variant", "q4_k_m")
    key, store = ("--public-key", str(tagged.public)), str(tmp_path / "store")
    for variant in ("q4", "q4_k_m"):
        first.run("pipeline", "push", f"artifacts/bundles/tiny/{variant}", store, *key)
    first.run("pipeline", "push", "artifacts/tiers/tiny", store, *key)
    phone = str(tmp_path / "phone" / "bundle")
    first.run("pipeline", "fetch", store, "tiny", "--tier", "android-24gb", *key, "--to", phone)
    first.run("pipeline", "verify", phone, *key, "--model", "tiny", "--tier", "android-24gb")

    again, _ = release_machine(tmp_path / "second" / "elsewhere", tagged, project)
    ours, theirs = published(first.folder), published(again.folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert "artifacts/bundles/tiny/q4/model.sig" in ours


# --- documentation is executed ----------------------------------------------------------------------------------------


def walk(project: Project, *marks: str) -> None:
    """Run the documents' shell blocks of these marks as written, in the order of the pages.

    The tiny model stands in SmolLM2's place, and /tmp for a folder of the test's own. After each page the configuration
    is what was committed.
    """
    environment, scratch = project.folder / ".venv", project.folder.parent / "tmp"
    if not environment.exists():
        assert (Path(sys.prefix) / ".ready").exists(), "the tests run in the environment that `make` made"
        environment.symlink_to(sys.prefix)
    for path in (*project.folder.glob("*.txt"), *project.folder.glob("pipeline/keys/dvc_hook/*")):
        os.utime(path, (0, 0))  # else `make` would install the environment again
    scratch.mkdir(exist_ok=True)
    for page, found in groupby(blocks(), lambda block: block.page):
        for block in found:
            if block.mark in marks:
                text = block.text.replace("smollm2-135m", tiny.MODEL).replace("/tmp/", f"{scratch}/")
                command = ["bash", "-euo", "pipefail", "-c", f"source .venv/bin/activate\n{text}"]
                done = subprocess.run(
                    command, cwd=project.folder, env=project.environment, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{block.place}:\n{block.text}\n{done.stdout[-3000:]}"
            elif block.mark.startswith("sh shown"):
                print(f"{block.place} is not run: {block.mark.partition(': ')[2]}")
        project.git("checkout", "-q", "--", "configs")
        assert not project.git("status", "--short", "--", "configs"), f"{page} leaves other configurations behind"


def test_the_documented_commands_run_as_written(project: Project, built: str, undo: None) -> None:
    walk(project, "sh run")


@pytest.mark.long
def test_the_documented_commands_of_minutes_run_as_written(project: Project, built: str, undo: None) -> None:
    walk(project, "sh long")
