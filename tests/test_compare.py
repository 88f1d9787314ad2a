"""compare: figures side by side, intervals of paired differences by the statistics that judge, and one clear error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cli
from pipeline.files import sha256_of, write_json
from pipeline.judge.verdicts import PASS, GateLine, Verdict
from pipeline.keys import digest
from pipeline.report import compare as module
from pipeline.tasks.statistics import mean_interval, paired_interval
from pipeline.workspace import REFERENCE, Workspace
from tests import tiny
from tests.conftest import ROOT

MODEL, WINDOWS, TOKENS = "smollm2-135m", 8, 20
WORKSPACE = Workspace(MODEL)
Compare = Callable[..., tuple[int, str, str]]


def scores(name: str) -> dict[str, np.ndarray]:
    """Seeded scores of every token: q4_k_m diverges half as much as q4, in the same places."""
    rng = np.random.default_rng(0)
    kl = rng.exponential(0.1, WINDOWS * TOKENS)
    logprob, top = -rng.exponential(2.0, WINDOWS * TOKENS), rng.integers(0, 9, WINDOWS * TOKENS)
    loss = {"reference": 0.0, "q4": 1.0, "q4_k_m": 0.5}[name]
    lost = rng.random(WINDOWS * TOKENS) < 0.2 * loss
    return {"kl": loss * kl, "logprob": logprob - loss * kl, "top": np.where(lost, 9, top)}


def right(name: str, number: int) -> bool:
    """Which of 20 questions each has right: q4 alone 0, q4_k_m alone 1, 2 and 3."""
    return number > 9 or number == 0 if name == "q4" else number > 9 or number in (1, 2, 3)


def journal(path: Path, items: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps([name, item]) + "\n" for name, item in items.items()))


def measure(name: str) -> None:
    """What `validate` leaves of a variant or the reference: metrics, and items with their records."""
    found, folder = scores(name), WORKSPACE.evaluation(name)
    metrics: dict[str, Any] = {
        "identity": {"plan_sha256": "0" * 64},
        "size": {"bytes_on_disk": 1000 if name == "q4" else 1250, "bits_per_weight": 4.8},
        "divergence": {"kl_mean": float(found["kl"].mean()), "kl_mean_low": 0.01, "kl_mean_high": 0.2, "top1": 0.8},
        "mmlu": {"accuracy": 0.6, "n": 20},
        "humaneval": {"pass_at_1": 0.5, "n": 2},
        "speed": {"tokens_per_second": 90.0, "peak_private_bytes": 160e6},
    }
    if name == REFERENCE:
        metrics["divergence"] = {"perplexity": 12.0}
    windows = {
        str(window): {key: values[window * TOKENS : (window + 1) * TOKENS].tolist() for key, values in found.items()}
        for window in range(WINDOWS)
    }
    journal(folder / "divergence/windows.jsonl", windows)
    asked = {
        f"{number:032x}": {
            "number": number,
            "subject": f"subject {number}",
            "answer": 0,
            "correct": right(name, number),
        }
        for number in range(20)
    }
    journal(folder / "mmlu/mmlu.jsonl", asked)
    samples = {f"HumanEval/{number}#{draw}": {"correct": draw == 0} for number in range(2) for draw in range(2)}
    journal(folder / "humaneval/humaneval.jsonl", samples)
    for task in ("divergence", "mmlu", "humaneval"):
        items = {"suite": "s", "data": "d", "reference": digest({}), "files": name}
        write_json(folder / task / "section.json", {"items": items, "metrics": metrics[task], "sha256": {}})
    write_json(WORKSPACE.measurements(name), metrics)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which the reference, q4 and q4_k_m were measured; no model in it."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for name in (REFERENCE, "q4", "q4_k_m"):
        measure(name)
    write_json(WORKSPACE.verdict("q4"), Verdict(PASS, (GateLine("kl_mean", PASS),), "row").to_json())
    return tmp_path


@pytest.fixture
def compare(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """`python -m pipeline compare ARGUMENTS`: status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", "compare", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return (int(done.value.code or 0), *capsys.readouterr())

    return run


