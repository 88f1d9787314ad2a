"""The benchmark of the reference: that it runs what the stage runs and reports it, not how fast anything is."""

from __future__ import annotations

from pathlib import Path

from benchmarks import reference
from benchmarks.tables import reference as reference_table
from pipeline.checkpoint.architecture import read_architecture
from tests.families import CASES, make_checkpoint


def test_a_model_is_measured_in_a_process_of_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", CASES["qwen2"], dtype="BF16")
    record = reference.measure(folder, tokens=50, window=16)
    parameters = read_architecture(folder / "config.json").parameters
    assert (record["layers"], record["tokens"], record["window"]) == (3, 48, 16)
    assert record["weight_bytes"] == 2 * parameters
    assert record["whole_model_bytes"] == 6 * parameters
    assert record["private_bytes"] > 10_000_000
    assert 0 < record["codes_kl_mean"] < 1e-6
    assert 0 < record["pass_seconds"] + record["answer_seconds"] < record["wall_seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "hidden states and codes are scratch"


def test_a_part_of_a_model_is_shown_as_such() -> None:
    whole = {
        "model": "phi-4", "cut_to_layers": None, "whole_model_bytes": 88e9, "weight_bytes": 29e9, "tokens": 512,
        "private_bytes": 3e9, "pass_seconds": 300.0, "answer_seconds": 9.0, "disk_growth_bytes": 1e8,
    }  # fmt: skip
    machine = {"cpu": "Any CPU", "cores": 2, "vector_extensions": ["avx2"]}
    text = reference_table({"machine": machine, "records": [whole, whole | {"cut_to_layers": 4}]})
    assert "| phi-4 |" in text
    assert "| phi-4, first 4 layers |" in text
    assert text.endswith("Measured on Any CPU, 2 cores (avx2).")
