"""MMLU's questions: the official splits, nested subsets, examples that come before a question, and what a model sees.

Source: Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding" (arXiv 2009.03300). The test split
comes from a wheel or, like the development split, from the Hub (`cais/mmlu`); both spellings of a row are read.

A question is asked in one of four modes; all but `chat` to the byte as lm-evaluation-harness has it:

- `five-shot`: the letters " A" … " D" after the subject's five examples and the question with its choices: the field's
  default, and what most published scores are.
- `letter`: the same without examples.
- `chat`: the letters as a chat model's whole reply, in the model's own template. A model that thinks first gets its
  think block closed and empty, or the letter would be scored where a thought begins.
- `cloze`: the choices' own text after the bare question, for models that do not follow letters yet: below about
  a billion parameters only this is above chance.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import EvaluationError
from pipeline.runtime.chat import Render

SUBJECTS = 57
SHOTS = 5
LETTERS = "ABCD"

Split = Literal["test", "dev"]
QUESTIONS: Mapping[Split, int] = {"test": 14_042, "dev": SHOTS * SUBJECTS}
Examples = Mapping[str, Sequence["Question"]]
"""The questions shown with their answers before a question, by subject."""


@dataclass(frozen=True)
class Question:
    """One item; `answer` is the index of the right choice, `subject` is spelt with spaces."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The question with its choices."""
        return " ".join((self.question, *self.choices))


def load_questions(path: Path, split: Split = "test") -> list[Question]:
    """An official split, in the file's order.

    Either JSON lines with topic, question, answer_a … answer_d and correct_answer (a letter), whose two header rows
    are dropped, or Parquet with subject, question, choices and answer (a number).

    Raises:
        EvaluationError: a row is malformed, or the split is not complete (14,042 or 285 questions, 57 subjects).
    """
    questions = []
    for number, row in enumerate(_rows(path), 1):
        try:
            subject, question, choices, answer = _published(json.loads(row) if isinstance(row, str) else row)
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"{path} row {number} is not an MMLU question: {error!r}. Fetch it again.") from error
        if question == "question" and answer == "answer":
            continue  # a header row
        filled = [isinstance(text, str) and text.strip() for text in (subject, question, *choices)]
        if len(filled) != 6 or not all(filled) or answer not in range(4):
            raise EvaluationError(
                f"{path} row {number}: an MMLU question needs a subject, a question, four choices that are not empty "
                f"and an answer A to D (it has {answer!r}). Fetch it again."
            )
        questions.append(Question(subject.replace("_", " "), question, tuple(choices), answer))
    subjects = {question.subject for question in questions}
    if (len(questions), len(subjects)) != (QUESTIONS[split], SUBJECTS):
        raise EvaluationError(
            f"{path} holds {len(questions):,} questions in {len(subjects)} subjects; the MMLU {split} split has "
            f"{QUESTIONS[split]:,} in {SUBJECTS}. Correct its entry in configs/datasets.yaml or fetch it again."
        )
    return questions


def _rows(path: Path) -> list[Any]:
    """Rows as they lie in the file: lines of JSON, or mappings. The store's files have no suffix: Parquet begins with
    PAR1."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    kind = "MMLU questions"
    try:
        content = path.read_bytes()
        if not content.startswith(b"PAR1"):
            return content.decode().splitlines()
        kind = "Parquet"
        return read_table(path).to_pylist()
    except (OSError, UnicodeDecodeError, ArrowException) as error:
        raise EvaluationError(f"{path} cannot be read as {kind}: {error}. Fetch it again.") from error


def _published(row: Any) -> tuple[Any, Any, list[Any], Any]:
    """Subject, question, choices and answer (0 … 3 where it is right) of a row in either spelling."""
    if "choices" in row:
        return row["subject"], row["question"], list(row["choices"]), row["answer"]
    choices = [row[f"answer_{letter.lower()}"] for letter in LETTERS]
    letter = row["correct_answer"]
    return row["topic"], row["question"], choices, LETTERS.index(letter) if letter in tuple(LETTERS) else letter


# --- subsets --------------------------------------------------------------------------------------------------------


def subset(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """`n` questions, stratified by subject and nested: `subset(q, m, s)[:n] == subset(q, n, s)` for n ≤ m.

    Each subject is shuffled, then subjects take turns, so n = 57·k holds k questions of every subject that has k.
    Order comes from SHA-256 of seed and text: the same on every machine and Python, whatever order the file has.
    """
    if not 0 < n <= len(questions):
        raise EvaluationError(f"an MMLU subset of {n} questions was asked for; there are {len(questions)}.")
    seen: Counter[Question] = Counter()
    keyed = []
    for question in questions:
        # A few questions occur twice; counting the occurrence makes one of them a defined first.
        key = _hash(seed, question.subject, question.question, *question.choices, question.answer, seen[question])
        seen[question] += 1
        keyed.append((key, question))
    shuffled = by_subject(question for _, question in sorted(keyed, key=lambda item: item[0]))
    turns = sorted(  # no two begin alike
        (turn, _hash(seed, turn, subject), question)
        for subject, own in shuffled.items()
        for turn, question in enumerate(own)
    )
    return [question for _, _, question in turns[:n]]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- examples -------------------------------------------------------------------------------------------------------


def by_subject(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Questions by subject, in their order: of the development split the examples of the published five-shot scores."""
    found: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        found[question.subject].append(question)
    return found


def held_out_examples(questions: Sequence[Question], n: int, seed: int) -> dict[str, list[Question]]:
    """Five questions of every subject that no subset up to `subset(questions, n, seed)` asks, nor their like.

    They are each subject's last in the order of subsets, whatever `n`: a larger subset is asked after the same ones.
    Questions whose text occurs twice in the split are passed over.

    Raises:
        EvaluationError: the subset is too large to leave them out.
    """
    order = subset(questions, len(questions), seed)
    occurrences = Counter(question.question for question in order)
    once = by_subject(question for question in reversed(order) if occurrences[question.question] == 1)
    examples = {subject: last[:SHOTS] for subject, last in once.items()}
    place = {question: index for index, question in enumerate(order)}
    largest = min(place[question] for shown in examples.values() for question in shown)
    if n > largest:
        raise EvaluationError(
            f"{n:,} MMLU questions leave no {SHOTS} of every subject to show as examples; up to {largest:,} do. Ask "
            f"fewer, or set `exemplars: dev` in configs/evaluation/ for the official development split, from the Hub."
        )
    return examples


# --- prompts ---------------------------------------------------------------------------------------------------------

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
