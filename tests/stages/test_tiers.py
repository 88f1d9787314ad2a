"""The tiers stage and the plan command: what a variant needs on a phone, measured and computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.architecture import check_shapes, expected_architecture, shapes_of
from pipeline.config.phones import load_devices, load_shapes, load_tiers
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.files import write_json
from pipeline.judge import measured
from pipeline.judge.verdicts import PASS, GateLine, Verdict
from pipeline.planning.devices import Figure, Footprint, Way, need, ways
from pipeline.preflight import footprints
from pipeline.report import plan
from pipeline.report.columns import WIDTH
from pipeline.report.phones import lines
from pipeline.workspace import Workspace
from tests.conftest import ROOT
from tests.real_configs import REAL_CONFIGS, architecture_of

MB = 10**6
README = {
    ("mimo-8b", "q4"): 4_170_572_991,
    ("phi-4", "q4"): 7_825_245_504,
    ("phi-4-mini", "q4"): 2_169_189_936,
    ("mimo-8b", "q4_k_m"): 4_524_579_984,
    ("phi-4", "q4_k_m"): 8_748_932_280,
    ("phi-4-mini", "q4_k_m"): 2_395_518_631,
}


@pytest.fixture(autouse=True, scope="module")
def _planned_once() -> Iterator[None]:
    """What is computed rests on shapes and recipes, which no test here changes: each answer plans sixteen models."""
    computed, kept = footprints.computed, {}

    def once(found: footprints.Known, *key: Any) -> Footprint:
        if (found.model, *key) not in kept:
            kept[found.model, *key] = computed(found, *key)
        return kept[found.model, *key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprints, "computed", once)
        yield


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configurations where nothing was downloaded, built or measured."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measure(workspace: Workspace, variant: str, kind: str = "float32", per_token: int = 1536) -> None:
    """Metrics and a PASS of a variant that takes 2 MB at its peak, 1.2 of them once loaded."""
    metrics = {
        "size": {
            "bytes_on_disk": MB,
            "kv_cache": {"type": kind, "bytes_per_token": per_token},
            "prompt_token_bytes": 100,
        },
        "speed": {"peak_memory_bytes": 2 * MB, "load_peak_private_bytes": 1_200_000, "load_peak_mapped_bytes": 300_000},
        "divergence": {"kl_mean": 0.1},
    }
    write_json(workspace.measurements(variant), metrics)
    verdict = Verdict(PASS, (GateLine("kl_mean", PASS),), f"random/{variant}")
    write_json(workspace.verdict(variant), verdict.to_json())


def test_the_cache_counts_in_the_variants_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace("tiny")
    needed = {}
    for variant, kind, per_token in (("q4", "float32", 1536), ("q4_kv8", "int8", 384)):
        measure(workspace, variant, kind, per_token)
        footprint = measured.judged(workspace, variant).footprint
        needed[variant] = need(footprint, Way(4096, footprint.kv_cache, "private", 64, 4), runtime_bytes=7).private
    assert needed == {"q4": 2 * MB + 4096 * 1536 + 7, "q4_kv8": 2 * MB + 4096 * 384 + 7}


def test_metrics_without_a_figure_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measure(Workspace("tiny"), "q4")
    write_json(Workspace("tiny").measurements("q4"), {"size": {}, "speed": None})
    with pytest.raises(PipelineError, match="the metrics of q4 lack a figure"):
        measured.judged(Workspace("tiny"), "q4")


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", REAL_CONFIGS)
def test_the_shapes_are_those_of_the_published_configurations(model: str, tmp_path: Path) -> None:
    shapes = load_shapes().models[model]
    architecture = architecture_of(model, tmp_path)
    assert shapes_of(architecture) == shapes == shapes_of(expected_architecture(shapes))
    assert expected_architecture(shapes).expected_tensors() == architecture.expected_tensors()
    check_shapes(architecture, shapes, tmp_path / "config.json")


def test_another_models_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    architecture = architecture_of("phi-4-mini", tmp_path)
    with pytest.raises(CheckpointError, match="layers 32, expected 40; hidden 3072, expected 5120"):
        check_shapes(architecture, load_shapes().models["phi-4"], tmp_path / "config.json")


@pytest.mark.parametrize("model", ["mimo-8b", "phi-4", "phi-4-mini"])
def test_sizes_are_exact_before_anything_is_downloaded(model: str, desk: Path) -> None:
    """What the README states, to the byte; a budget by its bound."""
    found = footprints.known(model)
    assert found.origin.startswith("configs/shapes.yaml")
    for variant in ("q4", "q4_k_m"):
        footprint = footprints.computed(found, variant, 2048)
        assert footprint.download == Figure(README[model, variant], "computed")
        assert footprint.read.bytes < footprint.download.bytes < footprint.weights.bytes
    q3 = footprints.computed(found, "q3", 2048)
    assert {figure.basis for figure in (q3.download, q3.weights, q3.read)} == {"bound"}
    assert 0.75 * README[model, "q4"] < q3.download.bytes < README[model, "q4"]


def test_an_unknown_model_says_what_to_do(desk: Path) -> None:
    (desk / "configs").unlink()
    entry = (ROOT / "configs/models/phi-4.yaml").read_text()
    for name in ("models/new.yaml", "shapes.yaml"):
        (desk / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
    (desk / "configs/models/new.yaml").write_text(entry)
    (desk / "configs/shapes.yaml").write_text("models: {}")
    with pytest.raises(PipelineError, match=r"download new`, or add its shapes"):
        footprints.known("new")


# --- plan ------------------------------------------------------------------------------------------------------------


def plan_json(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    capsys.readouterr()
    asked = {"models": (), "tier": None, "device": None, "context": None, "as_json": True} | options
    plan.run(**asked)
    return json.loads(capsys.readouterr().out)


def allow_q3(desk: Path, model: str) -> None:
    """Name a model in every row's `opt_in`, in a copy of the configurations."""
    (desk / "configs").unlink()
    shutil.copytree(ROOT / "configs", desk / "configs")
    gates = desk / "configs/gates.yaml"
    gates.write_text(gates.read_text().replace("opt_in: []", f"opt_in: [{model}]"))


