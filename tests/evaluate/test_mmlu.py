"""MMLU: questions, nested subsets, prompts, and scoring checked against scoring whole sequences."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluate.mmlu import QUESTIONS, SUBJECTS, Mode, Question, load_questions, prompt, score, subset

VOCABULARY = 300
QUESTION = Question("high school physics", " What is heavy? ", ("a feather", "lead", "air", "a long train"), 1)


def encode(text: str) -> list[int]:
    """One token per UTF-8 byte."""
    return list(text.encode())


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


def whole_sequence_score(context: list[int], answer: list[int]) -> float:
    """Σ log p(answer token | everything before), each position computed from the full sequence, without a state."""
    total = 0.0
    for index, token in enumerate(answer):
        row = logits_after(context + answer[:index]).astype(np.float64)
        total += row[token] - math.log(np.exp(row).sum())
    return total


# --- scoring


def test_cloze_scores_equal_scoring_each_whole_sequence_per_token() -> None:
    result = score([QUESTION], "cloze", encode, FakeDecoder())
    context = encode(prompt(QUESTION, "cloze"))
    expected = []
    for choice in QUESTION.choices:
        answer = encode(" " + choice)
        expected.append(whole_sequence_score(context, answer) / len(answer))
    np.testing.assert_allclose(result.choice_scores, [expected], rtol=1e-12)


def test_letter_scores_equal_scoring_each_whole_sequence() -> None:
    result = score([QUESTION], "letter", encode, FakeDecoder())
    context = encode(prompt(QUESTION, "letter"))
    expected = [whole_sequence_score(context, encode(f" {letter}")) for letter in "ABCD"]
    np.testing.assert_allclose(result.choice_scores, [expected], rtol=1e-12)


def words(text: str) -> list[int]:
    """One token per word, a leading space belonging to it, as in byte-level BPE."""
    return [len(word) + 31 * ord(word[0]) % 250 for word in text.replace("\n", " ").split(" ") if word]


def test_the_prompt_is_run_once_and_one_token_letters_need_nothing_else() -> None:
    model = FakeDecoder()
    score([QUESTION], "letter", words, model)
    assert model.calls == [len(words(prompt(QUESTION, "letter")))]

    model = FakeDecoder()
    score([QUESTION], "cloze", words, model)
    assert model.calls == [len(words(prompt(QUESTION, "cloze"))), 1, 2]  # the choices have 2, 1, 1 and 3 tokens


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

    item = Question("s", "q", ("two", "one one", "three", "one"), 3)
    result = score([item, Question("s", "q", item.choices, 1)], "cloze", encode_table, Bigram(table))
    expected = [math.log(1 / 4), (math.log(1 / 2) + math.log(1 / 8)) / 2, math.log(1 / 8), math.log(1 / 2)]
    np.testing.assert_allclose(result.choice_scores, [expected, expected], rtol=1e-6)
    assert result.predicted.tolist() == [3, 3]
    assert result.correct.tolist() == [True, False]


def test_tokens_merged_across_the_boundary_are_scored_with_the_answer() -> None:
    """This tokenizer joins ": l" into one token, so only that answer's sequence does not start with the prompt's."""

    def merging(text: str) -> list[int]:
        return encode(text.replace(": l", "\x01"))

    result = score([QUESTION], "cloze", merging, FakeDecoder())
    context = merging(prompt(QUESTION, "cloze"))[:-1]  # without the ":" that may merge
    for index, choice in enumerate(QUESTION.choices):
        answer = merging(prompt(QUESTION, "cloze") + " " + choice)[len(context) :]
        assert answer[0] == (1 if choice == "lead" else ord(":"))
        expected = whole_sequence_score(context, answer) / len(answer)
        assert result.choice_scores[0, index] == pytest.approx(expected, rel=1e-12)


def test_logits_of_any_offset_give_the_same_scores() -> None:
    class Shifted(FakeDecoder):
        def run(self, ids: Sequence[int], past: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
            logits, state = super().run(ids, past)
            return logits.astype(np.float64) + 5000.0, state

    plain = score([QUESTION], "cloze", encode, FakeDecoder()).choice_scores
    np.testing.assert_allclose(score([QUESTION], "cloze", encode, Shifted()).choice_scores, plain, rtol=1e-9)


def test_progress_is_reported_per_question() -> None:
    seen: list[tuple[int, int]] = []
    score([QUESTION] * 3, "letter", words, FakeDecoder(), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


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
        score([QUESTION], "cloze", encode, model)


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(EvaluationError, match="empty choice"):
        score([Question("s", "q", ("a", " ", "c", "d"), 0)], "cloze", encode, FakeDecoder())


def test_a_tokenizer_that_drops_the_answer_is_refused() -> None:
    with pytest.raises(EvaluationError, match="nothing to score"):
        score([QUESTION], "cloze", lambda text: encode(text)[:20], FakeDecoder())


# --- prompts


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (
            "letter",
            "The following are multiple choice questions (with answers) about high school physics.\n\n"
            "What is heavy?\nA. a feather\nB. lead\nC. air\nD. a long train\nAnswer:",
        ),
        (
            "cloze",
            "The following are questions (with answers) about high school physics.\n\n"
            "Question: What is heavy?\nAnswer:",
        ),
    ],
)
def test_prompts_are_the_harness_s(mode: Mode, expected: str) -> None:
    assert prompt(QUESTION, mode) == expected


# --- questions


def item(subject: int, number: int) -> dict[str, str]:
    choices = {f"answer_{letter}": f"choice {letter}" for letter in "abcd"}
    text = f"question {number} of subject {subject}"
    return {"topic": f"subject_{subject}", "question": text, "correct_answer": "ABCD"[number % 4], **choices}


def header_row() -> dict[str, str]:
    row = item(0, 0)
    return {key: key for key in row} | {"topic": row["topic"], "correct_answer": "answer"}


def complete_split() -> list[dict[str, str]]:
    each, rest = divmod(QUESTIONS, SUBJECTS)
    return [item(s, i) for s in range(SUBJECTS) for i in range(each + (s < rest))]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_load_drops_the_two_header_rows(tmp_path: Path) -> None:
    rows = complete_split()
    questions = load_questions(write(tmp_path / "q", [*rows[:500], header_row(), *rows[500:], header_row()]))
    assert len(questions) == QUESTIONS
    choices = ("choice a", "choice b", "choice c", "choice d")
    assert questions[5] == Question("subject 0", "question 5 of subject 0", choices, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 3 is not an MMLU question"),
        ("[1, 2]", "line 3 is not"),
        ({"question": "only"}, "line 3 is not"),
        (item(0, 0) | {"correct_answer": "E"}, "'E'"),
        (item(0, 0) | {"correct_answer": "AB"}, "'AB'"),
        (item(0, 0) | {"answer_c": "  "}, "not empty"),
        (item(0, 0) | {"question": 7}, "line 3"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_questions(write(tmp_path / "q", [item(0, 0), item(0, 1), row]))


def test_an_incomplete_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"14,041 questions in 57 subjects"):
        load_questions(write(tmp_path / "q", complete_split()[1:]))
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_questions(tmp_path / "absent")


def test_the_real_split_loads(mmlu_path: Path) -> None:
    questions = load_questions(mmlu_path)
    assert len(questions) == QUESTIONS
    counts = Counter(question.subject for question in subset(questions, SUBJECTS * 10, seed=0))
    assert set(counts.values()) == {10}
    assert "us foreign policy" in counts


# --- subsets


def pool(per_subject: int = 20, subjects: int = 5) -> list[Question]:
    choices = ("a", "b", "c", "d")
    return [Question(f"s{s}", f"q{i}", choices, i % 4) for s in range(subjects) for i in range(per_subject + s)]


def test_subsets_are_nested_and_stratified() -> None:
    questions = pool()
    largest = subset(questions, len(questions), seed=3)
    assert Counter(largest) == Counter(questions)
    for n in range(1, len(questions) + 1):
        assert subset(questions, n, seed=3) == largest[:n]
    for k in (1, 7, 20):
        assert set(Counter(q.subject for q in largest[: 5 * k]).values()) == {k}


def test_a_subset_depends_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    questions = pool()
    assert subset(questions, 30, seed=0) == subset(questions[::-1], 30, seed=0)
    assert subset(questions, 30, seed=0) != subset(questions, 30, seed=1)


def test_a_subset_is_the_same_on_every_machine() -> None:
    """Pinned: if this list changes, results on subsets no longer compare with earlier releases."""
    chosen = [f"{q.subject} {q.question}" for q in subset(pool(), 6, seed=0)]
    assert chosen == ["s0 q18", "s3 q8", "s1 q9", "s4 q23", "s2 q21", "s1 q19"]


def test_repeated_questions_are_all_kept() -> None:
    questions = pool() + pool()
    assert Counter(subset(questions, len(questions), seed=0)) == Counter(questions)


@pytest.mark.parametrize("n", [0, -1, 111])
def test_impossible_subsets_are_refused(n: int) -> None:
    with pytest.raises(EvaluationError, match=f"subset of {n} questions"):
        subset(pool(), n, seed=0)
