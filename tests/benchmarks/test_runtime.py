"""A tiny artifact measured end to end, and what makes a measurement an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from benchmarks import engines, runtime
from benchmarks.engines import Task
from pipeline.errors import EvaluationError, ResourceError
from pipeline.machine import cores
from pipeline.runtime.roofline import Traffic
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import download, export, quantize
from pipeline.workspace import Workspace
from tests import tiny
from tests.recipes import FOLDER

SHORT = Task("", "", None, prompt_tokens=12, segment_tokens=4, segments=2)
CASE = tiny.CASE.config


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model's q4, rounded to nearest, as the quantize stage writes it."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_STORE", str(root / "store"))
        patch.chdir(tiny.copy_configs(root))
        # A prepacked file of matrices as narrow as a block of 64 decodes other tokens (ONNX Runtime 1.31).
        shutil.copy(FOLDER / "q4.yaml", root / "configs" / "recipes")
        tiny.edit(root / "configs" / "recipes" / "q4.yaml", search="nearest")
        download.run(tiny.MODEL)
        export.run(tiny.MODEL)
        quantize.run(tiny.MODEL, "q4")
        yield (root / Workspace(tiny.MODEL).artifact("q4")).resolve()


@pytest.fixture(scope="module")
def report(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole measurement."""
    scratch = tmp_path_factory.mktemp("scratch")
    found = runtime.measure(artifact, scratch, SHORT)
    assert list(scratch.iterdir()) == []  # the prepacked file is gone
    return found


def runs(report: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    return [run for run in report["runs"] if all(run[key] == value for key, value in wanted.items())]


def test_both_engines_run_with_every_number_of_threads(report: dict[str, Any]) -> None:
    assert report["errors"] == []
    counts = {1, cores()}
    for engine, threads in (("onnxruntime", counts), ("onnxruntime-genai", counts | {None})):
        timed = [run for run in runs(report, engine=engine, form="default") if run["rate"]]
        assert {run["threads"] for run in timed} == threads
        for run in timed:
            assert 0 < run["rate_low"] <= run["rate"] <= run["rate_high"]
            assert run["rate"] < run["ceiling"] and run["prefill_rate"] > 0
            assert 0 < run["interpreter_private_bytes"] < run["loaded_private_bytes"]
            assert run["loaded_mapped_bytes"] > 0 and run["load_seconds"] > 0


def test_the_cold_load_was_cold(report: dict[str, Any]) -> None:
    assert [(run["form"], run["cached_bytes"]) for run in runs(report, cold=True)] == [("default", 0), ("prepacked", 0)]


def test_the_prepacked_file_computes_the_same(report: dict[str, Any], artifact: Path) -> None:
    saved = report["prepacked"]
    assert saved["bytes"] > report["artifact_bytes"] == runtime.open_artifact(artifact).bytes
    for engine in engines.ENGINES:
        (run,) = [run for run in runs(report, engine=engine, form="prepacked") if run["rate"]]
        (plain,) = runs(report, engine=engine, form="default", threads=run["threads"], cold=False)
        assert run["tokens"] == plain["tokens"]
        assert len(run["tokens"]) == 1 + SHORT.segments * SHORT.segment_tokens


def test_the_engines_decode_the_model(report: dict[str, Any], artifact: Path) -> None:
    """What was timed is greedy decoding: an independent loop over the same file gives the same tokens."""
    decoder = OnnxDecoder(next(artifact.glob("*.onnx")))
    ids = np.random.default_rng(0).integers(0, CASE["vocab_size"], SHORT.prompt_tokens).tolist()
    for _ in range(1 + SHORT.segments * SHORT.segment_tokens):
        logits, _ = decoder.run(ids)
        ids.append(int(logits[-1].argmax()))
    for run in runs(report, form="default", cold=False):
        assert list(run["tokens"]) == ids[SHORT.prompt_tokens :], run["engine"]


def test_a_report_is_json_and_prints(report: dict[str, Any], artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "measure", lambda *_: report)
    done = CliRunner().invoke(runtime.main, [str(artifact), "--out", str(artifact.parent / "out.json")])
    assert done.exit_code == 0 and "onnxruntime-genai" in done.output and "On a phone" in done.output
    assert json.loads((artifact.parent / "out.json").read_text())["reads"] == report["reads"]
    monkeypatch.setattr(runtime, "measure", lambda *_: report | {"errors": ["too fast"], "busy_percent": 55.0})
    done = CliRunner().invoke(runtime.main, [str(artifact)])
    assert done.exit_code == 1 and "Error: too fast" in done.output and "55 % of the cores" in done.output


RUN = runtime.Run("onnxruntime", "default", 1, False, 0, 1.0, 1.0, 1, 2, 1, 3, 1, rate=9.0, tokens=(1, 2))


@pytest.mark.parametrize(("bandwidth", "fine"), [(1000.0, True), (899.0, False)])
def test_a_rate_above_the_roofline_is_an_error(bandwidth: float, fine: bool) -> None:
    reads = Traffic(weight_bytes=80, table_bytes=10**6, cache_bytes=2)  # 100 bytes at 10 tokens
    (judged,), errors = runtime.judge([RUN], reads, {1: bandwidth, 2: 2 * bandwidth}, context=10)
    assert judged.ceiling == bandwidth / 100
    assert (errors == []) == fine
    assert fine or "9.00 tokens/s is above the roofline of 8.99" in errors[0]


def test_a_default_number_of_threads_has_the_ceiling_of_all_cores() -> None:
    (judged,), _ = runtime.judge([replace(RUN, threads=None)], Traffic(1, 0, 0), {1: 50.0, 2: 90.0}, 0)
    assert judged.ceiling == 90


def test_other_tokens_from_the_prepacked_file_are_an_error() -> None:
    other = replace(RUN, form="prepacked", tokens=(1, 3))
    assert runtime.differing([RUN, replace(other, tokens=(1, 2))]) == []
    assert "decodes other tokens" in runtime.differing([RUN, other])[0]


def test_arm_keeps_the_bits_that_were_measured_there() -> None:
    attributes = {"K": 256, "N": 16, "bits": 2, "block_size": 64}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    assert runtime.phone_private_bytes(model) == 256 * 16 * 3 / 8


def test_what_cannot_be_measured_is_refused(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="not a written artifact"):
        runtime.open_artifact(tmp_path)
    broken = shutil.copytree(artifact, tmp_path / "broken")
    next(broken.glob("*.onnx")).write_bytes(b"\xff\xff not a graph")
    with pytest.raises(EvaluationError, match="not a written artifact"):
        runtime.open_artifact(broken)
    opened = runtime.open_artifact(artifact)
    with pytest.raises(ResourceError, match="private memory"):
        runtime.require_memory(replace(opened, bytes=1 << 60))
    with (
        pytest.raises(ResourceError, match=r"not enough disk to save tiny_q4\.onnx prepacked"),
        runtime.prepacked_folder(replace(opened, bytes=1 << 60), tmp_path),
    ):
        pass
    next(broken.glob("*.onnx")).write_bytes(onnx.ModelProto().SerializeToString())
    with pytest.raises(EvaluationError, match="onnxruntime with its default threads: ended with error, status 1"):
        runtime.run_once(replace(SHORT, engine="onnxruntime", folder=str(broken)), "default", cold=False)
