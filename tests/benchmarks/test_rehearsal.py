"""The rehearsal of a release: what it asks of the pipeline, when it kills, how it goes on, what its tables say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import project as projects
from benchmarks import rehearsal, rehearsed, speaking
from benchmarks.rehearsal import Rehearsal, Wanted, configure, moments, served
from benchmarks.talking_check import write_rounded
from pipeline.errors import PipelineError
from pipeline.judge.policy import gate_row
from pipeline.preflight.configuration import check_all
from pipeline.runtime.session import OnnxDecoder
from pipeline.workspace import MODEL_FILE
from tests import tiny
from tests.families import CASES, make_checkpoint

WANTED = Wanted("mimo-8b", ("q4", "q3"), layers=2)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """A rehearsal whose results stay in the test's folder."""
    monkeypatch.setattr(rehearsal, "RESULTS", tmp_path)
    return Rehearsal(WANTED, tmp_path / "work")


@pytest.mark.parametrize("variants", [(rehearsal.QUICK,), rehearsal.SHIPPED])
def test_the_project_is_one_that_the_pipeline_accepts(
    variants: tuple[str, ...], own: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Wanted("mimo-8b", variants)
    configure(own.project, wanted, own.source)
    monkeypatch.chdir(own.project.folder)
    check_all()
    rows = {variant: gate_row(wanted.name, variant)[0] for variant in variants}
    assert rows == {variant: f"talking/{variant.removesuffix('_weighted')}" for variant in variants}


def test_preflight_knows_a_cut_and_its_whole_before_anything_runs(
    own: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CASES["mimo"].config | {"max_position_embeddings": 4096}
    own.source.mkdir(parents=True)
    (own.source / "config.json").write_text(json.dumps(config))
    (own.source / "model.safetensors").write_bytes(bytes(10_000))
    configure(own.project, WANTED, own.source)
    monkeypatch.chdir(own.project.folder)
    cut, whole = rehearsal.predict(WANTED.name), rehearsal.predict(WANTED.model)
    names = [rehearsal.target_of(one, WANTED.name) for one in cut]
    assert set(names) <= set(WANTED.targets())
    assert [one["stage"] for one in cut] == [one["stage"] for one in whole]
    seconds = [{one["stage"]: one["seconds"] for one in found}["calibrate"] for found in (cut, whole)]
    assert seconds[0] < seconds[1] / 1000


def test_kills_are_drawn_from_long_stages() -> None:
    seconds = {"export": float("nan"), "calibrate": 100.0, "verdict": 1.0, "quantize": 200.0, "reference": 1500.0}
    drawn = [moments(seconds, 2, seed) for seed in range(20)]
    assert drawn[0] == moments(seconds, 2, 0)
    assert {name for found in drawn for name in found} == {"calibrate", "quantize", "reference"}
    for found in drawn:
        assert len(found) == 2
        assert all(0.1 <= after / seconds[name] <= 0.6 for name, after in found.items())


def test_a_kill_ends_all_that_a_command_started(own: Rehearsal, tmp_path: Path) -> None:
    alive = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert own.project.kill_group([sys.executable, "-c", alive], after=0.5) is None
    assert own.project.kill_group([sys.executable, "-c", "raise SystemExit(3)"], after=60) == 3


def test_steps_are_recorded_once_and_in_their_order(own: Rehearsal) -> None:
    own.record = {"steps": [], "variants": ["q4", "q3"]}
    said = [own.once(name, [sys.executable, "-c", f"print('{name}')"]) for name in ("second", "first", "second")]
    assert said == ["second\n", "first\n", None]
    own.project.commit()
    again = Rehearsal(WANTED, own.work)
    assert [step["name"] for step in again.record["steps"]] == ["second", "first"]
    assert again.once("first", ["false"]) is None
    with pytest.raises(PipelineError, match="holds a rehearsal of q4, q3"):
        Rehearsal(Wanted("mimo-8b", ("q4",), layers=2), own.work)


def test_what_was_published_is_served(tmp_path: Path) -> None:
    import requests

    (tmp_path / "file").write_bytes(b"bytes")
    with served(tmp_path) as url:
        assert requests.get(f"{url}/file", timeout=10).content == b"bytes"


def test_answers_are_compared_up_to_the_first_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny.make_model(tmp_path / "small")
    requests = ("<|im_start|>user\nHello", "def add(a, b):")
    monkeypatch.setattr(speaking, "REQUESTS", requests)
    (tmp_path / "rounded").mkdir()
    write_rounded(small, tmp_path / "rounded", 64)
    decoder = OnnxDecoder(tmp_path / "rounded" / MODEL_FILE)
    prompts = [speaking.encoder(small)(text) for text in requests]
    texts = [speaking.greedy(decoder, prompt, 8)[len(prompt) :] for prompt in prompts]
    logits = decoder.run([*prompts[1], *texts[1][:3]])[0][-1]
    other = int(np.argsort(logits)[-2])
    first, second = speaking.beside(small, small, [texts[0], [*texts[1][:3], other, 5]], tmp_path)
    assert (first["same"], first["tokens"], first["margin"]) == (8, 8, None)
    assert (second["same"], second["tokens"]) == (3, 5)
    assert second["margin"] == pytest.approx(logits.max() - logits[other], abs=1e-5)


def test_a_cut_models_text_is_that_of_the_small_ones_first_layers(tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "small", CASES["llama-tied"])
    (tmp_path / "cut").mkdir()
    write_rounded(small, tmp_path / "cut", 32, layers=1)
    kept = load_file(tmp_path / "cut" / "model.safetensors")
    assert {name.split(".")[2] for name in kept if name.startswith("model.layers.")} == {"0"}
    assert OnnxDecoder(tmp_path / "cut" / MODEL_FILE).run([3, 4, 5])[0].shape[0] == 3


def record(layers: int | None, scale: float) -> dict[str, Any]:
    """A rehearsal as it is recorded."""
    name = Wanted("mimo-8b", ("q4",), layers).name
    used = {"private_bytes": 2e9, "disk_before_bytes": 1e9, "disk_growth_bytes": 3e9}
    need = {"memory": 1e9, "disk": 3e9, "store_disk": 0, "products_per_second": 1e11}
    wanted = [need | {"stage": "calibrate", "variant": None, "seconds": 50.0}]
    wanted += [need | {"stage": "quantize", "variant": "q4", "seconds": 100.0}]
    steps = [{"name": f"calibrate@{name}", "wall_seconds": 10 * scale, "cpu_seconds": 14 * scale} | used]
    steps += [{"name": f"quantize@{name}-q4", "wall_seconds": 20 * scale, "cpu_seconds": 30 * scale} | used]
    answer = {"request": "a <b>", "bundle": "one|two", "tokens": 9, "same": 4, "margin": 0.25}
    lines = [{"name": "kl_mean", "verdict": "PASS", "estimate": 0.01, "low": 0.005, "high": 0.02, "limit": 0.3}]
    return {
        "model": "mimo-8b", "layers": layers, "all_layers": 36, "predicted": wanted, "predicted_whole": wanted,
        "machine": {"cores": 2},
        "steps": steps, "kills": [{"stage": f"quantize@{name}-q4", "after_seconds": 30.0, "killed": True}],
        "verdicts": {"q4": {"verdict": "PASS", "lines": lines}}, "answers": {"q4": {"rows": [answer]}},
    }  # fmt: skip


def test_tables_set_what_was_measured_beside_what_was_predicted() -> None:
    text = rehearsed.everything([record(None, 5.0), record(1, 1.0), record(2, 1.5)])
    assert "| calibrate | 70 | 50 | 50 | 1.00 | 2.00 | 1.00 | 2.00 | 3.00 | 3.00 | 4.00 |" in text
    assert "| quantize q4 | 30 | 100 | 1.30 |" in text  # killed: together ÷ predicted
    assert "| quantize q4 | 30 | 45 | 15.0 | 555 | 200 | 2.77 |" in text  # 1 layer, 2 layers, one, 36
    assert "| q4 | a &lt;b> | one\\|two | 9 | 4 | 0.25 |" in text
    assert "| q4 | PASS | kl_mean | 0.01 | 0.005 to 0.02 | 0.3 | PASS |" in text
    assert projects.ROOT.name not in text
