from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.calibration import CalibrationConfig, load_calibration, load_sensitivity
from pipeline.config.models import ModelConfig, load_model
from pipeline.config.recipes import Learning, Rotation
from pipeline.preflight import needs
from pipeline.preflight.needs import Rates
from pipeline.runtime.side_by_side import fitting_texts, working_bytes
from pipeline.tasks.humaneval_problems import PROMPT_TOKENS
from pipeline.tasks.mmlu import LONGEST, TOKENS
from pipeline.tasks.registry import Suite, load_suite
from pipeline.tasks.subject import CHUNK
from tests.real_configs import architecture_of

PHI_4_BYTES = 29_319_014_400
RATES = Rates(flops=130e9, cores=2)


def asked(prompt: str) -> ModelConfig:
    return load_model("mimo-8b").model_copy(update={"humaneval_prompt": prompt, "mmlu_mode": "letter"})


@pytest.fixture
def suite() -> Suite:
    return load_suite("smoke")


def test_download_writes_to_the_store_and_copies_only_where_links_do_not_reach() -> None:
    linked, copied = needs.download(1000, 0), needs.download(1000, 3000)
    assert (linked.store_disk, copied.store_disk) == (1000, 1000)
    assert copied.disk - linked.disk == 3000


def test_export_is_its_rotary_tables_and_longrope_has_two(tmp_path: Path) -> None:
    plain = needs.export(architecture_of("phi-4", tmp_path), 4096)
    long = needs.export(architecture_of("phi-4-mini", tmp_path), 4096)
    assert plain.disk - needs.SMALL_FILES_BYTES == 2 * 4096 * 64 * 4
    assert long.disk - needs.SMALL_FILES_BYTES == 2 * 2 * 4096 * 48 * 4


@pytest.mark.parametrize(
    ("model", "tokens", "window", "measured"),
    # Private bytes at the peak of the stage on two layers of these widths in bfloat16 (ONNX Runtime 1.31).
    [("phi-4", 4096, 1024, 4.705e9), ("mimo-8b", 11_264, 512, 2.560e9)],
)
def test_calibration_takes_what_was_measured(
    model: str, tokens: int, window: int, measured: float, tmp_path: Path
) -> None:
    architecture = replace(architecture_of(model, tmp_path), layers=2)
    wanted = needs.calibrate(architecture, CalibrationConfig(texts={"text-c4": tokens}, window=window))
    assert measured <= wanted.memory <= 1.1 * measured + needs.PROCESS_BYTES


def test_calibration_grows_with_layers_on_the_disk_alone(tmp_path: Path) -> None:
    """Hidden states of two layers at a time, and every layer's correlations, which stay."""
    architecture, calibration = architecture_of("phi-4", tmp_path), load_calibration()
    few, many = (needs.calibrate(replace(architecture, layers=layers), calibration, RATES) for layers in (1, 40))
    assert few.memory == many.memory
    assert many.seconds > 10 * few.seconds
    assert not many.scratch
    correlations = (many.disk - few.disk) // 39
    assert few.disk - correlations - needs.SMALL_FILES_BYTES == 2 * 4 * calibration.grown(17_920).tokens * 5120
    assert correlations == pytest.approx(2 * (3 * 5120**2 + 17_920**2) / 2, rel=0.05)


def test_two_layers_take_what_was_measured(tmp_path: Path) -> None:
    """Private bytes at the stages' peaks, on synthetic weights of these widths in bfloat16 (ONNX Runtime 1.31)."""
    architecture = replace(architecture_of("phi-4", tmp_path), layers=2)
    text = {"texts": {"text-c4": 128}, "window": 128}
    wanted = load_sensitivity().model_copy(update=text)
    sensitivity = needs.sensitivity(architecture, wanted, RATES)
    assert 2.801e9 <= sensitivity.memory <= 1.2 * 2.801e9
    # Each core's activations, and the matrices that are damaged at a time: a layer's at most.
    one, eight, nine = (needs.sensitivity(architecture, wanted, replace(RATES, cores=n)).memory for n in (1, 8, 9))
    assert eight - one == 4 * (5120 * 7680 + 5120 * 5120 + 17920 * 5120) + 7 * (nine - eight)
    mimo = replace(architecture_of("mimo-8b", tmp_path), layers=2)
    assert 1.783e9 <= needs.quantize("q4", 10**6, mimo, "gptq", RATES).memory <= 1.2 * 1.783e9