def document(outcome: tuple[int, str, str]) -> dict[str, Any]:
    assert outcome[0] == 0, outcome
    return json.loads(outcome[1])


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_token_and_by_item(compare: Compare) -> None:
    found = document(compare("q4", "q4_k_m", "--json", "--no-answers"))
    first, second, reference = (scores(name) for name in ("q4", "q4_k_m", REFERENCE))
    windows = np.repeat(np.arange(WINDOWS), TOKENS)
    kl = mean_interval(second["kl"] - first["kl"], windows)
    assert found["figures"]["divergence.kl_mean"]["difference"] == pytest.approx(vars(kl))
    assert kl.high < 0
    agree = [(one["top"] == reference["top"]).astype(float) for one in (first, second)]
    difference = found["figures"]["divergence.top1"]["difference"]
    assert difference["estimate"] == pytest.approx(agree[1].mean() - agree[0].mean())
    drop = paired_interval(20, 1, 3)
    difference = found["figures"]["mmlu.accuracy"]["difference"]
    assert (difference["estimate"], difference["low"]) == pytest.approx((0.1, -drop.high))
    assert found["flips"]["mmlu"] == {
        "n": 20, "only_first": ["subject 0"], "only_second": ["subject 1", "subject 2", "subject 3"]
    }  # fmt: skip
    assert found["flips"]["humaneval"] == {"n": 2, "only_first": [], "only_second": []}
    assert found["verdicts"] == ["PASS", None]


def test_the_other_way_round_every_sign_turns(compare: Compare) -> None:
    one, other = (document(compare(*names, "--json", "--no-answers")) for names in (("q4", "q4_k_m"), ("q4_k_m", "q4")))
    for name in ("divergence.kl_mean", "divergence.top1", "mmlu.accuracy"):
        first, second = (found["figures"][name]["difference"] for found in (one, other))
        assert (first["low"], first["high"]) == pytest.approx((-second["high"], -second["low"]))


def test_the_table_is_read_by_people(compare: Compare) -> None:
    status, out, _ = compare("q4", "q4_k_m", "--no-answers")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 118
    for part in (
        "bytes on disk", "+25.0 %", "+10.0 (", "points", "MMLU, 20 items in both: 1 only q4 has right, 3 only q4_k_m",
        "q4_k_m  subject 1", "A difference with an interval is paired",
    ):  # fmt: skip
        assert part in out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("another measurement", "are of another measurement"),
        ("other text", "they were not asked the same: another suite"),
        ("no record", "has no results by item"),
    ],
)
def test_what_cannot_be_paired_is_said(spoil: str, words: str, compare: Compare) -> None:
    path = WORKSPACE.evaluation("q4") / "divergence/section.json"
    record = json.loads(path.read_text())
    if spoil == "another measurement":
        record["metrics"]["kl_mean"] = 0.5
    elif spoil == "other text":
        record["items"]["suite"] = "t"
    write_json(path, record) if spoil != "no record" else path.unlink()
    found = document(compare("q4", "q4_k_m", "--json", "--no-answers"))
    assert [note for note in found["notes"] if "divergence is not paired" in note and words in note]
    assert found["figures"]["divergence.kl_mean"]["difference"] is None
    assert found["figures"]["mmlu.accuracy"]["difference"]


def test_another_reference_than_both_met_is_not_used(compare: Compare) -> None:
    path = WORKSPACE.evaluation(REFERENCE) / "divergence/section.json"
    write_json(path, json.loads(path.read_text()) | {"sha256": {"windows.jsonl": "0" * 64}})
    figures = document(compare("q4", "q4_k_m", "--json", "--no-answers"))["figures"]
    assert figures["divergence.top1"]["difference"] is None
    assert figures["divergence.kl_mean"]["difference"]


def test_the_reference_is_a_side_too(compare: Compare) -> None:
    found = document(compare("reference", "q4", "--json", "--no-answers"))
    assert found["figures"]["divergence.kl_mean"]["values"][0] is None
    assert found["notes"] == []
    assert found["figures"]["mmlu.accuracy"]["difference"]["estimate"] == pytest.approx(-0.1)


def test_without_items_the_figures_stand_and_the_command_is_named(compare: Compare) -> None:
    shutil.rmtree(WORKSPACE.evaluation("q4"))
    status, out, _ = compare("q4", "q4_k_m")
    assert status == 0
    assert f"`python -m pipeline validate {MODEL} q4`" in " ".join(out.split())
    assert "no answers: there is no artifact of q4" in " ".join(out.split())


def test_figures_of_another_artifact_than_lies_there_are_marked(compare: Compare) -> None:
    folder = WORKSPACE.artifact("q4")
    write_json(folder / "plan.json", {})
    write_json(folder / "genai_config.json", {})
    metrics = json.loads(WORKSPACE.measurements("q4").read_text())
    _, out, _ = compare("q4", "q4_k_m", "--no-answers")
    assert "q4: its figures are of another artifact than lies in" in out
    metrics["identity"]["plan_sha256"] = sha256_of(folder / "plan.json")
    write_json(WORKSPACE.measurements("q4"), metrics)
    _, out, _ = compare("q4", "q4_k_m", "--no-answers")
    assert "another artifact" not in out


