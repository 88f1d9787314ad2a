"""Generation with the real small model: batches must not change what is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluate.generate import Writer

pytest_plugins = ["tests.smollm2"]

PROMPTS = [
    "The capital of France is",
    'def add(a, b):\n    """Add two numbers."""',
    "Water boils at a temperature of",
    "Once upon a time there was a little girl who lived in a village near the forest, and every day she",
]


@pytest.fixture(scope="module")
def writer(smollm2_export: Path) -> Writer:
    return Writer(smollm2_export)


def never(_: str) -> bool:
    return False


def test_a_batch_of_unequal_prompts_writes_what_each_writes_alone(writer: Writer) -> None:
    alone = [writer.continuations([prompt], 12, never)[0] for prompt in PROMPTS]
    assert writer.continuations(PROMPTS, 12, never) == alone
    assert "Paris" in alone[0]
    assert "return a + b" in alone[1]


def test_batches_hold_every_prompt_once_longest_first_within_the_logits_bound(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evaluate import generate

    longest = max(len(writer.tokenizer.encode(prompt)) for prompt in PROMPTS)
    monkeypatch.setattr(generate, "_LOGIT_BYTES", 4 * writer.vocab * longest * 2)
    batches = list(writer.batches(PROMPTS))
    assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3]
    assert batches[0][0] == 3
    assert len(batches[0]) == 2


def test_generation_ends_when_every_text_is_complete(writer: Writer) -> None:
    short = writer.continuations([PROMPTS[0]], 64, lambda text: "Paris" in text)[0]
    assert "Paris" in short
    assert len(writer.tokenizer.encode(short)) <= 8, "complete at the first look, after 8 tokens"


def test_a_folder_without_a_model_is_an_evaluation_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="onnxruntime-genai cannot load it"):
        Writer(tmp_path)
