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
    answers: tuple[str, str, str, str]
    per_token: bool = False

    @property
    def text(self) -> str:
        """All of it before the answer."""
        return self.shared + self.own


Asker = Callable[[Question], Prompt]


def asker(mode: Mode, examples: Examples | None = None, render: Render | None = None) -> Asker:
    """How `mode` asks: `five-shot` after `examples`, `chat` through `render`."""
    if mode == "five-shot" and examples is not None:
        return lambda question: _five_shot(question, examples)
    if mode == "chat" and render is not None:
        return lambda question: _chat(question, render)
    return _letter if mode == "letter" else _cloze


def _letter(question: Question) -> Prompt:
    return Prompt("", _header(question.subject) + _block(question), _letters(" "))


def _five_shot(question: Question, examples: Examples) -> Prompt:
    """The newlines after the examples are the question's own: GPT-2's tokenizer splits them by what follows."""
    shown = examples.get(question.subject, ())
    if len(shown) != SHOTS:
        raise EvaluationError(f"there are {len(shown)} examples of {question.subject!r}; five-shot MMLU needs {SHOTS}.")
    blocks = "\n\n".join(f"{_block(example)} {LETTERS[example.answer]}" for example in shown)
    return Prompt(_header(question.subject) + blocks, f"\n\n{_block(question)}", _letters(" "))


def _chat(question: Question, render: Render) -> Prompt:
    """The description is the system's message; the reply begins with the letter, without a space."""
    return Prompt("", render(_header(question.subject), _block(question)), _letters(""))


def _cloze(question: Question) -> Prompt:
    header = f"The following are questions (with answers) about {question.subject}.\n\n"
    first, second, third, fourth = (f" {choice}" for choice in question.choices)
    stem = f"{header}Question: {question.question.strip()}\nAnswer:"
    return Prompt("", stem, (first, second, third, fourth), per_token=True)


def _header(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _block(question: Question) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}\n{choices}Answer:"


def _letters(before: str) -> tuple[str, str, str, str]:
    return (f"{before}A", f"{before}B", f"{before}C", f"{before}D")
