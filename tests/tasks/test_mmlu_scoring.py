"""MMLU scores checked against scoring whole sequences, with fake models and a real one; and what is run for them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.runtime.session import OnnxDecoder
from pipeline.tasks.mmlu_questions import Prompt, Question, asker
from pipeline.tasks.mmlu_scoring import CHUNK, Scorer, item_names
from tests.artifact.exported import export
from tests.families import CASES, Case, make_checkpoint
from tests.recipes import load_recipe

VOCABULARY = 300
QUESTION = Question("high school physics", " What is heavy? ", ("a feather", "lead", "air", "a long train"), 1)
EXAMPLES = {QUESTION.subject: [QUESTION] * 5}
LETTER, CLOZE, FIVE_SHOT = asker("letter")(QUESTION), asker("cloze")(QUESTION), asker("five-shot", EXAMPLES)(QUESTION)


def encode(text: str) -> list[int]:
    """One token per UTF-8 byte."""
    return list(text.encode())


def words(text: str) -> list[int]:
    """One token per word, a leading space belonging to it, as in byte-level BPE."""
    return [len(word) + 31 * ord(word[0]) % 250 for word in text.replace("\n", " ").split(" ") if word]


def logits_after(history: Sequence[int]) -> np.ndarray:
    """float32 [VOCABULARY], a fixed pseudo-random function of the whole history."""
    seed = hashlib.sha256(np.array(history, dtype=np.int64).tobytes()).digest()
    return np.random.default_rng(list(seed)).normal(0, 3, VOCABULARY).astype(np.float32)


class FakeDecoder:
    """Logits depend on every earlier token, so a lost or repeated part of the past changes them."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def run(self, ids: Sequence[int], past: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
        self.calls.append(len(ids))
        history = past or ()
        rows = []
        for token in ids:
            history = (*history, token)
            rows.append(logits_after(history))
        return np.stack(rows), history


def scores(prompt: Prompt, encode: Callable[[str], list[int]] = encode, model: object | None = None) -> np.ndarray:
    return Scorer(encode, model or FakeDecoder(), 10_000).scores(prompt)


def whole_sequence_score(context: list[int], answer: list[int]) -> float:
    """Σ log p(answer token | everything before), each position computed from the full sequence, without a state."""
    total = 0.0
    for index, token in enumerate(answer):
        row = logits_after(context + answer[:index]).astype(np.float64)
        total += row[token] - math.log(np.exp(row).sum())
    return total


# --- scores


def test_cloze_scores_equal_scoring_each_whole_sequence_per_token() -> None:
    context, answers = encode(CLOZE.text), [encode(answer) for answer in CLOZE.answers]
    expected = [whole_sequence_score(context, answer) / len(answer) for answer in answers]
    np.testing.assert_allclose(scores(CLOZE), expected, rtol=1e-12)


@pytest.mark.parametrize("prompt", [LETTER, FIVE_SHOT], ids=["letter", "five-shot"])
def test_letter_scores_equal_scoring_each_whole_sequence(prompt: Prompt) -> None:
    expected = [whole_sequence_score(encode(prompt.text), encode(f" {letter}")) for letter in "ABCD"]
    np.testing.assert_allclose(scores(prompt), expected, rtol=1e-12)


