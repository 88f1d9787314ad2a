"""arm64 beside x86-64: what counts as the same model, which kernels ran, and (marked) a tiny model under emulation."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from benchmarks import arm64, foreign, probes
from pipeline.errors import EvaluationError, ResourceError
from pipeline.prepack import emulator
from pipeline.prepack.emulator import CPUS, Emulator
from pipeline.quantize.formats import TensorFormat
from pipeline.runtime.session import OnnxDecoder
from tests import tiny
from tests.artifact.exported import export
from tests.quantize.test_formats import NAMES
from tests.recipes import load_recipe

# Not those of several planes: each of their kernels has a probe of its own.
FORMATS = [fmt for fmt in map(TensorFormat.parse, NAMES) if len(fmt.planes) == 1]
FINE = {"w4b32s, 1 row": 5e-3, "w4b32s, 16 rows": 8e-3}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model's q4 and q3, each a folder with graph, data, tokenizer and genai_config.json."""
    root = tmp_path_factory.mktemp("project")
    exported = export(tiny.make_model(root / "checkpoint"))
    for variant in ("q4", "q3"):
        drafted = exported.write(load_recipe(variant), root / variant)
        shutil.copy2(exported.folder / "tokenizer.json", root / variant)
        config = {"model": {"decoder": {"filename": drafted.model_file}}}
        (root / variant / "genai_config.json").write_text(json.dumps(config))
    return {variant: root / variant for variant in ("q4", "q3")}


def test_every_format_runs_with_int8_activations_here(tmp_path: Path) -> None:
    made = probes.make_probes(FORMATS, tmp_path)
    _, arrays = arm64.ask(arm64.here, arm64.probe_request(tmp_path / "out.npz", made))
    found = probes.errors(arrays, made)
    assert len(found) == 2 * len(FORMATS)
    assert probes.not_int8(found) == []


def test_a_float_kernel_and_a_wrong_product_are_noticed() -> None:
    found = {"float": 2e-7, "int8": 5e-3, "KleidiAI": 8e-3, "wrong": 0.1}
    assert probes.not_int8(found) == ["float", "wrong"]


def test_the_formats_of_an_artifact_are_found(artifacts: dict[str, Path]) -> None:
    def names(variant: str) -> list[str]:
        return [str(fmt) for fmt in probes.formats(arm64.open_artifact(artifacts[variant])[1])]

    assert names("q4") == ["w4b32a", "w8b32s"]
    assert names("q3") == ["w2b64a", "w4b64a", "w8b32s"]


def test_float_activations_change_little_and_only_that(artifacts: dict[str, Path], tmp_path: Path) -> None:
    path, model = arm64.open_artifact(artifacts["q4"])
    plain = arm64.with_float_activations(path, model, tmp_path)
    levels = {
        item.i for node in probes.products(onnx.load(plain, load_external_data=False))
        for item in node.attribute if item.name == "accuracy_level"
    }  # fmt: skip
    assert levels == {0}
    ids = arm64.token_ids(artifacts["q4"], 12)
    found = arm64.gap(OnnxDecoder(path).run(ids)[0], OnnxDecoder(plain).run(ids)[0])
    assert 1e-3 < found.error < 0.1
    assert found.kl > 0


def test_what_is_computed_is_the_same_at_once_and_token_by_token(artifacts: dict[str, Path], tmp_path: Path) -> None:
    path, model = arm64.open_artifact(artifacts["q4"])
    plain = arm64.with_float_activations(path, model, tmp_path)  # int8 rounding differs between one row and many
    ids = arm64.token_ids(artifacts["q4"], 12)
    assert len(ids) == 12
    request = foreign.Request("", decoder=str(plain), ids=ids, prompt=7)
    logits = foreign.compute(request)["logits"]
    np.testing.assert_allclose(logits, foreign.compute(replace(request, prompt=12))["logits"], atol=2e-4)


def test_a_gap_is_relative_and_blind_to_what_softmax_is_blind_to() -> None:
    rng = np.random.default_rng(0)
    others = rng.standard_normal((5, 400)).astype(np.float32)
    assert arm64.gap(others + np.float32(3), others) == arm64.Gap(
        pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6), 1.0
    )
    noise = rng.standard_normal(others.shape).astype(np.float32)
    found = arm64.gap(others + np.float32(0.1) * noise, others)
    assert found.error == pytest.approx(0.1, rel=0.1)
    assert found.kl == pytest.approx(0.1**2 / 2, rel=0.3)  # half the variance of the logits' error
    assert arm64.gap(-others, others).top1 == 0


