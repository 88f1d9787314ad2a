"""The text a model sees of an MMLU question, in four modes; all but `chat` to the byte as lm-evaluation-harness has it.

- `five-shot`: the letters " A" … " D" after the subject's five examples and the question with its choices: the field's
  default, and what most published scores are.
- `letter`: the same without examples.
- `chat`: the letters as a chat model's whole reply, in the model's own template. A model that thinks first gets its
  think block closed and empty, or the letter would be scored where a thought begins.
- `cloze`: the choices' own text after the bare question, for models that do not follow letters yet: below about
  a billion parameters only this is above chance.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import EvaluationError
from pipeline.runtime.chat import Render
from pipeline.tasks.mmlu_questions import LETTERS, SHOTS, Examples, Question

Mode = Literal["five-shot", "letter", "chat", "cloze"]


@dataclass(frozen=True)
class Prompt:
    """What is asked of one question.

    Attributes:
        shared: the beginning that many questions have in common, worth running once; may be empty.
        own: the rest, up to the answer.
        answers: the four continuations that are compared.
        per_token: whether an answer's log-likelihood is divided by its number of tokens.
    """

    shared: str
    own: str
    answers: tuple[str, ...]
    per_token: bool = False

    @property
    def text(self) -> str:
        """All of it before the answer."""
        return self.shared + self.own


Asker = Callable[[Question], Prompt]


def asker(mode: Mode, examples: Examples | None = None, render: Render = operator.add) -> Asker:
    """How `mode` asks: `five-shot` after `examples`, `chat` through `render`.

    In chat the description is the system's message, and the reply begins with the letter, without a space.
    """

    def ask(question: Question) -> Prompt:
        if mode == "cloze":
            header = f"The following are questions (with answers) about {question.subject}.\n\n"
            stem = f"{header}Question: {question.question.strip()}\nAnswer:"
            return Prompt("", stem, tuple(f" {choice}" for choice in question.choices), per_token=True)
        header = f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"
        letters = tuple(LETTERS if mode == "chat" else (f" {letter}" for letter in LETTERS))
        if mode != "five-shot":
            return Prompt("", render(header, _block(question)), letters)
        shown = (examples or {}).get(question.subject, ())
        if len(shown) != SHOTS:
            raise EvaluationError(
                f"there are {len(shown)} examples of {question.subject!r}; five-shot MMLU needs {SHOTS}."
            )
        blocks = "\n\n".join(f"{_block(example)} {LETTERS[example.answer]}" for example in shown)
        # The newlines after the examples are the question's own: GPT-2's tokenizer splits them by what follows.
        return Prompt(header + blocks, f"\n\n{_block(question)}", letters)

    return ask


def _block(question: Question) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}\n{choices}Answer:"