class Bigram:
    """p(next | last) from a table; the state is unused."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self.logits = np.log(probabilities).astype(np.float32)

    def run(self, ids: Sequence[int], past: object | None = None) -> tuple[np.ndarray, object]:
        return self.logits[list(ids)], past


def test_a_hand_computed_example() -> None:
    """Prompt → 0; the choices are 1, 1 1, 2 and 3. p(1|0) = 1/2, p(1|1) = 1/8, p(2|0) = 1/4, p(3|0) = 1/8."""
    table = np.array([[1 / 8, 1 / 2, 1 / 4, 1 / 8], [1 / 4, 1 / 8, 3 / 8, 1 / 4], [1 / 4] * 4, [1 / 4] * 4])
    ids = {" one": [1], " one one": [1, 1], " two": [2], " three": [3]}

    def encode_table(text: str) -> list[int]:
        return [0, *ids.get(text.rpartition(":")[2], [])]

    prompt = asker("cloze")(Question("s", "q", ("two", "one one", "three", "one"), 3))
    expected = [math.log(1 / 4), (math.log(1 / 2) + math.log(1 / 8)) / 2, math.log(1 / 8), math.log(1 / 2)]
    np.testing.assert_allclose(scores(prompt, encode_table, Bigram(table)), expected, rtol=1e-6)


def test_tokens_merged_across_the_answer_s_boundary_are_scored_with_the_answer() -> None:
    """This tokenizer joins ": l" into one token, so only that answer's sequence does not start with the prompt's."""

    def merging(text: str) -> list[int]:
        return encode(text.replace(": l", "\x01"))

    got = scores(CLOZE, merging)
    context = merging(CLOZE.text)[:-1]  # without the ":" that may merge
    for index, choice in enumerate(QUESTION.choices):
        answer = merging(f"{CLOZE.text} {choice}")[len(context) :]
        assert answer[0] == (1 if choice == "lead" else ord(":"))
        assert got[index] == pytest.approx(whole_sequence_score(context, answer) / len(answer), rel=1e-12)


def test_logits_of_any_offset_give_the_same_scores() -> None:
    class Shifted(FakeDecoder):
        def run(self, ids: Sequence[int], past: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
            logits, state = super().run(ids, past)
            return logits.astype(np.float64) + 5000.0, state

    np.testing.assert_allclose(scores(CLOZE, model=Shifted()), scores(CLOZE), rtol=1e-9)


# --- what is run


def test_the_prompt_is_run_once_and_one_token_letters_need_nothing_else() -> None:
    model = FakeDecoder()
    scores(LETTER, words, model)
    assert model.calls == [len(words(LETTER.text))]

    model = FakeDecoder()
    scores(CLOZE, words, model)
    assert model.calls == [len(words(CLOZE.text)), 2, 2]  # the choices have 2, 1, 1 and 3 tokens, and none runs alone


def test_what_questions_share_is_run_once_until_another_subject_comes() -> None:
    other = Question("anatomy", "Where?", ("here", "there", "nowhere", "elsewhere"), 0)
    ask = asker("five-shot", {QUESTION.subject: [QUESTION] * 5, "anatomy": [other] * 5})
    model = FakeDecoder()
    scorer = Scorer(words, model, 10_000)
    for question in (QUESTION, QUESTION, other, other):
        np.testing.assert_array_equal(scorer.scores(ask(question)), scores(ask(question), words))
    prefixes, rests = ([len(words(getattr(ask(q), part))) for q in (QUESTION, other)] for part in ("shared", "own"))
    assert model.calls == [prefixes[0], rests[0], rests[0], prefixes[1], rests[1], rests[1]]


def test_a_question_whose_beginning_merges_with_the_examples_is_run_as_a_whole() -> None:
    """This tokenizer joins the last example's letter with the newlines after it where "What" follows."""

    def merging(text: str) -> list[int]:
        return encode(text.replace("B\n\nWhat is heavy", "\x01"))

    model = FakeDecoder()
    scorer = Scorer(merging, model, 10_000)
    plain = asker("five-shot", EXAMPLES)(Question(QUESTION.subject, "Is it?", ("a", "b", "c", "d"), 0))
    scorer.scores(plain)
    model.calls.clear()
    got = scorer.scores(FIVE_SHOT)
    assert sum(model.calls[:-4]) >= len(merging(FIVE_SHOT.text))
    expected = [whole_sequence_score(merging(FIVE_SHOT.text), encode(f" {letter}")) for letter in "ABCD"]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    model.calls.clear()
    scorer.scores(plain)
    assert model.calls[0] == len(encode(plain.own))  # the examples' state is still there


