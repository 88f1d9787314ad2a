"""The command line: instant help, one paragraph for every mistake, exit codes that CI can trust."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from pipeline import cli
from pipeline.config.signing import ReleasedBuild, load_released
from pipeline.files import read_json, sha256_of, write_json
from pipeline.judge.verdicts import GateLine, Verdict
from pipeline.runtime.session import runtimes
from pipeline.stages import calibrate, download, export, quantize, sensitivity
from pipeline.stages.verdict import _last_release
from tests import tiny
from tests.conftest import ROOT

COMMANDS = (
    "preflight", "add", "new-recipe", "plan", "download", "export", "calibrate", "sensitivity", "parity", "learn",
    "quantize", "validate", "verdict", "bundle", "sign", "tiers", "packs", "report", "check-packs", "show", "compare",
    "speculate", "gate", "escalate", "record-release", "verify", "inspect", "chat", "serve", "sustain", "update-size",
    "push", "fetch", "prepack", "vectors", "schema", "cost", "cascade", "key-id",
)  # fmt: skip
HEAVY = ("numpy", "onnx", "onnxruntime", "onnxruntime_genai", "torch", "pydantic", "transformers", "numba", "yaml")
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the tiny model downloaded, exported, calibrated and quantized as q4, and a store beside it."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tiny.make_store(folder / "store")
        patch.setenv("PIPELINE_STORE", str(folder / "store"))
        patch.chdir(tiny.copy_configs(folder))
        for stage in (download, export, calibrate, sensitivity):
            stage.run(tiny.MODEL)
        quantize.run(tiny.MODEL, "q4")
        yield folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `prepared` that a test may damage; the current directory."""
    for name in ("configs", "artifacts"):
        shutil.copytree(prepared / name, tmp_path / name)
    shutil.copy(prepared / "dvc.yaml", tmp_path)
    monkeypatch.setenv("PIPELINE_STORE", str(prepared / "store"))
    for name in [name for name in os.environ if name.startswith("PIPELINE_SIGNING")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m pipeline ARGUMENTS` in this process. What would be a traceback fails the test as it is."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        code = done.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return run


def paragraph(outcome: Outcome) -> str:
    """The message of a command that failed as it should: status 1 and one line on stderr."""
    assert outcome.status == 1, outcome
    assert outcome.err.startswith("error: ")
    assert "\n" not in outcome.err.strip(), outcome.err
    return outcome.err


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_the_stages_in_order_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipeline import cli\nsys.argv = ['pipeline', '--help']\n"
        "try:\n    cli.main()\nfinally:\n    print('LOADED', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split("LOADED")[1].split()}
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY)
    listed = [line.split()[0] for line in done.stdout.split("Commands:\n")[1].splitlines() if line.startswith("  ")]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


def test_every_command_is_known_to_the_tests() -> None:
    assert tuple(cli.cli.commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, command: Command) -> None:
    outcome = command(name, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"Usage: python -m pipeline {name}")
    assert cli.cli.commands[name].help


def test_a_real_process_fails_with_one_paragraph_and_no_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "pipeline", "export", "tiny"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: configs/models/tiny.yaml: no such file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["vectors", "file/x"], ["schema", "file"]])
def test_a_path_that_cannot_be_written_is_named_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = [sys.executable, "-m", "pipeline", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: file") and "Traceback" not in done.stderr


def test_a_terminal_without_dashes_loses_no_figures(project: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    process = [sys.executable, "-m", "pipeline", "plan", "--model", "phi-4", "--tier", "android-12gb"]
    done = subprocess.run(process, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"android-12gb" in done.stdout


@pytest.mark.parametrize("size", [["--workers", "99999999999999999999"], ["--workers", "4", "--cores", "100000000"]])
def test_a_cluster_beyond_measure_is_refused_at_once(size: list[str], command: Command) -> None:
    outcome = command("preflight", *size)
    assert outcome.status == 2 and "is not in the range" in outcome.err


# --- misspelt names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["qantize"], ["quantise", "tiny", "q4"]])
def test_a_misspelt_command_is_named_with_its_neighbour(arguments: list[str], command: Command) -> None:
    outcome = command(*arguments)
    assert outcome.status == 2
    assert f"No such command {arguments[0]!r}. Did you mean 'quantize'?" in outcome.err


@pytest.mark.parametrize("stage", ["download", "export", "calibrate", "parity", "tiers", "packs"])
def test_a_misspelt_model_is_named_with_its_neighbour(stage: str, project: Path, command: Command) -> None:
    message = paragraph(command(stage, "tinny"))
    assert "configs/models/tinny.yaml: no such file. Did you mean 'tiny'?" in message


@pytest.mark.parametrize("stage", ["learn", "quantize", "validate", "verdict", "bundle", "sign"])
def test_a_misspelt_variant_is_named_with_its_neighbour(stage: str, project: Path, command: Command) -> None:
    message = paragraph(command(stage, "tiny", "q4_km"))
    assert "configs/recipes/q4_km.yaml: no such file. Did you mean 'q4_k_m'?" in message
    assert "reference" not in message


def test_a_misspelt_key_is_named_with_its_neighbour(project: Path, command: Command) -> None:
    tiny.edit(project / "configs/recipes/q4.yaml", embeding="w8b32s", embedding=None)
    message = paragraph(command("quantize", "tiny", "q4"))
    assert "configs/recipes/q4.yaml" in message
    assert "embeding: unknown key; did you mean 'embedding'?" in message


def test_all_configuration_is_read_before_the_first_download(project: Path, command: Command) -> None:
    shutil.rmtree(project / "artifacts")
    tiny.edit(project / "configs/signing.yaml", realease=2)
    assert "realease: unknown key; did you mean 'release'?" in paragraph(command("download", "tiny"))
    assert not (project / "artifacts").exists()


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("main", ("'main' is a branch or tag name", "40-hex commit id")),
        ("unpinned", ("hub some/model: no commit is pinned", "some/model/commits/main")),
    ],
)
def test_nothing_but_a_commit_is_downloaded(
    revision: str, said: tuple[str, ...], project: Path, command: Command
) -> None:
    source = {"kind": "hub", "repo": "some/model", "revision": revision}
    tiny.edit(project / "configs/models/tiny.yaml", source=source)
    message = paragraph(command("download", "tiny"))
    assert all(words in message for words in said)


def _settings(**changes: Any) -> Edit:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def _only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0]}))


def _cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_settings(model_type="mamba"), ("mamba",)),
        (_settings(num_attention_heads=0), ("num_attention_heads",)),
        (lambda folder: (folder / "config.json").write_text("{"), ("config.json",)),
        (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer",)),
        (lambda folder: tiny.make_tokenizer(folder, 400), ("tokenizer", "400", "320")),
        (_tensors(lambda tensors: tensors.pop(UP)), (UP,)),
        (_tensors(lambda tensors: tensors.update({UP: np.zeros((320, 64), np.float32)})), (UP, "320", "64", "128")),
        (_only_a_pickle, ("pytorch_model.bin",)),
        (_cut_short, ("model.safetensors",)),
    ],
    ids=["architecture", "heads", "json", "tokenizer", "other tokenizer", "missing", "shape", "pickle", "truncated"],
)
def test_a_broken_checkpoint_is_refused_by_download(
    damage: Edit, words: tuple[str, ...], project: Path, command: Command
) -> None:
    shutil.rmtree(project / "artifacts")
    damage(_own_checkpoint(project))
    message = paragraph(command("download", "tiny"))
    for word in words:
        assert word in message
    command("export", "tiny")
    assert not (project / "artifacts/tiny/export").exists()


def _own_checkpoint(project: Path) -> Path:
    folder = tiny.make_model(project / "checkpoint")
    tiny.edit(project / "configs/models/tiny.yaml", source={"kind": "local", "path": str(folder)})
    return folder


def test_weights_that_are_not_numbers_reach_no_artifact(project: Path, command: Command) -> None:
    _tensors(lambda tensors: tensors[UP].__setitem__((3, 5), np.nan))(_own_checkpoint(project))
    shutil.rmtree(project / "artifacts")
    message = paragraph(command("download", "tiny"))
    assert UP in message and "the first at [3, 5]" in message
    assert not (project / "artifacts/tiny/source.json").exists()


def test_a_missing_source_folder(project: Path, command: Command) -> None:
    tiny.edit(project / "configs/models/tiny.yaml", source={"kind": "local", "path": "no/such/folder"})
    assert "no/such/folder: no such folder" in paragraph(command("download", "tiny"))


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_three_bits_have_no_kernel(project: Path, command: Command) -> None:
    tiny.edit(project / "configs/recipes/q4.yaml", body=[{"roles": ["q_proj"], "format": "w3b32s"}])
    assert "w3b32s" in paragraph(command("quantize", "tiny", "q4"))


def test_a_recipe_must_cover_every_matrix(project: Path, command: Command) -> None:
    tiny.edit(project / "configs/recipes/q4.yaml", body=[{"roles": ["q_proj"], "format": "w4b32a"}])
    assert "k_proj" in paragraph(command("quantize", "tiny", "q4"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(project: Path, command: Command) -> None:
    outcome = command("quantize", "tiny", "q3", "--dry-run")
    assert outcome.status == 0
    assert "w4b64a" in outcome.out
    assert "bits per weight" in outcome.out
    assert not (project / "artifacts/tiny/variants/q3").exists()


# --- stages out of order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absent", "arguments", "before"),
    [
        ("tiny/source.json", ["export", "tiny"], "download"),
        ("tiny/export", ["calibrate", "tiny"], "export"),
        ("tiny/export", ["parity", "tiny"], "export"),
        ("tiny/export", ["quantize", "tiny", "q4"], "export"),
        ("tiny/export", ["validate", "tiny", "reference"], "export"),
        ("tiny/calibration", ["quantize", "tiny", "q4"], "calibrate"),
        ("tiny/variants", ["validate", "tiny", "q4"], "quantize"),
        ("tiny/evaluation", ["validate", "tiny", "q4"], "validate"),
        ("measurements", ["verdict", "tiny", "q4"], "validate"),
        ("verdicts", ["bundle", "tiny", "q4"], "verdict"),
        ("bundles", ["sign", "tiny", "q4"], "bundle"),
        ("measurements", ["tiers", "tiny"], "validate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_stage_before_its_time_says_which_one_to_run(
    absent: str, arguments: list[str], before: str, project: Path, command: Command
) -> None:
    path = project / "artifacts" / absent
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    message = paragraph(command(*arguments))
    assert before in message
    assert "Run `" in message or "dvc repro" in message or "again: `" in message


@pytest.mark.parametrize("name", ["report", "show"])
def test_a_report_of_nothing_is_refused(name: str, project: Path, command: Command) -> None:
    paragraph(command(name))
    assert not (project / "artifacts/report").exists()


def test_damaged_measurements_are_no_verdict(project: Path, command: Command) -> None:
    metrics = project / "artifacts/measurements/tiny"
    metrics.mkdir(parents=True)
    (metrics / "q4.json").write_text("{")
    message = paragraph(command("verdict", "tiny", "q4"))
    assert "q4.json is damaged" in message


def test_a_variant_without_gates_gets_no_verdict(project: Path, command: Command) -> None:
    for name in ("measurements/tiny/q4", "measurements/tiny/reference", "tiny/parity"):
        write_json(project / f"artifacts/{name}.json", {"size": {"parameters": 300_000}})
    gates = yaml.safe_load((project / "configs/gates.yaml").read_text())
    del gates["classes"]["random"]["variants"]["q4"]
    (project / "configs/gates.yaml").write_text(yaml.safe_dump(gates))
    message = paragraph(command("verdict", "tiny", "q4"))
    assert "class 'random' of tiny has no limits for 'q4'" in message
    assert "q4_k_m" in message


# --- the gate's exit status ------------------------------------------------------------------------------------------


def _decide(project: Path, variant: str, verdict: str) -> None:
    line = GateLine("kl_mean", verdict, n=100, estimate=0.2, low=0.1, high=0.3, limit=0.25)
    _write(project, variant, verdict, line)


def _write(project: Path, variant: str, verdict: str, *lines: GateLine) -> None:
    judged = Verdict(verdict, lines, f"random/{variant}")
    write_json(project / f"artifacts/verdicts/tiny/{variant}.json", judged.to_json())
    _measure(project, variant, {"kl_mean": 0.2, "tokens": 100})


def _measure(project: Path, variant: str, divergence: dict[str, float], loaded: int = 10**6) -> None:
    """Metrics as far as a bundle reads them."""
    cache = {"type": "float32", "bytes_per_token": 512}
    plan = project / "artifacts/tiny/variants" / variant / "plan.json"
    metrics = {
        "size": {"bytes_on_disk": 10**6, "kv_cache": cache, "prompt_token_bytes": 100},
        "speed": {
            "peak_memory_bytes": loaded + 10**7,
            "load_peak_private_bytes": loaded,
            "load_peak_mapped_bytes": 10**6,
        },
        "divergence": divergence,
        "identity": runtimes() | {"plan_sha256": sha256_of(plan) if plan.exists() else ""},
    }
    write_json(project / f"artifacts/measurements/tiny/{variant}.json", metrics)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (("PASS", "PASS", "PASS"), 0),
        (("PASS", "FAIL", "INCONCLUSIVE"), 1),
        (("PASS", "PASS", "INCONCLUSIVE"), 2),
        (("FAIL", "ERROR", "PASS"), 3),
    ],
)
def test_gate_returns_the_worst_verdict(
    verdicts: tuple[str, ...], status: int, project: Path, command: Command
) -> None:
    for variant, decided in zip(tiny.VARIANTS, verdicts, strict=True):
        _decide(project, variant, decided)
    outcome = command("gate")
    assert outcome.status == status
    for variant, decided in zip(tiny.VARIANTS, verdicts, strict=True):
        assert f"tiny {variant}: {decided}" in outcome.out


def test_gate_judges_only_what_it_is_asked(project: Path, command: Command) -> None:
    _decide(project, "q4", "PASS")
    _decide(project, "q3", "FAIL")
    assert command("gate", "--variant", "q4").status == 0
    assert command("gate", "--model", "tiny", "--variant", "q4", "--variant", "q3").status == 1


@pytest.mark.parametrize(
    "arguments", [[], ["--variant", "q5"], ["--model", "tinny"], ["--modle", "tiny"], ["superfluous"]]
)
def test_gate_never_takes_a_mistake_for_a_verdict(arguments: list[str], project: Path, command: Command) -> None:
    outcome = command("gate", *arguments)
    assert outcome.status == 3
    assert outcome.err


def test_an_edited_verdict_is_an_error_that_names_the_file(project: Path, command: Command) -> None:
    _decide(project, "q4", "FAIL")
    path = project / "artifacts/verdicts/tiny/q4.json"
    path.write_text(path.read_text().replace('"verdict": "FAIL"\n}', '"verdict": "PASS"\n}'))
    outcome = command("gate", "--variant", "q4")
    assert outcome.status == 3
    assert str(path.relative_to(project)) in outcome.err


def test_a_verdict_on_other_measurements_than_are_there_is_an_error_and_the_remedy_works(
    project: Path, command: Command
) -> None:
    """kl_mean edited by hand after the verdict: PASS, and status 0, it was."""
    for name in ("q4", "reference"):
        write_json(project / f"artifacts/measurements/tiny/{name}.json", {"size": {"parameters": 500_000}})
    write_json(project / "artifacts/tiny/parity.json", {})
    assert command("verdict", "tiny", "q4").status == 0
    assert command("gate", "--variant", "q4").out.startswith("tiny q4: ERROR")  # nothing else was measured
    write_json(project / "artifacts/measurements/tiny/q4.json", {"size": {"parameters": 500_001}})
    outcome = command("gate", "--variant", "q4")
    assert outcome.status == 3 and "it judged other measurements than those in" in outcome.err
    assert command(*re.search(r"python -m pipeline (verdict \S+ q4)", outcome.err)[1].split()).status == 0
    assert "judged other" not in command("gate", "--variant", "q4").err


# --- further looks ---------------------------------------------------------------------------------------------------


def _mmlu(verdict: str, n: int) -> GateLine:
    return GateLine("mmlu", verdict, n=n, estimate=1.0, low=-1.0, high=3.0, limit=2.0, note=f"after {n:,} questions")


def test_escalate_says_what_each_look_costs_and_how_to_ask(project: Path, command: Command) -> None:
    """One model, three variants and the reference share a suite of 57 questions."""
    _write(project, "q4", "INCONCLUSIVE", _mmlu("INCONCLUSIVE", 57))
    _write(project, "q4_k_m", "INCONCLUSIVE", _mmlu("INCONCLUSIVE", 570))
    _write(project, "q3", "PASS", _mmlu("PASS", 570))
    outcome = command("escalate")
    assert outcome.status == 0
    assert "tiny q4: MMLU is INCONCLUSIVE at 57 questions; next look 570, 513 more than the suite asks" in outcome.out
    assert "tiny q4_k_m: MMLU is INCONCLUSIVE at 570 questions; next look 1,425, 1,368 more" in outcome.out
    assert "q3" not in outcome.out
    assert "5,472 new questions in all" in outcome.out
    assert "dvc exp run -S 'configs/evaluation/seconds.yaml:mmlu.most=1425'" in outcome.out
    alone = command("escalate", "--variant", "q4").out
    assert "q4_k_m" not in alone and "mmlu.most=570'" in alone


def test_escalate_ends_with_the_questions(project: Path, command: Command) -> None:
    _write(project, "q4", "INCONCLUSIVE", _mmlu("INCONCLUSIVE", 14_042))
    outcome = command("escalate", "--variant", "q4")
    assert outcome.status == 0
    assert "INCONCLUSIVE after all 14,042 questions" in outcome.out and "dvc exp" not in outcome.out


def test_escalate_asks_for_nothing_that_is_decided(project: Path, command: Command) -> None:
    line = GateLine("kl_mean", "INCONCLUSIVE", n=100, estimate=0.2, low=0.1, high=0.3, limit=0.25)
    _write(project, "q4", "INCONCLUSIVE", line, _mmlu("PASS", 570))
    assert "No INCONCLUSIVE MMLU line" in command("escalate", "--variant", "q4").out


def test_gate_tells_the_look_that_did_not_decide(project: Path, command: Command) -> None:
    _write(project, "q4", "INCONCLUSIVE", _mmlu("INCONCLUSIVE", 570))
    outcome = command("gate", "--variant", "q4")
    assert outcome.status == 2
    assert "mmlu 1 (90 % interval -1 to 3), limit 2: INCONCLUSIVE; after 570 questions" in outcome.out


# --- bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(project: Path, command: Command) -> tuple[Path, Path]:
    """A signed bundle of q4 and the public key to trust."""
    _decide(project, "q4", "PASS")
    for stage in ("bundle", "sign"):
        assert command(stage, "tiny", "q4").status == 0
    (key,) = (project / "artifacts/keys").iterdir()
    return project / "artifacts/bundles/tiny/q4", key


def _verify(command: Command, bundle: Path, key: Path, *options: str) -> Outcome:
    return command("verify", str(bundle), "--public-key", str(key), *options)


def test_a_development_bundle_needs_permission(signed: tuple[Path, Path], command: Command) -> None:
    assert _verify(command, *signed, "--allow-development").status == 0
    refused = _verify(command, *signed)
    assert refused.status == 1
    assert "development-key" in refused.out


def test_inspect_turns_invalid_documents_into_a_status(signed: tuple[Path, Path], command: Command) -> None:
    outcome = command("inspect", str(signed[0]))
    assert outcome.status == 0, outcome
    assert [line for line in outcome.out.splitlines() if not line.startswith(" ")] == [
        "release.json", "bom.cdx.json", "provenance.json", "README.md",
    ]  # fmt: skip
    release = signed[0] / "content/release.json"
    whole = release.read_bytes()
    release.write_bytes(whole[:50])
    cut = command("inspect", str(signed[0]))
    assert cut.status == 1 and "release.json\n  INVALID: " in cut.out
    release.write_bytes(whole)
    (signed[0] / "content/provenance.json").write_text("{}")
    assert command("inspect", str(signed[0])).status == 1
    assert "is no bundle" in paragraph(command("inspect", str(signed[0] / "content")))


def test_verify_names_the_tampered_file(signed: tuple[Path, Path], command: Command) -> None:
    part = signed[0] / "content/tiny_q4.data.0"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.unlink()
    part.write_bytes(content)
    outcome = _verify(command, *signed, "--allow-development")
    assert outcome.status == 1
    assert "modified: content/tiny_q4.data.0" in outcome.out


def test_verify_names_missing_and_extra_files(signed: tuple[Path, Path], command: Command) -> None:
    (signed[0] / "content/tokenizer.json").unlink()
    (signed[0] / "content/more.txt").write_text("x")
    outcome = _verify(command, *signed, "--allow-development")
    assert outcome.status == 1
    assert "content/tokenizer.json" in outcome.out
    assert "content/more.txt" in outcome.out


def test_verify_refuses_another_model_and_a_downgrade(signed: tuple[Path, Path], command: Command) -> None:
    assert _verify(command, *signed, "--allow-development", "--model", "other").status == 1
    assert _verify(command, *signed, "--allow-development", "--variant", "q3").status == 1
    assert _verify(command, *signed, "--allow-development", "--highest-release", "9").status == 1


def test_verify_with_another_key(signed: tuple[Path, Path], project: Path, command: Command) -> None:
    other = _new_key(project / "other")
    outcome = _verify(command, signed[0], other.with_suffix(".pub"), "--allow-development")
    assert outcome.status == 1
    assert "other-key" in outcome.out


def test_verify_with_no_key_and_no_bundle(signed: tuple[Path, Path], project: Path, command: Command) -> None:
    assert "cannot be read" in paragraph(_verify(command, signed[0], project / "absent.pem"))
    assert _verify(command, project / "absent", signed[1]).status == 1


def _new_key(path: Path) -> Path:
    """Write a P-256 key pair: PATH.pem and PATH.pub."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from pipeline.bundle.keys import public_pem

    key = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.with_suffix(".pem").write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    path.with_suffix(".pub").write_bytes(public_pem(key.public_key()))
    return path.with_suffix(".pem")


def test_a_variant_that_phones_map_carries_what_they_prepack(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From metrics of 8 GB once loaded to the tokens that a phone writes from mapped weights."""
    tiny.edit(project / "configs/kernels.yaml", classes=["here"])
    _decide(project, "q4", "PASS")
    _measure(project, "q4", {"kl_mean": 0.2, "tokens": 100}, loaded=8 * 10**9)
    for stage in ("bundle", "sign"):
        assert command(stage, "tiny", "q4").status == 0
    (key,) = (project / "artifacts/keys").iterdir()
    bundle = project / "artifacts/bundles/tiny/q4"
    report = _verify(command, bundle, key, "--allow-development", "--tier", "android-16gb")
    assert report.status == 0
    release = read_json(bundle / "content/release.json")
    assert release["tiers"]["android-16gb"]["weights"] == "mapped"
    assert release["tiers"]["android-24gb"]["weights"] == "private"
    assert {"prepack.json", "tiny_q4.slice.0.onnx"} <= release["files"].keys()
    said = command("prepack", str(bundle / "content"), "--to", str(tmp_path / "phone"))
    assert (said.status, "greedy tokens are equal" in said.out) == (0, True)
    assert not list(bundle.glob("content/prepacked")) and not list(bundle.glob(".*"))


def test_a_key_other_than_the_configured_one_does_not_sign(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _decide(project, "q4", "PASS")
    assert command("bundle", "tiny", "q4").status == 0
    monkeypatch.setenv("PIPELINE_SIGNING_KEY_FILE", str(_new_key(project / "other")))
    assert "configs/signing.yaml names development" in paragraph(command("sign", "tiny", "q4"))
    assert not (project / "artifacts/bundles/tiny/q4/model.sig").exists()


def test_a_release_key_signs_and_verifies_without_permission(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _decide(project, "q4", "PASS")
    key = _new_key(project / "release")
    printed = command("key-id", str(key.with_suffix(".pub")))
    assert printed.status == 0
    tiny.edit(project / "configs/signing.yaml", channel="release", key_id=printed.out.strip())
    assert command("bundle", "tiny", "q4").status == 0
    assert "no private key was given" in paragraph(command("sign", "tiny", "q4"))
    monkeypatch.setenv("PIPELINE_SIGNING_KEY_FILE", str(key))
    assert command("sign", "tiny", "q4").status == 0
    outcome = _verify(command, project / "artifacts/bundles/tiny/q4", key.with_suffix(".pub"))
    assert (outcome.status, "OK" in outcome.out) == (0, True)


# --- what was released -----------------------------------------------------------------------------------------------


KL, TOKENS, PERPLEXITY = 0.2, 100, 12.5


def _release(project: Path, command: Command, monkeypatch: pytest.MonkeyPatch, kl: float = KL, number: int = 1) -> None:
    """A release bundle of q4, judged at a mean KL of `kl`, and the metrics that it was judged by."""
    line = GateLine("kl_mean", "PASS", n=TOKENS, estimate=kl, low=kl / 2, high=kl * 2, limit=1.0)
    _write(project, "q4", "PASS", line)
    divergence = {"kl_mean": kl, "tokens": TOKENS, "perplexity_reference": PERPLEXITY}
    _measure(project, "q4", divergence)
    key = project / "release.pem"
    if not key.exists():
        _new_key(project / "release")
    identity = command("key-id", str(key.with_suffix(".pub"))).out.strip()
    tiny.edit(project / "configs/signing.yaml", channel="release", key_id=identity, release=number)
    monkeypatch.setenv("PIPELINE_SIGNING_KEY_FILE", str(key))
    for stage in ("bundle", "sign"):
        assert command(stage, "tiny", "q4").status == 0


def test_a_release_is_recorded_for_the_next_builds_ratchet(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases are kept in order; a build is compared with the last one before its own number, never with itself."""
    _release(project, command, monkeypatch)
    for _ in range(2):  # the second time changes nothing
        assert command("record-release", "tiny", "q4").status == 0
    _release(project, command, monkeypatch, kl=0.3, number=3)
    assert _last_release("tiny", "q4").kl_mean == KL
    assert command("record-release", "tiny", "q4").status == 0
    builds = load_released().models["tiny"]["q4"]
    assert [(build.release, build.kl_mean) for build in builds] == [(1, KL), (3, 0.3)]
    assert builds[0] == ReleasedBuild(release=1, kl_mean=KL, tokens=TOKENS, perplexity_reference=PERPLEXITY)
    assert (project / "configs/released.yaml").read_text() == _header() + yaml.safe_dump(
        {"models": {"tiny": {"q4": [build.model_dump() for build in builds]}}}, default_flow_style=None, width=110
    )
    assert _last_release("tiny", "q4") == builds[0]
    tiny.edit(project / "configs/signing.yaml", release=4)
    assert _last_release("tiny", "q4") == builds[1]
    assert _last_release("tiny", "q3") is None


def _header() -> str:
    """What stands above the releases in the file that git has."""
    text = (ROOT / "configs/released.yaml").read_text()
    return text[: text.index("models:")]


def test_a_release_number_is_given_once(project: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    _release(project, command, monkeypatch)
    assert command("record-release", "tiny", "q4").status == 0
    _release(project, command, monkeypatch, kl=0.4)
    message = paragraph(command("record-release", "tiny", "q4"))
    assert "has release 1 of tiny q4 with a mean KL of 0.2 nats, this bundle has 0.4" in message
    assert load_released().models["tiny"]["q4"][0].kl_mean == KL


def test_only_verified_releases_are_recorded(project: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "channel 'development'" in paragraph(command("record-release", "tiny", "q4"))
    _release(project, command, monkeypatch)
    write_json(project / "artifacts/measurements/tiny/q4.json", {"divergence": {"kl_mean": 0.19}})
    assert "was judged at a mean KL of 0.2 nats" in paragraph(command("record-release", "tiny", "q4"))
    part = project / "artifacts/bundles/tiny/q4/content/release.json"
    text = part.read_text()
    part.unlink()
    part.write_text(text.replace("0.2", "0.1"))
    assert "only a release that verifies is recorded" in command("record-release", "tiny", "q4").err
    assert not load_released().models


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(project: Path) -> Iterator[Path]:
    """What is being written, artifacts/tiny/partial, on a disk of 512 KiB."""
    shutil.rmtree(project / "artifacts/tiny/variants")
    folder = project / "artifacts/tiny/partial"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path, project: Path, command: Command) -> None:
    message = paragraph(command("quantize", "tiny", "q4"))
    assert "disk" in message
    assert not (project / "artifacts/tiny/variants").exists()


def test_folders_on_two_file_systems_are_named(
    small_disk: Path, project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    message = paragraph(command("quantize", "tiny", "q4"))
    assert "different file systems" in message and "artifacts/tiny/variants/q4" in message
