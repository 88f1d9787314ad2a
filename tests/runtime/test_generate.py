"""Generation with the real small model: a text depends on its prompt and its seed, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EvaluationError
from pipeline.runtime import generate
from pipeline.runtime.generate import Limits, Sampling, Writer, Written, derived_seed
from pipeline.tasks.humaneval_answers import chat_request
from pipeline.tasks.humaneval_problems import Problem

pytest_plugins = ["tests.smollm2"]

PROMPTS = [
    "The capital of France is",
    'def add(a, b):\n    """Add two numbers."""',
    "Water boils at a temperature of",
    "Once upon a time there was a little girl who lived in a village near the forest, and every day she",
]
WARM = Sampling(temperature=0.8, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def writer(smollm2_export: Path) -> Writer:
    return Writer(smollm2_export)


def never(_: str) -> bool:
    return False


def test_a_text_is_the_same_whatever_was_asked_before(writer: Writer) -> None:
    first, *_ = [writer.continuation(prompt, Limits(12), never) for prompt in PROMPTS]
    again = [writer.continuation(prompt, Limits(12), never) for prompt in reversed(PROMPTS)]
    assert again[-1] == first
    assert "Paris" in first.text
    assert "return a + b" in again[2].text
    assert all(len(one.ids) == 12 and one.cut == "answer" for one in again)
    assert all(writer.tokenizer.decode(list(one.ids)) == one.text for one in again)


def test_a_text_ends_at_the_look_that_finds_it_complete(writer: Writer) -> None:
    found = writer.continuation(PROMPTS[0], Limits(64), lambda text: "Paris" in text)
    assert "Paris" in found.text
    assert (len(found.ids), found.cut) == (8, "")  # the first look
    other = writer.continuation(PROMPTS[3], Limits(24), lambda text: "Paris" in text)
    assert (len(other.ids), other.cut) == (24, "answer")


def test_the_runtime_takes_the_cores_that_this_process_may_use(
    smollm2_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlaid: list[str] = []
    monkeypatch.setattr(generate, "cores", lambda: 3)
    monkeypatch.setattr(generate.genai.Config, "overlay", lambda self, text: overlaid.append(text))
    Writer(smollm2_export)
    assert overlaid == ['{"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}']


def test_the_end_of_text_is_an_end(writer: Writer) -> None:
    prompt = writer.tokenizer.apply_chat_template('[{"role": "user", "content": "Say hi."}]')
    found = writer.continuation(prompt, Limits(96), never)
    assert found.cut == ""
    assert found.ids[-1] in writer.stop_ids
    assert not writer.stop_ids & set(found.ids[:-1])
    assert writer.tokenizer.decode(list(found.ids[:-1])) == found.text


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_and_another_seed_another(writer: Writer) -> None:
    first, again = (writer.continuation(PROMPTS[3], Limits(16), never, WARM) for _ in range(2))
    others = [writer.continuation(PROMPTS[3], Limits(16), never, Sampling(0.8, 0.95, seed)) for seed in (8, 9)]
    assert first == again
    assert len({one.text for one in (first, *others)}) == 3


def test_a_cold_or_narrow_draw_is_greedy_and_no_limit_of_the_model_hides_behind(writer: Writer) -> None:
    greedy = writer.continuation(PROMPTS[3], Limits(16), never)
    for sampling in (Sampling(0.01, 1.0, 1), Sampling(1.0, 0.01, 1), Sampling(1.0, 0.01, 2)):
        assert writer.continuation(PROMPTS[3], Limits(16), never, sampling) == greedy
    # So hot that all 49,152 tokens are about equally likely: drawn from the model's own top 50 they would be words.
    hot = writer.continuation(PROMPTS[3], Limits(64), never, Sampling(100.0, 1.0, 1))
    assert max(hot.ids) > 20_000 and len(set(hot.ids)) > 55


def test_derived_seeds_differ_by_name_and_fit_the_runtime() -> None:
    seeds = {derived_seed(seed, f"HumanEval/{n}#0") for seed in (0, 1) for n in range(164)}
    assert len(seeds) == 2 * 164
    assert all(0 <= seed < 1 << 31 for seed in seeds)
    assert derived_seed(0, "HumanEval/0#0") == 81177165


# --- thinking --------------------------------------------------------------------------------------------------------


def characters(ids: list[int]) -> str:
    """Of a tokenizer whose tokens are the characters of a text; 0 ends it."""
    return "".join(map(chr, ids))


def told(text: str, limits: Limits, opened: bool = False, look_every: int = 8) -> Written:
    """How a text ends that is looked at as `Writer.continuation` does."""
    ids = [ord(character) for character in text]
    growing = generate.Text(characters, {0}, limits, never, opened)
    for step in range(1, limits.total + 1):
        growing.ids = ids[:step]
        if (step % look_every == 0 or step in {len(ids), limits.total}) and (written := growing.look()):
            return written
    raise AssertionError(f"{text} never ended")


@pytest.mark.parametrize("look_every", [1, 3, 8, 50])
@pytest.mark.parametrize(
    ("text", "limits", "opened", "written", "cut"),
    [
        ("an answer that is long", Limits(9), False, "an answer", "answer"),
        ("short\0", Limits(9), False, "short", ""),
        ("nine char\0", Limits(10), False, "nine char", ""),
        ("nine char\0", Limits(9), False, "nine char", "answer"),
        ("<think>hm</think>yes, it is so", Limits(5, 30), False, "<think>hm</think>yes, ", "answer"),
        ("<think>hm</think>yes\0", Limits(5, 30), False, "<think>hm</think>yes", ""),
        ("hm</think>yes\0", Limits(5, 30), True, "hm</think>yes", ""),
        ("<think>on and on and on and on", Limits(5, 20), False, "<think>on and on and", "thinking"),
        ("<think>1234567890</think>late", Limits(5, 20), False, "<think>1234567890</t", "thinking"),
        ("on and on and on and on and on", Limits(5, 20), True, "on and on and on and", "thinking"),
        ("<think>gives up\0", Limits(5, 20), False, "<think>gives up", ""),
        ("no thought, just talk, and more", Limits(5, 20), False, "no th", "answer"),
    ],
)
def test_thinking_has_a_limit_of_its_own(
    text: str, limits: Limits, opened: bool, written: str, cut: str, look_every: int
) -> None:
    found = told(text, limits, opened, look_every)
    assert (found.text, found.cut) == (written, cut)
    end = 1 if "\0" in text and cut == "" else 0
    assert len(found.ids) == len(written) + end


# --- prompts and errors ----------------------------------------------------------------------------------------------


def test_a_request_is_put_into_the_models_own_template(writer: Writer) -> None:
    problem = Problem("x/0", 'def add(a, b):\n    """Add two numbers."""\n', "add", "", "")
    prompt = writer.chat(chat_request(problem))
    assert prompt.startswith("<|im_start|>system\n")
    assert '```python\ndef add(a, b):\n    """Add two numbers."""\n```<|im_end|>' in prompt
    assert prompt.endswith("<|im_start|>assistant\n")
    answer = writer.continuation(prompt, Limits(64), never)
    assert "def add" in answer.text


def test_more_than_the_context_is_refused_with_the_numbers(writer: Writer) -> None:
    with pytest.raises(EvaluationError, match=r"5 tokens with 1,000 to think and 2,000 to answer .* context of 2,048"):
        writer.continuation(PROMPTS[0], Limits(2000, thinking=1000), never)


def test_a_folder_without_a_model_is_an_evaluation_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="onnxruntime-genai cannot load it"):
        Writer(tmp_path)