@pytest.mark.parametrize("broken", [np.zeros((2, 3)), np.full((2, 4), np.nan)])
def test_logits_that_are_no_logits_are_an_error(broken: np.ndarray) -> None:
    with pytest.raises(EvaluationError, match="do not compute the same model"):
        arm64.gap(broken.astype(np.float32), np.ones((2, 4), np.float32))


@pytest.mark.parametrize(
    ("times", "kernels", "passed"),
    [
        (1.0, FINE, True),
        (1.5, FINE, True),
        (1.7, FINE, False),
        (1.0, FINE | {"w8b32s, 1 row": 2e-7}, False),  # right, and far too slow
    ],
)
def test_arm64_may_be_off_by_about_what_x86_64_is(times: float, kernels: dict[str, float], passed: bool) -> None:
    rng = np.random.default_rng(0)
    exact, first, second = (rng.standard_normal((6, 500)).astype(np.float32) for _ in range(3))
    ours, theirs = exact + np.float32(0.02) * first, exact + np.float32(0.02 * times) * second
    found = arm64.judge(theirs, ours, exact, kernels)
    assert found["error_ratio"] == pytest.approx(times, rel=0.05)
    assert found["passed"] is passed
    assert found["to_x86_64"]["error"] == pytest.approx(0.02 * (1 + times**2) ** 0.5, rel=0.05)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="not a written artifact"):
        arm64.open_artifact(tmp_path)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "model.onnx")
    with pytest.raises(EvaluationError, match="no quantized product"):
        arm64.open_artifact(tmp_path)
    done = CliRunner().invoke(arm64.main, [])
    assert done.exit_code == 1 and "make demo" in done.output


def test_a_machine_that_cannot_emulate_is_told_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "apt-get" else f"/usr/bin/{tool}")
    with pytest.raises(
        ResourceError,
        match=r"without apt-get. Run it there, or in a Debian container .it needs no root., or leave only `here`",
    ):
        emulator.install(tmp_path / "arm64")
    assert not (tmp_path / "arm64").exists()


def test_a_failing_command_is_told_with_its_last_words() -> None:
    with pytest.raises(EvaluationError, match="trying: failed with status 3: the end"):
        emulator._output(["sh", "-c", "echo begin >&2; echo the end >&2; exit 3"], "trying")
    with pytest.raises(EvaluationError, match="trying: not done after 0 seconds"):
        emulator._output(["sleep", "9"], "trying", 0.01)


# --- under emulation: `make arm64` ---


@pytest.fixture(scope="module")
def installed() -> Path:
    """The emulated machine, fetched on first use."""
    emulator.install()
    return emulator.place().resolve()


@pytest.mark.arm64
@pytest.mark.parametrize("variant", ["q4", "q3"])
def test_a_tiny_model_computes_the_same_on_arm64(variant: str, artifacts: dict[str, Path], installed: Path) -> None:
    record = arm64.check(artifacts[variant], [Emulator(installed, cpu) for cpu in CPUS])
    assert [(run["cpu"], run["architecture"]) for run in record["arm64"]] == [(cpu, "aarch64") for cpu in CPUS]
    for run in record["arm64"]:
        assert "asimddp" in run["features"]
        assert 0 < run["to_x86_64"]["error"] < 0.1  # other kernels ran, on the same model
        assert run["passed"], run
    assert "i8mm" in record["arm64"][1]["features"]
    assert not os.path.exists(artifacts[variant].with_name(f".{variant}.arm64"))


@pytest.mark.arm64
def test_a_processor_without_dotprod_falls_back_to_float_kernels(artifacts: dict[str, Path], installed: Path) -> None:
    record = arm64.check(artifacts["q4"], [Emulator(installed, "cortex-a72")])
    (run,) = record["arm64"]
    assert "asimddp" not in run["features"]
    assert set(run["not_int8"]) == set(run["kernels"])
    assert run["to_float"]["error"] < 1e-4  # right, only slow
    assert not record["passed"]