def test_learning_grows_with_the_window_and_not_with_a_step(tmp_path: Path) -> None:
    mimo, wanted = architecture_of("mimo-8b", tmp_path), Learning(steps=80, tokens=1024)
    few = needs.learn("q3", 10**9, mimo, wanted, 512, RATES)
    many = needs.learn("q3", 10**9, mimo, wanted.model_copy(update={"tokens": 2048}), 512, RATES)
    assert (many.memory, many.seconds) == (few.memory, pytest.approx(2 * few.seconds))
    assert needs.learn("q3", 10**9, mimo, wanted, 256, RATES).memory < few.memory


def test_parity_is_the_exporter_and_leaves_nothing(tmp_path: Path) -> None:
    wanted = needs.parity(500_000_000, 1_000_000_000)
    assert wanted.memory == needs.PROCESS_BYTES + 16 * 500_000_000
    assert wanted.disk >= 2 * 4 * 500_000_000
    assert wanted.scratch


def test_quantize_memory_does_not_grow_and_its_disk_is_the_plan(tmp_path: Path) -> None:
    phi = architecture_of("phi-4", tmp_path)
    few = replace(phi, layers=1)
    for search in ("nearest", "weighted", "gptq"):
        small, large = (
            needs.quantize("q4", size, model, search, RATES) for size, model in ((10**6, few), (10**10, phi))
        )
        assert small.memory == large.memory <= 6e9
        assert large.disk - small.disk == 10**10 - 10**6
    turned = needs.quantize("q4", 10**6, phi, "gptq", RATES, Rotation(residual="all")).memory
    assert turned - small.memory == 4 * 5120 * 17_920
    searches = ("nearest", "weighted", "gptq")
    seconds = [needs.quantize("q4", 10**6, phi, search, RATES).seconds for search in searches]
    assert seconds == sorted(seconds)


def test_the_reference_of_phi_4_needs_what_the_readme_says_and_a_third_more(tmp_path: Path, suite: Suite) -> None:
    wanted = needs.reference(architecture_of("phi-4", tmp_path), PHI_4_BYTES, suite, load_model("phi-4"))
    assert wanted.memory == round(4 / 3 * 87_957_043_200)
    assert wanted.disk - needs.SMALL_FILES_BYTES == 2 * 100_352 * 6112
    assert math.isnan(wanted.seconds)


def test_layer_by_layer_the_reference_of_phi_4_fits_a_laptop(tmp_path: Path, suite: Suite) -> None:
    """8 GB whatever the suite and the number of layers, where so much is available; time grows with the layers."""
    phi, full = architecture_of("phi-4", tmp_path), load_suite("release")
    few = replace(phi, layers=20)
    for wanted, layers, rates in ((suite, phi, RATES), (full, phi, RATES), (suite, few, RATES)):
        found = needs.layered_reference(layers, PHI_4_BYTES, wanted, asked("chat"), 8 * 10**9, rates)
        assert 2e9 <= found.memory <= 8e9
        assert found.seconds > sum(one.seconds for one in found.writing) > 0
    long, short = (
        needs.layered_reference(model, PHI_4_BYTES, suite, asked("chat"), 10**12, RATES) for model in (phi, few)
    )
    assert long.disk - needs.SMALL_FILES_BYTES == 2 * 100_352 * 6112 + 2 * 4 * 5120 * suite.mmlu.questions * 111
    assert long.seconds > short.seconds


