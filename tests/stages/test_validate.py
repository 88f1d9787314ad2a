"""The validate stage on the tiny model: what is kept, what is measured again, and the reference layer by layer."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet

from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.sources import fetch_dataset
from pipeline.config.sources import load_datasets
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.journal import Journal
from pipeline.judge import escalation
from pipeline.runtime.device import Gpu
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.side_by_side import SideBySide
from pipeline.stages import calibrate, download, export, quantize, validate
from pipeline.tasks import divergence_scores as divergence
from pipeline.tasks import mmlu as mmlu_section
from pipeline.tasks.mmlu_questions import Prompt, load_questions
from pipeline.tasks.mmlu_scoring import Scorer
from pipeline.tasks.registry import load_suite
from pipeline.tasks.written import ITEMS
from pipeline.workspace import REFERENCE, Workspace
from tests import tiny
from tests.checkpoint.hub_server import REPO, REVISION, Hub, serve
from tests.conftest import ROOT, dataset
from tests.torch_device import choose

WORKSPACE = Workspace(tiny.MODEL)
SUITE = Path("configs/evaluation/seconds.yaml")
QUESTIONS = 57
SECTIONS = ("divergence", "mmlu", "humaneval", "agreement", "speed")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the tiny model, quantized as q4, and both measured."""
    folder = tmp_path_factory.mktemp("validate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tiny.make_store(folder / "store")
        patch.setenv("PIPELINE_STORE", str(folder / "store"))
        patch.setenv("PYTHONPATH", str(ROOT))  # speed is measured in a process of its own
        patch.chdir(tiny.copy_configs(folder))
        for stage in (download, export, calibrate):
            stage.run(tiny.MODEL)
        quantize.run(tiny.MODEL, "q4")
        for variant in (REFERENCE, "q4"):
            validate.run(tiny.MODEL, variant)
        yield folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `prepared`, the current directory. Files are hard links, as DVC's are: nothing may grow in them."""
    shutil.copytree(prepared / "configs", tmp_path / "configs")
    shutil.copytree(prepared / "artifacts", tmp_path / "artifacts", copy_function=os.link)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PIPELINE_STORE", str(prepared / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The MMLU prompts whose answers were scored."""
    found: list[str] = []
    whole = Scorer.scores

    def spy(self: Scorer, prompt: Prompt) -> np.ndarray:
        found.append(prompt.text)
        return whole(self, prompt)

    monkeypatch.setattr(Scorer, "scores", spy)
    return found


def metrics(variant: str) -> dict[str, Any]:
    return read_json(WORKSPACE.measurements(variant))


def bytes_of(variant: str, section: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (WORKSPACE.evaluation(variant) / section).iterdir()}


def edit(part: str, **changes: Any) -> None:
    """Change a part of the suite."""
    tiny.edit(SUITE, **{part: getattr(load_suite("seconds"), part).model_dump(mode="json") | changes})


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the last run said of each section."""
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("variant", [REFERENCE, "q4"])
def test_what_did_not_change_is_not_measured(
    variant: str, project: Path, scored: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = metrics(variant)
    validate.run(tiny.MODEL, variant)
    assert said(capsys) == dict.fromkeys(SECTIONS, "kept as measured before")
    assert metrics(variant) == before
    assert scored == []
    assert not WORKSPACE.partial("x").parent.exists()


def test_more_questions_score_only_the_new_ones_as_a_fresh_run_would(
    project: Path, scored: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit("mmlu", questions=QUESTIONS + 2)
    for variant in (REFERENCE, "q4"):
        scored.clear()
        validate.run(tiny.MODEL, variant)
        assert len(scored) == 2
        assert said(capsys) == {
            "mmlu": "57 items kept",
            **dict.fromkeys(("divergence", "humaneval", "agreement", "speed"), "kept as measured before"),
        }
    found = {variant: (metrics(variant)["mmlu"], bytes_of(variant, "mmlu")) for variant in (REFERENCE, "q4")}
    assert found["q4"][0]["n"] == QUESTIONS + 2
    shutil.rmtree(WORKSPACE.evaluation("q4").parent)
    for variant in (REFERENCE, "q4"):
        validate.run(tiny.MODEL, variant)
        assert (metrics(variant)["mmlu"], bytes_of(variant, "mmlu")) == found[variant]


def test_fewer_questions_are_a_fresh_runs_too(project: Path, scored: list[str]) -> None:
    want = {variant: metrics(variant)["mmlu"] for variant in (REFERENCE, "q4")}
    for questions in (QUESTIONS + 2, QUESTIONS):
        edit("mmlu", questions=questions)
        for variant in (REFERENCE, "q4"):
            validate.run(tiny.MODEL, variant)
    assert {variant: metrics(variant)["mmlu"] for variant in (REFERENCE, "q4")} == want
    assert len(scored) == 4


def test_a_look_that_does_not_decide_asks_further_and_nothing_is_asked_twice(
    project: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmlu_section, "LOOKS", (60, 66))
    edit("mmlu", questions=QUESTIONS, most=66)
    validate.run(tiny.MODEL, REFERENCE)
    assert (metrics(REFERENCE)["mmlu"]["n"], len(scored)) == (QUESTIONS, 0), "no row has a margin"
    monkeypatch.setattr(escalation, "judged", lambda task, model: True)
    validate.run(tiny.MODEL, REFERENCE)
    assert (metrics(REFERENCE)["mmlu"]["n"], len(scored)) == (66, 9)
    for decided, asked, new in ((60, 60, 3), (66, 66, 6), (0, QUESTIONS, 0), (66, 66, 0)):
        monkeypatch.setattr(
            escalation, "waits", lambda task, *of, end=decided: task.name == "mmlu" and of[-1]["mmlu"]["n"] < end
        )
        scored.clear()
        validate.run(tiny.MODEL, "q4")
        assert (metrics("q4")["mmlu"]["n"], len(scored)) == (asked, new)


def test_tuning_one_section_measures_no_other(
    project: Path, scored: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit("humaneval", max_new_tokens=9)
    for variant in (REFERENCE, "q4"):
        before = metrics(variant)
        validate.run(tiny.MODEL, variant)
        assert said(capsys) == {
            "humaneval": "measured again: suite changed",
            "agreement": f"measured again: {'source, suite' if variant == REFERENCE else 'reference, suite'} changed",
            **dict.fromkeys(("mmlu", "divergence", "speed"), "kept as measured before"),
        }
        redone = {"humaneval": None, "agreement": None}
        assert metrics(variant) | redone == before | redone
    assert scored == []


def test_a_variant_meets_no_reference_of_other_items(project: Path) -> None:
    """By hand, out of order: the variant is asked more than the reference was."""
    edit("mmlu", questions=QUESTIONS + 2)
    with pytest.raises(PipelineError, match=r"the reference lacks 2 of 59 MMLU questions .*validate MODEL reference"):
        validate.run(tiny.MODEL, "q4")
    shutil.rmtree(WORKSPACE.evaluation(REFERENCE) / "divergence")
    with pytest.raises(PipelineError, match=r"divergence is not there: .*python -m pipeline validate tiny reference"):
        validate.run(tiny.MODEL, "q4")


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("variant", [REFERENCE, "q4"])
def test_divergence_goes_on_at_its_window(
    variant: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = {section: bytes_of(variant, section) for section in ("mmlu", "divergence")}
    shutil.rmtree(WORKSPACE.evaluation(variant))
    normalised: list[int] = []
    whole = divergence.log_normalisers

    def dying(logits: np.ndarray) -> np.ndarray:
        normalised.append(len(logits))
        if len(normalised) == 7:
            raise Killed
        return whole(logits)

    monkeypatch.setattr(divergence, "log_normalisers", dying)
    with pytest.raises(Killed):
        validate.run(tiny.MODEL, variant)
    assert not WORKSPACE.evaluation(variant).exists()
    capsys.readouterr()
    validate.run(tiny.MODEL, variant)
    assert len(normalised) == 7 + 32 - 6
    assert said(capsys)["divergence"] == "6 items kept"
    assert {section: bytes_of(variant, section) for section in want} == want


# --- layer by layer ---------------------------------------------------------------------------------------------------


def test_layer_by_layer_gives_the_same_numbers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And texts. Speed is left out, until a machine that holds the model adds it."""
    whole, items = metrics(REFERENCE), WORKSPACE.evaluation(REFERENCE).with_name("whole")
    WORKSPACE.evaluation(REFERENCE).rename(items)
    tiny.edit(SUITE, reference="layers")
    validate.run(tiny.MODEL, REFERENCE)
    assert {name: text.split(":")[0] for name, text in said(capsys).items()} == {
        "mmlu": "measured",
        "divergence": "measured",
        "humaneval": "measured",
        "agreement": "measured",
        "speed": "left out",
    }
    layered = metrics(REFERENCE)
    assert layered.keys() == whole.keys() - {"speed"}
    assert (layered["mmlu"], layered["humaneval"]) == (whole["mmlu"], whole["humaneval"])
    assert layered["agreement"] == pytest.approx(whole["agreement"], rel=1e-5)
    assert layered["divergence"] == pytest.approx(whole["divergence"], rel=1e-5, abs=1e-8)
    own = WORKSPACE.evaluation(REFERENCE)
    scores, want = (
        np.array([item["scores"] for item in Journal(folder / "mmlu" / mmlu_section.ITEMS).items.values()])
        for folder in (own, items)
    )
    np.testing.assert_allclose(scores, want, rtol=2e-6, atol=1e-5)
    tokens, expected = (divergence.read_scores(folder / "divergence") for folder in (own, items))
    np.testing.assert_allclose(tokens["logprob"], expected["logprob"], rtol=1e-5, atol=1e-5)
    assert not WORKSPACE.partial("x").parent.exists()
    assert {path.name for path in own.iterdir()} == {"mmlu", "divergence", "humaneval", "agreement"}
    written = (Journal(folder / "humaneval" / ITEMS).items for folder in (own, items))
    assert next(written) == next(written), "token for token"
    before = metrics("q4")
    validate.run(tiny.MODEL, "q4")
    assert all(metrics("q4")[name].keys() == before[name].keys() for name in before)
    capsys.readouterr()
    tiny.edit(SUITE, reference="memory")
    validate.run(tiny.MODEL, REFERENCE)
    assert said(capsys) == {
        **dict.fromkeys(("mmlu", "divergence", "humaneval", "agreement"), "kept as measured before"),
        "speed": "measured",
    }


def test_a_gpu_measures_the_reference_and_no_variant(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speed is that of the CPU, which ships."""
    before = metrics(REFERENCE)
    choose(monkeypatch, gpu := Gpu("cpu", "torch"))
    monkeypatch.setattr(Gpu, "memory", lambda self, weight_bytes: 10**9)
    validate.run(tiny.MODEL, REFERENCE)
    assert said(capsys) == {
        **dict.fromkeys(("mmlu", "divergence", "humaneval", "agreement"), "measured again: device changed"),
        "speed": "kept as measured before",
    }
    after = metrics(REFERENCE)
    assert after["identity"] == before["identity"] | {"device": "cpu torch"}
    assert after["divergence"] == pytest.approx(before["divergence"], rel=1e-5, abs=1e-8)
    assert after["mmlu"]["accuracy"] == before["mmlu"]["accuracy"]
    validate.run(tiny.MODEL, "q4")
    assert "device" not in metrics("q4")["identity"]
    assert said(capsys)["speed"] == "kept as measured before"
    assert not gpu.fallen


def test_what_a_larger_machine_measured_stays(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that runs the model layer by layer asks more questions."""
    tiny.edit(SUITE, reference="layers")
    edit("mmlu", questions=QUESTIONS + 2)
    before = metrics(REFERENCE)
    validate.run(tiny.MODEL, REFERENCE)
    assert said(capsys)["mmlu"] == "57 items kept"
    after = metrics(REFERENCE)
    assert all(after[name] == before[name] for name in ("divergence", "humaneval", "agreement", "speed"))


def test_a_model_that_does_not_fit_runs_layer_by_layer(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed pass goes on at its layer."""
    shutil.rmtree(WORKSPACE.evaluation(REFERENCE))
    monkeypatch.setattr(validate.machine, "available_memory", lambda: 0)
    passed: list[int] = []
    one = LayeredDecoder._pass

    def dying(self: LayeredDecoder, number: int) -> None:
        passed.append(number)
        if len(passed) == 3:
            raise Killed
        one(self, number)

    monkeypatch.setattr(LayeredDecoder, "_pass", dying)
    with pytest.raises(Killed):
        validate.run(tiny.MODEL, REFERENCE)
    capsys.readouterr()
    validate.run(tiny.MODEL, REFERENCE)
    assert passed == [0, 1, 2, 2, 3, 4, *range(5), *range(5)]  # of divergence, MMLU and agreement
    assert "left out" in said(capsys)["speed"]


def test_a_kill_in_the_middle_of_a_text_costs_one_pass(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is kept to the token, and the model reads it again."""
    tiny.edit(SUITE, reference="layers")
    want = bytes_of(REFERENCE, "humaneval")
    shutil.rmtree(WORKSPACE.evaluation(REFERENCE))
    passes: list[list[int]] = []
    one = SideBySide.run

    def dying(self: SideBySide, ids: Sequence[Sequence[int]]) -> np.ndarray:
        passes.append([len(row) for row in ids])
        if len(passes) == 6:
            raise Killed
        return one(self, ids)

    monkeypatch.setattr(SideBySide, "run", dying)
    with pytest.raises(Killed):
        validate.run(tiny.MODEL, REFERENCE)
    validate.run(tiny.MODEL, REFERENCE)
    assert bytes_of(REFERENCE, "humaneval") == want
    first, again = passes[0], passes[6]
    assert again == [length + 5 for length in first]
    assert passes[1:6] == [[1, 1]] * 5
    assert passes[7:] == [[1, 1]] * 2


# --- modes of MMLU ----------------------------------------------------------------------------------------------------


def dev_split() -> bytes:
    """A development split as the Hub has it, with examples that even a byte-level tokenizer finds short."""
    subjects = {question.subject for question in load_questions(dataset("mmlu"))}
    rows = [
        {"question": f"{i}?", "subject": subject.replace(" ", "_"), "choices": list("wxyz"), "answer": i % 4}
        for subject in sorted(subjects)
        for i in range(5)
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_five_shot_with_the_development_split_of_a_hub(
    project: Path, monkeypatch: pytest.MonkeyPatch, scored: list[str]
) -> None:
    member = "all/dev.parquet"
    source = {"kind": "hub", "repo": REPO, "revision": REVISION, "member": member}
    datasets = yaml.safe_load(Path("configs/datasets.yaml").read_text())["datasets"]
    tiny.edit(Path("configs/datasets.yaml"), datasets={**datasets, "mmlu-dev": source})
    edit("mmlu", exemplars="dev")
    tiny.edit(Path(f"configs/models/{tiny.MODEL}.yaml"), mmlu_mode="five-shot")
    with serve(Hub({member: dev_split()}, dataset=True)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        fetch_dataset(load_datasets().datasets["mmlu-dev"], Store())
    validate.run(tiny.MODEL, REFERENCE)
    found = metrics(REFERENCE)["mmlu"]
    assert (found["mode"], found["exemplars"], found["n"]) == ("five-shot", "dev", QUESTIONS)
    assert len(scored) == QUESTIONS
    assert all(text.count("\nAnswer: ") == 5 for text in scored)
    items = Journal(WORKSPACE.evaluation(REFERENCE) / "mmlu" / mmlu_section.ITEMS).items.values()
    assert [item["number"] for item in items] == list(range(QUESTIONS))
    with pytest.raises(PipelineError, match="the reference lacks 57 of 57 MMLU questions"):
        tiny.edit(Path(f"configs/models/{tiny.MODEL}.yaml"), mmlu_mode="letter")
        validate.run(tiny.MODEL, "q4")


@pytest.mark.parametrize(("thinks", "recorded"), [(False, "none"), (True, "closed")])
def test_chat_asks_in_the_model_s_template_and_records_the_think_block(
    project: Path, scored: list[str], thinks: bool, recorded: str
) -> None:
    tiny.edit(Path(f"configs/models/{tiny.MODEL}.yaml"), mmlu_mode="chat", mmlu_close_think=thinks)
    validate.run(tiny.MODEL, REFERENCE)
    found = metrics(REFERENCE)["mmlu"]
    assert (found["mode"], found["think"]) == ("chat", recorded)
    end = "<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * thinks
    assert all(text.startswith("<|im_start|>system\n") and text.endswith(end) for text in scored)
