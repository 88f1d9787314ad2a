"""MMLU's questions: both spellings of the published splits, nested subsets, and examples that are never asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.errors import EvaluationError
from pipeline.tasks.mmlu_questions import (
    QUESTIONS,
    SHOTS,
    SUBJECTS,
    Question,
    asker,
    by_subject,
    held_out_examples,
    load_questions,
    subset,
)

# --- questions


def item(subject: int, number: int) -> dict[str, str]:
    choices = {f"answer_{letter}": f"choice {letter}" for letter in "abcd"}
    text = f"question {number} of subject {subject}"
    return {"topic": f"subject_{subject}", "question": text, "correct_answer": "ABCD"[number % 4], **choices}


def header_row() -> dict[str, str]:
    row = item(0, 0)
    return {key: key for key in row} | {"topic": row["topic"], "correct_answer": "answer"}


def complete_split() -> list[dict[str, str]]:
    each, rest = divmod(QUESTIONS["test"], SUBJECTS)
    return [item(s, i) for s in range(SUBJECTS) for i in range(each + (s < rest))]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_load_drops_the_two_header_rows(tmp_path: Path) -> None:
    rows = complete_split()
    questions = load_questions(write(tmp_path / "q", [*rows[:500], header_row(), *rows[500:], header_row()]))
    assert len(questions) == QUESTIONS["test"]
    choices = ("choice a", "choice b", "choice c", "choice d")
    assert questions[5] == Question("subject 0", "question 5 of subject 0", choices, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "row 3 is not an MMLU question"),
        ("[1, 2]", "row 3 is not"),
        ({"question": "only"}, "row 3 is not"),
        (item(0, 0) | {"correct_answer": "E"}, "'E'"),
        (item(0, 0) | {"correct_answer": "AB"}, "'AB'"),
        (item(0, 0) | {"answer_c": "  "}, "not empty"),
        (item(0, 0) | {"question": 7}, "row 3"),
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


def hub_rows(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """The same questions as the Hub's Parquet spells them."""
    return [
        {
            "question": row["question"],
            "subject": row["topic"],
            "choices": [row[f"answer_{letter}"] for letter in "abcd"],
            "answer": "ABCD".index(row["correct_answer"]),
        }
        for row in rows
    ]


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_both_spellings_of_a_split_are_the_same_questions(tmp_path: Path) -> None:
    rows = complete_split()
    lines = load_questions(write(tmp_path / "lines", rows))
    assert load_questions(write_parquet(tmp_path / "parquet", hub_rows(rows))) == lines


def test_the_development_split_has_five_examples_a_subject(tmp_path: Path) -> None:
    rows = [item(s, i) for s in range(SUBJECTS) for i in range(SHOTS)]
    path = write_parquet(tmp_path / "dev", hub_rows(rows))
    examples = by_subject(load_questions(path, "dev"))
    assert [question.question for question in examples["subject 3"]] == [f"question {i} of subject 3" for i in range(5)]
    assert {len(shown) for shown in examples.values()} == {SHOTS}
    with pytest.raises(EvaluationError, match=r"285 questions in 57 subjects; the MMLU test split has 14,042"):
        load_questions(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, "it has 4"),
        ({"answer": -1}, "it has -1"),
        ({"choices": ["a", "b", "c"]}, "four choices"),
        ({"choices": None}, "row 1 is not"),
        ({"question": None}, "row 1: an MMLU question needs"),
    ],
)
def test_malformed_parquet_rows_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    row = hub_rows([item(0, 0)])[0] | changes
    with pytest.raises(EvaluationError, match=message):
        load_questions(write_parquet(tmp_path / "q", [row]))


