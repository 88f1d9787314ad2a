"""The benchmark of generation: that it runs what the stage runs and reports it, not how fast anything is."""

from __future__ import annotations

from pathlib import Path

from benchmarks import generation
from benchmarks.tables import generation as generation_table
from tests.families import CASES, make_checkpoint


def test_passes_are_measured_in_a_process_of_their_own_beside_the_prediction(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", CASES["mimo"], dtype="BF16")
    record = generation.measure(folder, wanted=5, tokens=60, passes=4)
    assert (record["layers"], record["texts"], record["tokens"]) == (3, 5, 60)
    assert len(record["pass_seconds"]) == 4
    assert min(record["pass_seconds"]) <= record["median_seconds"] <= max(record["pass_seconds"])
    assert record["median_seconds"] > 0
    assert record["measured_over_predicted"] == record["median_seconds"] / record["predicted_seconds"]
    assert record["private_bytes"] > 10_000_000


def test_the_suite_says_how_many_texts_and_how_long() -> None:
    texts, tokens = generation.asked("phi-4", "release")
    assert (texts, tokens > 768) == (164, True)


def test_the_table_shows_both_times() -> None:
    record = {
        "model": "mimo-8b", "texts": 60, "tokens": 900, "private_bytes": 15e9, "weight_bytes": 15.2e9,
        "pass_seconds": [30.0, 20.0, 25.0], "disk_read_bytes": 40e9, "median_seconds": 25.0, "predicted_seconds": 20.0,
        "measured_over_predicted": 1.25, "products_per_second": 110e9,
    }  # fmt: skip
    machine = {"cpu": "Any CPU", "cores": 2, "vector_extensions": ["avx2"]}
    text = generation_table({"machine": machine, "records": [record]})
    assert "| mimo-8b | 60 | 900 | 15.0 | 25.0 (20.0–30.0) | 13.3 | 20.0 | 1.25 |" in text
    assert text.endswith("Measured on Any CPU, 2 cores (avx2).")