def test_no_difference_has_no_sign(compare: Compare) -> None:
    for side in ("q4", "q4_k_m"):
        metrics = json.loads(WORKSPACE.measurements("q4").read_text())
        metrics["mmlu"]["accuracy"] -= 1e-9 * (side == "q4_k_m")
        write_json(WORKSPACE.measurements(side), metrics)
    _, out, _ = compare("q4", "q4_k_m", "--no-answers")
    assert "-0.0 " not in out and "-0.000 " not in out


# --- sides -----------------------------------------------------------------------------------------------------------


def test_a_revision_has_metrics_and_no_items(project: Path, compare: Compare) -> None:
    metrics = json.loads(WORKSPACE.measurements("q4").read_text())
    write_json(WORKSPACE.metrics("q4"), metrics)
    tiny.commit(project, "before", init=True)
    metrics["size"]["bytes_on_disk"] = 900
    write_json(WORKSPACE.measurements("q4"), metrics)
    found = document(compare("q4@HEAD", "q4", "--json", "--no-answers"))
    assert found["sides"] == ["q4@HEAD", "q4"]
    assert found["figures"]["size.bytes_on_disk"]["values"] == [1000, 900]
    assert "q4@HEAD (Git has only its metrics)" in found["notes"][0]
    status, out, err = compare("q4@v9", "q4")
    assert (status, out) == (1, "")
    assert f"at revision 'v9' (invalid object name 'v9'.). `git log --oneline -- artifacts/metrics/{MODEL}/q4" in err


def test_a_folder_of_another_tree_brings_its_measurements(
    project: Path, compare: Compare, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "artifacts"
    write_json(WORKSPACE.artifact("q4") / "genai_config.json", {})
    shutil.copytree(project / "artifacts", other)
    folder = other / MODEL / "variants/q4"
    found = document(compare(str(folder), "q4_k_m", "--json", "--no-answers"))
    assert found["verdicts"][0] == "PASS"
    assert found["flips"]["mmlu"]["only_first"] == ["subject 0"]
    loose = Path(shutil.copytree(folder, other / "loose"))
    write_json(loose / "plan.json", {"bytes": 500, "bits_per_weight": 4.0})
    found = document(compare(str(loose), "q4_k_m", "--json", "--no-answers"))
    assert found["figures"]["size.bytes_on_disk"]["values"] == [500, 1250]
    assert any("nothing is measured outside artifacts/MODEL/variants" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("q44", "q4"), "configs/recipes/q44.yaml: no such file"),
        (("q3", "q4"), f"Run `python -m pipeline validate {MODEL} q3` first"),
        (("./nowhere", "q4"), "nowhere holds no artifact: it has no genai_config.json"),
        (("q4", "q4", "--model", "smollm2"), "configs/models/smollm2.yaml: no such file"),
        (("q4@-x", "q4"), "Git has no metrics"),
    ],
)
def test_mistakes_are_one_paragraph(arguments: tuple[str, ...], words: str, compare: Compare) -> None:
    status, out, err = compare(*arguments)
    assert (status, out) == (1, "")
    assert err.strip().count("\n") == 0
    assert words in err


def test_several_models_need_a_name(project: Path, compare: Compare) -> None:
    tiny.edit(project / "configs/pipeline.yaml", models=[MODEL, "phi-4"])
    assert "has several models (smollm2-135m, phi-4): choose one with --model" in compare("q4", "q4_k_m")[2]
    assert compare("q4", "q4_k_m", "--model", MODEL, "--no-answers")[0] == 0


# --- answers ---------------------------------------------------------------------------------------------------------


def test_both_are_asked_the_same(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("q4", "q4_k_m"):
        write_json(WORKSPACE.artifact(name) / "genai_config.json", {})
    monkeypatch.setattr(module, "_told", lambda folder, asked: [f"{folder.name} on {one}" for one in asked])
    found = document(compare("q4", "q4_k_m", "--json"))
    assert [item["prompt"] for item in found["answers"]] == list(module.PROMPTS)
    _, out, _ = compare("q4", "q4_k_m", "--prompt", "Why?")
    assert "? Why?\nq4:\n  q4 on Why?\nq4_k_m:\n  q4_k_m on Why?\n" in out