def test_damaged_parquet_is_an_error_in_words(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "q", hub_rows([item(0, 0)]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EvaluationError, match="cannot be read as Parquet"):
        load_questions(path)


def test_the_real_split_loads(mmlu_path: Path) -> None:
    questions = load_questions(mmlu_path)
    assert len(questions) == QUESTIONS["test"]
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


# --- examples


def test_held_out_examples_are_never_asked_and_do_not_change_with_the_subset(mmlu_path: Path) -> None:
    questions = load_questions(mmlu_path)
    examples = held_out_examples(questions, 2850, seed=0)
    assert len(examples) == SUBJECTS and {len(shown) for shown in examples.values()} == {SHOTS}
    assert all(question.subject == subject for subject, shown in examples.items() for question in shown)
    shown = {question.question for questions in examples.values() for question in questions}
    assert not shown & {question.question for question in subset(questions, 2850, seed=0)}
    assert held_out_examples(questions, 570, seed=0) == examples
    assert held_out_examples(questions, 570, seed=1) != examples


def distinct(per_subject: int, subjects: int) -> list[Question]:
    return [
        Question(f"s{s}", f"q{s}-{i}", ("a", "b", "c", "d"), 0) for s in range(subjects) for i in range(per_subject)
    ]


def test_examples_whose_text_is_asked_elsewhere_are_passed_over() -> None:
    questions = distinct(20, subjects=2)
    last = subset(questions, len(questions), seed=0)[-1]
    assert last in held_out_examples(questions, 2, seed=0)[last.subject]
    twin = Question({"s0": "s1", "s1": "s0"}[last.subject], last.question, last.choices, 0)
    shown = held_out_examples([*questions, twin], 2, seed=0)
    assert last not in shown[last.subject]
    assert len(shown[last.subject]) == SHOTS


def test_a_subset_without_room_for_examples_is_refused_with_the_largest_that_has_it() -> None:
    questions = distinct(20, subjects=5)
    assert held_out_examples(questions, 75, seed=0)
    with pytest.raises(EvaluationError, match=r"76 MMLU questions leave no 5 .* up to 75 do.*exemplars: dev"):
        held_out_examples(questions, 76, seed=0)


# --- prompts, to the byte, against the format that lm-evaluation-harness describes

QUESTION = Question("high school physics", " What is heavy? ", ("a feather", "lead", "air", "a long train"), 1)
SHOWN = [
    Question("high school physics", f"Is {i} > 3?\n", (f"{i}", "yes", "no", "it depends"), i % 4) for i in range(5)
]


def test_letter() -> None:
    prompt = asker("letter")(QUESTION)
    assert prompt.text == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What is heavy?\nA. a feather\nB. lead\nC. air\nD. a long train\nAnswer:"
    )
    assert prompt.answers == (" A", " B", " C", " D")
    assert not prompt.per_token


def test_cloze() -> None:
    prompt = asker("cloze")(QUESTION)
    assert prompt.text == (
        "The following are questions (with answers) about high school physics.\n\nQuestion: What is heavy?\nAnswer:"
    )
    assert prompt.answers == (" a feather", " lead", " air", " a long train")
    assert prompt.per_token


def test_five_shot() -> None:
    prompt = asker("five-shot", {"high school physics": SHOWN})(QUESTION)
    assert prompt.text == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Is 0 > 3?\nA. 0\nB. yes\nC. no\nD. it depends\nAnswer: A\n\n"
        "Is 1 > 3?\nA. 1\nB. yes\nC. no\nD. it depends\nAnswer: B\n\n"
        "Is 2 > 3?\nA. 2\nB. yes\nC. no\nD. it depends\nAnswer: C\n\n"
        "Is 3 > 3?\nA. 3\nB. yes\nC. no\nD. it depends\nAnswer: D\n\n"
        "Is 4 > 3?\nA. 4\nB. yes\nC. no\nD. it depends\nAnswer: A\n\n"
        "What is heavy?\nA. a feather\nB. lead\nC. air\nD. a long train\nAnswer:"
    )
    assert prompt.answers == (" A", " B", " C", " D")


def test_what_five_shot_questions_share_is_the_same_for_a_subject_and_ends_with_an_answer() -> None:
    ask = asker("five-shot", {"high school physics": SHOWN})
    first, second = ask(QUESTION), ask(Question("high school physics", "Other?", ("1", "2", "3", "4"), 0))
    assert first.shared == second.shared
    assert first.shared.endswith("Answer: A")


@pytest.mark.parametrize("shown", [{}, {"high school physics": SHOWN[:4]}])
def test_five_shot_without_five_examples_is_refused(shown: dict[str, list[Question]]) -> None:
    with pytest.raises(EvaluationError, match=r"there are [04] examples of 'high school physics'"):
        asker("five-shot", shown)(QUESTION)


def test_chat_is_the_model_s_template_around_description_and_question() -> None:
    prompt = asker("chat", render=lambda system, user: f"<s>{system}<u>{user}<a>")(QUESTION)
    assert prompt.text == (
        "<s>The following are multiple choice questions (with answers) about high school physics.\n\n"
        "<u>What is heavy?\nA. a feather\nB. lead\nC. air\nD. a long train\nAnswer:<a>"
    )
    assert prompt.answers == ("A", "B", "C", "D")