def test_each_class_gets_what_its_memory_holds(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, models=("mimo-8b", "phi-4", "phi-4-mini"))
    got = {
        model: {
            name: f"{row['chosen']['variant']} {row['chosen']['need']['way']['weights']}"
            for name, row in item["tiers"].items()
            if row["chosen"] and row["chosen"]["need"]["way"]["context"] == 2048
        }
        for model, item in found["models"].items()
    }
    most = {"android-16gb": "q4_k_m private", "android-24gb": "q4_k_m private", "ios-12gb": "q4_k_m private"}
    assert got == {
        "mimo-8b": {"android-8gb": "q3 mapped", "android-12gb": "q4_k_m mapped", "ios-8gb": "q3 mapped", **most,
            "ios-12gb": "q4_k_m mapped",
        },
        "phi-4": {
            "android-12gb": "q3 mapped", "android-16gb": "q3 mapped", "android-24gb": "q4_k_m mapped",
            "ios-12gb": "q3 mapped",
        },
        "phi-4-mini": {
            "android-6gb": "q4 mapped", "android-8gb": "q4_k_m mapped", "android-12gb": "q4_k_m private",
            "ios-6gb": "q4 mapped", "ios-8gb": "q4_k_m private", **most,
        },
    }  # fmt: skip


def test_what_no_phone_can_get_stands_in_no_table_but_is_explained(desk: Path) -> None:
    """q3 of a model whose row does not name it; with the remedy, and in the tables once the row does."""
    model = plan.answer(["phi-4-mini"])["models"]["phi-4-mini"]
    assert "opt_in" in model["forbidden"].pop("q3") and "q3" not in json.dumps(model)
    text = " ".join(" ".join(lines(plan.answer(["phi-4-mini"]))).split())
    assert "does not name phi-4-mini. Name it there, or leave q3 out of `variants`." in text
    allow_q3(desk, "phi-4-mini")
    found = plan.answer(["phi-4-mini"])["models"]["phi-4-mini"]
    assert found["forbidden"] == {} and "q3" in found["variants"]
    assert any("≤ " in line for line in lines(plan.answer(["phi-4-mini"])))


