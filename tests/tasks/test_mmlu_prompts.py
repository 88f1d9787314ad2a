"""MMLU prompts, to the byte, against the format that lm-evaluation-harness describes."""

from __future__ import annotations

import pytest

from pipeline.errors import EvaluationError
from pipeline.tasks.mmlu_prompts import asker
from pipeline.tasks.mmlu_questions import Question

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