@pytest.mark.parametrize("prompt", ["completion", "chat", "thinking"])
def test_texts_side_by_side_take_a_pass_for_each_token_of_the_longest(tmp_path: Path, prompt: str) -> None:
    """164 answers, of as many tokens as the suite allows, in as many rounds as memory needs."""
    mimo, full, size = architecture_of("mimo-8b", tmp_path), load_suite("release"), 15_245_238_272
    most = full.humaneval.most_tokens(asked(prompt))
    passes = []
    for memory in (16, 32, 1000):
        found = needs.layered_reference(mimo, size, full, asked(prompt), memory * 10**9, RATES)
        one = next(item for item in found.writing if item.title == "HumanEval")
        assert one.texts == fitting_texts(mimo, 164, most + PROMPT_TOKENS, memory * 10**9)
        assert one.passes == -(-164 // one.texts) * most
        assert one.read == one.passes * size
        assert one.memory - working_bytes(mimo, one.texts) == one.texts * (most + PROMPT_TOKENS) * 294_912
        assert one.memory <= memory * 10**9
        every = needs.side_by_side_seconds(mimo, size, one.texts, memory * 10**9 - one.memory, RATES)
        assert one.seconds > one.passes * every
        assert every >= size / needs.READ_PER_SECOND or memory == 1000, "its weights do not stay in memory"
        passes.append(one.passes)
    assert passes == sorted(set(passes), reverse=True)
    assert passes[-1] == most


def test_a_variant_takes_its_prepacked_bytes_logits_and_a_cache(tmp_path: Path, suite: Suite) -> None:
    architecture, entry = architecture_of("mimo-8b", tmp_path), asked("completion")
    small, large = (needs.validate(architecture, "q4", size, 0, suite, entry, RATES) for size in (0, 5_000_000_000))
    assert large.memory - small.memory == round(needs.PREPACKED * 5_000_000_000)
    assert small.memory - needs.MEASURING_BYTES == 4 * 4 * architecture.vocab * max(suite.divergence.window, CHUNK)
    assert large.seconds == small.seconds
    token = 2 * 4 * 36 * 8 * 128
    short, long = (needs.validate(architecture, "q4", 0, n * token, suite, entry, RATES).memory for n in (1, 2))
    assert long - short == token * 2 * LONGEST["letter"]


def test_five_shot_prompts_count_with_their_cache_and_each_subject_s_examples_once(
    tmp_path: Path, suite: Suite
) -> None:
    architecture = architecture_of("mimo-8b", tmp_path)
    token = 2 * 4 * 36 * 8 * 128
    entry = asked("completion").model_copy(update={"mmlu_mode": "five-shot"})
    small, large = (needs.validate(architecture, "q4", 0, n * token, suite, entry, RATES) for n in (1, 2))
    assert large.memory - small.memory == 2 * 3146 * token
    more = suite.model_copy(update={"mmlu": suite.mmlu.model_copy(update={"questions": suite.mmlu.questions + 1})})
    one = needs.validate(architecture, "q4", 0, token, more, entry, RATES).seconds
    multiplied = sum(matrix.rows * matrix.columns for matrix in architecture.matrices)
    assert one - small.seconds == pytest.approx(2 * multiplied * TOKENS["five-shot"] / RATES.flops)


def test_a_long_thought_takes_room_for_its_tokens(tmp_path: Path, suite: Suite) -> None:
    architecture, token = architecture_of("mimo-8b", tmp_path), 2 * 4 * 36 * 8 * 128
    long = suite.model_copy(update={"humaneval": suite.humaneval.model_copy(update={"max_think_tokens": 30_000})})
    memory = {
        prompt: needs.validate(architecture, "q4", 0, token, long, asked(prompt), RATES).memory
        for prompt in ("completion", "chat", "thinking")
    }
    assert memory["completion"] == memory["chat"] < memory["thinking"]
    text = PROMPT_TOKENS + long.humaneval.max_chat_tokens + 30_000
    assert memory["thinking"] - memory["chat"] == (text - 2 * LONGEST["letter"]) * token


def test_times_scale_with_the_measured_rate_and_know_the_suite(tmp_path: Path, suite: Suite) -> None:
    architecture = architecture_of("phi-4", tmp_path)

    def seconds(wanted: Suite, flops: float) -> float:
        result = needs.validate(architecture, "q4", 9 * 10**9, 0, wanted, asked("completion"), Rates(flops, 2)).seconds
        assert result is not None
        return result

    assert seconds(suite, 130e9) == pytest.approx(2 * seconds(suite, 260e9))
    assert seconds(load_suite("release"), 130e9) > 4 * seconds(suite, 130e9)
    # Prefill alone: 14.1 billion multiplied weights, two operations each; 13,779 tokens of the smoke suite
    # (HumanEval's prompts are read twice).
    silent = suite.model_copy(
        update={
            "humaneval": suite.humaneval.model_copy(update={"max_new_tokens": 0}),
            "speed": suite.speed.model_copy(update={"new_tokens": 0}),
        }
    )
    multiplied = architecture.parameters - 100_352 * 5120 - (2 * 40 + 1) * 5120
    assert seconds(silent, 130e9) == pytest.approx(2 * multiplied * 13_779 / 130e9)


def test_a_bundle_is_no_second_copy() -> None:
    assert needs.bundle("q4").disk == needs.SMALL_FILES_BYTES
