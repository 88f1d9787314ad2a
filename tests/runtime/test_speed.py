"""Speed and memory: a real model once, and what figures say about runs that were made up. No test asserts on a time."""

from __future__ import annotations

import json
import mmap
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pipeline.errors import EvaluationError
from pipeline.runtime import app, speed
from pipeline.runtime.app import Generation, Look, Observed
from tests.artifact.exported import export
from tests.families import CASES, make_checkpoint

pytest_plugins = ["tests.smollm2"]

SUITE = ((16, 4), 4, 2)  # prompt lengths, new tokens, repeats
CONTEXT = 96
FIGURES = {
    *(f"{name}{end}" for name in ("tokens_per_second", "time_to_first_token_seconds")
      for end in ("", "_low", "_high", "_spread")),
    "bytes_per_token", "roofline_tokens_per_second",
}  # fmt: skip
MEMORY = {f"{phase}peak_{kind}_bytes" for phase in ("", "load_", "use_") for kind in ("private", "mapped")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph and what genai_config.json says about it; no runtime is asked to load it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), CASES["llama-tied"])
    export(folder, CONTEXT)
    config = {"model": {"context_length": CONTEXT, "decoder": {"filename": "model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


Watched = tuple[Observed, list[Look]]


def watched(rates: dict[int, list[float]], bandwidth: float = 1e12) -> Watched:
    """A process that was loaded after 2 and used until 5 seconds, then measured the bandwidth."""
    looks = [Look(1.0, 700, 90), Look(1.9, 600, 100), Look(3.0, 800, 40), Look(4.0, 500, 60), Look(6.0, 10**9, 10**9)]
    generations = [Generation(length, 0.5, rate) for length, values in rates.items() for rate in values]
    return Observed(1.5, Look(2.0, 300, 50), Look(5.0, 400, 50), generations, bandwidth), looks


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, run: Watched) -> dict[str, object]:
    monkeypatch.setattr(speed, "_run", lambda *_, **__: run)
    return speed.measure(folder, *SUITE)


def test_a_real_model_is_measured_in_processes_of_their_own(smollm2_export: Path) -> None:
    found = speed.measure(smollm2_export, *SUITE)
    assert set(found) == {
        "load_seconds", "cold_load_seconds", "cold_load_cached_bytes", "prompt_tokens", "prompts", "noisy",
        "memory_bandwidth_bytes_per_second", "peak_memory_bytes", *FIGURES, *MEMORY,
    }  # fmt: skip
    assert found["prompt_tokens"] == 16 and set(found["prompts"]) == {"4", "16"}
    for figures in found["prompts"].values():
        assert set(figures) == FIGURES
        assert figures["tokens_per_second_low"] <= figures["tokens_per_second"] <= figures["tokens_per_second_high"]
        assert 0 < figures["tokens_per_second"] < 1.1 * figures["roofline_tokens_per_second"]
        assert figures["time_to_first_token_seconds"] > 0
        assert figures["bytes_per_token"] > 538_000_000  # the weights alone, in float32
    assert found["prompts"]["16"].items() <= found.items()
    # Other processes may hold the weights, which are hard links into the store: then the load is not called cold.
    assert (found["cold_load_seconds"] is None) == (found["cold_load_cached_bytes"] > 0)
    assert found["peak_memory_bytes"] > 538_000_000
    assert found["peak_memory_bytes"] <= found["peak_private_bytes"] + found["peak_mapped_bytes"]
    assert found["use_peak_private_bytes"] > 10_000_000


def test_what_is_still_in_the_page_cache_is_not_called_cold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / "model.safetensors", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert held[0] >= 0  # a page that a process has mapped cannot be dropped
        found = measured(folder, monkeypatch, watched({4: [1.0], 16: [1.0]}))
    assert found["cold_load_seconds"] is None
    assert found["cold_load_cached_bytes"] >= mmap.PAGESIZE
    assert found["load_seconds"] == 1.5
    found = measured(folder, monkeypatch, watched({4: [1.0], 16: [1.0]}))
    assert (found["cold_load_seconds"], found["cold_load_cached_bytes"]) == (1.5, 0)


def test_figures_are_medians_and_extremes_beside_the_roofline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = watched({4: [99.0, 100.0, 101.0], 16: [95.0, 100.0, 104.0]})
    found = measured(folder, monkeypatch, run)
    _, reads = speed._describe(folder)
    short, long = found["prompts"]["4"], found["prompts"]["16"]
    assert (long["tokens_per_second_low"], long["tokens_per_second"], long["tokens_per_second_high"]) == (95, 100, 104)
    assert long["tokens_per_second_spread"] == pytest.approx(0.09)
    assert short["bytes_per_token"] == reads.per_token(4 + 2)  # in the middle of the new tokens
    assert long["bytes_per_token"] == reads.per_token(16 + 2)
    assert long["roofline_tokens_per_second"] == 1e12 / reads.per_token(16 + 2)
    assert found["noisy"] is False


@pytest.mark.parametrize("noisy", [4, 16])
def test_a_wide_spread_is_flagged_and_does_not_fail(folder: Path, noisy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {4: [100.0, 100.0], 16: [100.0, 100.0]} | {noisy: [95.0, 100.0, 105.1]}
    assert measured(folder, monkeypatch, watched(rates))["noisy"] is True


def test_a_rate_that_memory_cannot_feed_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reads = speed._describe(folder)
    feeds_100 = 100 * reads.per_token(16 + 2)
    assert measured(folder, monkeypatch, watched({4: [50.0], 16: [109.0]}, feeds_100))["tokens_per_second"] == 109
    with pytest.raises(EvaluationError, match=r"after a prompt of 16 tokens: 111\.00 .* above the roofline of 100\.00"):
        measured(folder, monkeypatch, watched({4: [50.0], 16: [111.0]}, feeds_100))


def test_memory_is_split_by_kind_and_phase_and_ends_with_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(folder, monkeypatch, watched({4: [1.0], 16: [1.0]}))
    assert {key: found[key] for key in MEMORY} == {
        "load_peak_private_bytes": 700, "load_peak_mapped_bytes": 100,
        "use_peak_private_bytes": 800, "use_peak_mapped_bytes": 60,
        "peak_private_bytes": 800, "peak_mapped_bytes": 100,
    }  # fmt: skip
    assert found["peak_memory_bytes"] == 840  # at one moment


def test_the_context_caps_prompts() -> None:
    lengths = (512, 8, 128)
    assert speed.prompt_lengths(lengths, 32, 2048) == (8, 128, 512)
    assert speed.prompt_lengths(lengths, 32, 96) == (8, 64)
    with pytest.raises(EvaluationError, match="32 new tokens leave no room for a prompt in a context of 32"):
        speed.prompt_lengths(lengths, 32, 32)


def test_the_bandwidth_is_measured_again_before_a_rate_seems_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([10.0, 300.0, 999.0])
    monkeypatch.setattr("pipeline.runtime.bandwidth.memory_bandwidth", lambda *_: next(found))
    assert app._bandwidth(100, [2.0, 2.5, 3.0]) == 300  # 250 bytes a second are needed
    found = iter([10.0, 30.0, 20.0])
    assert app._bandwidth(100, [2.0, 2.5, 3.0]) == 30


def test_the_process_speaks_json() -> None:
    for run in (watched({4: [1.0, 2.0]})[0], Observed(1.0, Look(2.0, 3, 4), Look(2.0, 3, 4), [], 0.0)):
        assert TypeAdapter(Observed).validate_json(json.dumps(asdict(run))) == run


def test_what_cannot_be_measured_is_an_evaluation_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"needs genai_config\.json and the graph that it names"):
        speed.measure(tmp_path, *SUITE)
    with pytest.raises(EvaluationError, match=r"measuring speed failed with status 1.*: \w+"):
        speed._run(folder)  # the runtime refuses what has no tokenizer and no full configuration
