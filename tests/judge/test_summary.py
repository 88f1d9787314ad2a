"""What DVC compares of the measurements."""

from __future__ import annotations

from typing import Any

from pipeline.judge import summary

MEASURED: dict[str, Any] = {
    "identity": {"onnxruntime": "1.31.1"},
    "size": {"bytes_on_disk": 81_032_083, "bits_per_weight": 4.819214403198787, "packed_bytes": 81_557_660},
    "divergence": {"kl_mean": 0.18324151705455505, "kl_mean_low": 0.1589697, "kl_mean_high": 0.2185458, "kl_max": 5.1},
    "mmlu": {"accuracy": 0.3157894736842105, "n": 57},
    "humaneval": None,
    "speed": {"tokens_per_second": 92.53132016523205, "load_seconds": 0.2384565920001478},
}


def test_results_are_few_and_rounded_and_bytes_are_exact() -> None:
    """A last digit that another machine rounds otherwise must not change what git tracks."""
    assert summary.results(MEASURED, "PASS") == {
        "size": {"bytes_on_disk": 81_032_083, "bits_per_weight": 4.819, "packed_bytes": 81_557_660},
        "divergence": {"kl_mean": 0.1832, "kl_mean_low": 0.159, "kl_mean_high": 0.2185},
        "mmlu": {"accuracy": 0.3158},
        "verdict": "PASS",
    }


def test_another_machines_speed_changes_the_speeds_only() -> None:
    other = MEASURED | {"speed": {"tokens_per_second": 13.0}}
    assert summary.results(other, "PASS") == summary.results(MEASURED, "PASS")
    assert (summary.speeds(MEASURED), summary.speeds(other)) == (
        {"tokens_per_second": 92.53},
        {"tokens_per_second": 13.0},
    )


def test_what_was_not_measured_is_left_out() -> None:
    assert summary.results({}, "ERROR") == {"verdict": "ERROR"}
    assert summary.speeds({"speed": None}) == {}