def test_the_answer_for_a_phone_has_a_roofline_and_a_way(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, models=("mimo-8b",), device="galaxy-s24-ultra")
    assert list(found["tiers"]) == ["android-12gb"]
    row, tier = found["models"]["mimo-8b"]["tiers"]["android-12gb"], found["tiers"]["android-12gb"]
    need = row["chosen"]["need"]
    assert need["way"] == {
        "context": 2048, "kv_cache": "int8", "weights": "mapped", "prefill_chunk": 64, "threads": 4
    }  # fmt: skip
    assert need["private_bytes"] < tier["budget_bytes"]
    assert need["private_bytes"] + need["mapped_bytes"] <= tier["resident_bytes"]
    (phone,) = found["models"]["mimo-8b"]["devices"].values()
    speed, read = phone["tokens_per_second"], found["models"]["mimo-8b"]["variants"]["q4_k_m"]["read"]["bytes"]
    assert speed["most_empty"] == pytest.approx(76.8e9 / read)
    assert speed["low"] == pytest.approx(0.4 * speed["most_full"])
    assert speed["most_full"] == pytest.approx(76.8e9 / (read + 2048 * 294_912 / 4))


def test_a_smaller_model_is_what_runs_instead(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, models=("phi-4",), tier="android-8gb")
    row = found["models"]["phi-4"]["tiers"]["android-8gb"]
    assert (row["chosen"], row["closest"]["variant"]) == (None, "q3")
    assert (row["instead"]["model"], row["instead"]["need"]["way"]["weights"]) == ("mimo-8b", "mapped")


def test_what_was_measured_is_not_computed(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(Workspace("phi-4"), "q4")
    found = plan_json(capsys, models=("phi-4",), tier="android-4gb")["models"]["phi-4"]
    assert found["variants"]["q4"]["download"] == {"basis": "measured", "bytes": MB}
    assert (found["variants"]["q4"]["verdict"], found["variants"]["q4"]["kl_mean"]) == ("PASS", 0.1)
    assert found["variants"]["q4_k_m"]["download"]["basis"] == "computed"
    assert found["tiers"]["android-4gb"]["chosen"]["variant"] == "q4"


def test_people_read_lines_of_a_page(desk: Path) -> None:
    text = lines(plan.answer())
    assert max(map(len, text)) <= WIDTH
    assert any("nothing; " in line and "lacks" in line for line in text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("phi4",)}, "Did you mean 'phi-4'"),
        ({"tier": "android-9gb"}, "Did you mean 'android-8gb'"),
        ({"device": "iphone-15-por"}, "Did you mean 'iphone-15-pro'"),
        ({"models": ("phi-4",), "context": 5000}, "--context is 5,000 tokens, more than .*: phi-4 4,096"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], message: str, desk: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.answer(**options)


def test_every_tier_has_a_phone_and_every_phone_its_tier() -> None:
    assert {device.tier for device in load_devices().devices.values()} == set(load_tiers().tiers)


def test_a_phone_in_the_wrong_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("tiers.yaml", "devices.yaml"):
        text = (ROOT / "configs" / name).read_text()
        (tmp_path / "configs" / name).write_text(text.replace("tier: ios-8gb", "tier: ios-6gb"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"devices.iphone-15-pro: 8,000,000,000 bytes of RAM are tier 'ios-8gb'"):
        load_devices()


def test_a_bundle_names_every_class_that_holds_it(desk: Path) -> None:
    found = ways(footprints.candidate(footprints.known("phi-4-mini"), "q4", 2048), load_tiers())
    assert found.keys() == load_tiers().tiers.keys() - {"android-4gb", "ios-4gb"}
    assert (found["android-6gb"].weights, found["android-12gb"].weights) == ("mapped", "private")