class Rows:
    """Equal logits for everything; only how many tokens were run at once is of interest."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def run(self, ids: Sequence[int], past: object | None = None) -> tuple[np.ndarray, object]:
        self.calls.append(len(ids))
        return np.zeros((len(ids), 256), np.float32), past


def test_no_row_is_computed_alone_and_no_run_is_longer_than_a_chunk() -> None:
    """Neither a token by itself nor the last of a block of 128 and one."""
    for length in range(2, 2 * CHUNK + 3):
        model = Rows()
        Scorer(encode, model, 10_000).scores(Prompt("", "x" * length, ("A", "BB", "CCC", "D" * 130)))
        assert max(model.calls) <= CHUNK
        assert all(count % 128 != 1 for count in model.calls)


TINY = Case(CASES["llama-tied"].config | {"max_position_embeddings": 2048}, "llama")


@pytest.mark.parametrize("variant", [None, "q4", "q4_kv8"])
def test_scores_of_a_real_model_are_the_same_with_and_without_reuse(tmp_path: Path, variant: str | None) -> None:
    """Also for prompts of 128·k + 1 tokens, whose last row would be computed alone."""
    exported = export(make_checkpoint(tmp_path / "checkpoint", TINY), context=2048)
    path = exported.folder / "model.onnx"
    if variant:
        channels = exported.architecture.cache_channels
        names = [f"layers.{layer}.{part}" for layer in range(exported.architecture.layers) for part in ("key", "value")]
        ranges = dict.fromkeys(names, np.full(channels, 8, np.float32))
        exported.write(load_recipe(variant), tmp_path / variant, part_bytes=1 << 20, ranges=ranges)
        path = tmp_path / variant / "tiny.onnx"
    decoder = OnnxDecoder(path)
    scorer = Scorer(encode, decoder, 2048)
    least = len(encode(asker("five-shot", EXAMPLES)(replace(QUESTION, question="")).text))
    for extra in (0, 40, 1 - least % 128 + 128):
        prompt = asker("five-shot", EXAMPLES)(replace(QUESTION, question="y" * extra))
        whole = Scorer(encode, decoder, 2048).scores(replace(prompt, shared="", own=prompt.text))
        np.testing.assert_allclose(scorer.scores(prompt), whole, rtol=0, atol=1e-5)


# --- errors


class Broken:
    def __init__(self, value: float, rows: int = 0, vocabulary: int = VOCABULARY) -> None:
        self.value, self.rows, self.vocabulary = value, rows, vocabulary

    def run(self, ids: Sequence[int], past: object | None = None) -> tuple[np.ndarray, object]:
        return np.full((self.rows or len(ids), self.vocabulary), self.value, np.float32), past


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Broken(float("nan")), "not finite"),
        (Broken(float("inf")), "not finite"),
        (Broken(0.0, rows=3), "shape"),
        (Broken(0.0, vocabulary=40), "token id"),
    ],
)
def test_a_broken_model_is_an_error_and_not_a_score(model: Broken, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        scores(CLOZE, model=model)


def test_a_tokenizer_that_drops_the_answer_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"nothing to score .*What is heavy\?"):
        scores(CLOZE, lambda text: encode(text)[:20])


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    tokens = len(encode(FIVE_SHOT.text)) + 2
    Scorer(encode, FakeDecoder(), tokens).scores(FIVE_SHOT)
    with pytest.raises(EvaluationError, match=f"needs {tokens:,} tokens .* context is {tokens - 1:,}.*mmlu_mode"):
        Scorer(encode, FakeDecoder(), tokens - 1).scores(FIVE_SHOT)


# --- names of items


def test_items_are_named_by_what_is_asked_and_not_by_where_it_stands() -> None:
    questions = [QUESTION, Question("s", "q", ("a", "b", "c", "d"), 0)]
    prompts = [asker("letter")(question) for question in questions]
    names = item_names(questions, prompts)
    assert item_names(questions[::-1], prompts[::-1]) == names[::-1]
    assert item_names(questions[:1], prompts[:1]) == names[:1]
    assert item_names(questions[:1], [CLOZE]) != names[:1]
    assert item_names([Question("s", "q", ("a", "b", "c", "d"), 1)], prompts[1:]) != names[1:]


def test_a_question_that_occurs_twice_has_two_names() -> None:
    names = item_names([QUESTION] * 3, [LETTER] * 3)
    assert len(set(names)) == 3
    assert item_names([QUESTION], [LETTER]) == names[:1]
