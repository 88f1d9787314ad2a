"""MMLU without a harness: questions, a nested subset, prompts, and four log-likelihoods per question.

Design:
- One prefill per question. Its state is reused for the four answers, and a one-token answer needs only its last logits.
- Prompts are those of lm-evaluation-harness (`mmlu` and `mmlu_continuation`, zero-shot), so that it can cross-check us.
- Two modes. `letter` compares " A" … " D" after the question with its choices: the official format, which needs a model
  able to follow it. `cloze` compares the choices' own text after the bare question, by log-likelihood **per token**:
  small models score above chance there and not with letters.
- Scores are kept, not only right or wrong: paired changes of a score are far more sensitive than accuracy.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.errors import EvaluationError

QUESTIONS = 14_042  # the official test split
SUBJECTS = 57
LETTERS = "ABCD"

Mode = Literal["cloze", "letter"]
Encode = Callable[[str], list[int]]
Progress = Callable[[int, int], None]
State = Any  # what a Decoder remembers of the tokens it was given; opaque, immutable, reusable


class Decoder(Protocol):
    """A causal language model with a reusable past."""

    def run(self, ids: Sequence[int], past: State | None = None) -> tuple[np.ndarray, State]:
        """Logits of `ids` after `past`, float32 [len(ids), vocabulary], and the state after them; `past` is kept."""
        ...


@dataclass(frozen=True)
class Question:
    """One item; `answer` is the index of the right choice, `subject` is spelt with spaces."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class MmluResult:
    """Per question, in the order given.

    choice_scores: float64 [n, 4], natural log-likelihood (letter: of the letter; cloze: mean per token of the choice).
    predicted: int64 [n], the choice with the highest score, the first of equals.
    correct: bool [n].
    """

    choice_scores: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray


# --- questions ------------------------------------------------------------------------------------------------------


def load_questions(path: Path) -> list[Question]:
    """The official test split from a JSON-lines file with question, answer_a … answer_d, correct_answer and topic.

    The published file has two header rows among its questions; they are dropped.

    Raises:
        EvaluationError: a row is malformed, or the split is not complete (14,042 questions, 57 subjects).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as MMLU questions: {error}.") from error
    rows = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    questions = [row for row in rows if row is not None]
    subjects = {question.subject for question in questions}
    if (len(questions), len(subjects)) != (QUESTIONS, SUBJECTS):
        raise EvaluationError(
            f"{path} holds {len(questions):,} questions in {len(subjects)} subjects; the MMLU test split has "
            f"{QUESTIONS:,} in {SUBJECTS}. Fetch the dataset again."
        )
    return questions


def _parse(path: Path, number: int, line: str) -> Question | None:
    """One row, or None for a header row."""
    try:
        row = json.loads(line)
        text = [row[key] for key in ("topic", "question", "answer_a", "answer_b", "answer_c", "answer_d")]
        letter = row["correct_answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} line {number} is not an MMLU question: {error!r}. Fetch it again.") from error
    if text[1] == "question" and letter == "answer":
        return None
    if not all(isinstance(value, str) and value.strip() for value in text) or letter not in tuple(LETTERS):
        raise EvaluationError(
            f"{path} line {number}: an MMLU question needs a subject, a question, four choices that are not empty and "
            f"an answer A to D (it has {letter!r}). Fetch it again."
        )
    subject, question, *choices = text
    return Question(subject.replace("_", " "), question, tuple(choices), LETTERS.index(letter))


def subset(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """`n` questions, stratified by subject and nested: `subset(q, m, s)[:n] == subset(q, n, s)` for n ≤ m.

    Each subject is shuffled, then subjects take turns, so n = 57·k holds k questions of every subject that has k.
    Order comes from SHA-256 of seed and text: the same on every machine and Python, whatever order the file has.
    """
    if not 0 < n <= len(questions):
        raise EvaluationError(f"an MMLU subset of {n} questions was asked for; there are {len(questions)}.")
    by_subject: dict[str, list[tuple[str, Question]]] = defaultdict(list)
    seen: dict[Question, int] = defaultdict(int)
    for question in questions:
        # A few questions occur twice; counting the occurrence makes one of them a defined first.
        key = _hash(seed, question.subject, question.question, *question.choices, question.answer, seen[question])
        seen[question] += 1
        by_subject[question.subject].append((key, question))
    turns = []
    for subject, items in by_subject.items():
        for turn, (_, question) in enumerate(sorted(items, key=lambda item: item[0])):
            turns.append((turn, _hash(seed, turn, subject), question))
    turns.sort(key=lambda item: item[:2])
    return [question for _, _, question in turns[:n]]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- prompts --------------------------------------------------------------------------------------------------------


def prompt(question: Question, mode: Mode) -> str:
    """The text before the answer, ending in "Answer:"."""
    stem = question.question.strip()
    if mode == "cloze":
        header = f"The following are questions (with answers) about {question.subject}.\n\n"
        return f"{header}Question: {stem}\nAnswer:"
    header = f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{header}{stem}\n{choices}Answer:"


def answers(question: Question, mode: Mode) -> tuple[str, ...]:
    """The four continuations of the prompt, each starting with the space that belongs to it."""
    return tuple(f" {text}" for text in (question.choices if mode == "cloze" else LETTERS))


# --- scoring --------------------------------------------------------------------------------------------------------


def score(
    questions: Sequence[Question], mode: Mode, encode: Encode, model: Decoder, progress: Progress | None = None
) -> MmluResult:
    """Log-likelihoods of the four answers of every question.

    `encode` maps text to token ids (with whatever start token the model wants). `progress(done, total)` is called after
    each question.

    Raises:
        EvaluationError: an answer is empty or adds no token, or the model's logits are misshapen or not finite.
    """
    scores = np.empty((len(questions), 4))
    for index, question in enumerate(questions):
        scores[index] = choice_scores(question, mode, encode, model)
        if progress is not None:
            progress(index + 1, len(questions))
    predicted = scores.argmax(axis=1)
    correct = predicted == np.array([question.answer for question in questions], dtype=np.int64)
    return MmluResult(scores, predicted, correct)


def choice_scores(question: Question, mode: Mode, encode: Encode, model: Decoder) -> np.ndarray:
    """float64 [4]: log-likelihood of each answer after the prompt; in cloze mode divided by its number of tokens."""
    before = prompt(question, mode)
    if not all(choice.strip() for choice in question.choices):
        raise EvaluationError(
            f"an MMLU question on {question.subject} has an empty choice: {question.question[:80]!r}."
        )
    sequences = [encode(before + answer) for answer in answers(question, mode)]
    # Usually the whole prompt. Where a tokenizer merges across the boundary, the tokens that changed are scored with
    # the answer, and all four answers start from the same context.
    context = encode(before)
    shared = min(_common_prefix(context, sequence) for sequence in sequences)
    if shared == 0 or any(len(sequence) == shared for sequence in sequences):
        raise EvaluationError(
            f"the tokenizer leaves nothing to condition on or nothing to score for an MMLU question on "
            f"{question.subject}: {question.question[:80]!r}. Check the checkpoint's tokenizer."
        )
    logits, state = _run(model, context[:shared], None)
    totals = []
    for sequence in sequences:
        targets = sequence[shared:]
        rows = logits[-1:]
        if len(targets) > 1:
            rows = np.concatenate([rows, _run(model, targets[:-1], state)[0]])
        log_likelihood = _log_likelihood(rows, targets)
        totals.append(log_likelihood / len(targets) if mode == "cloze" else log_likelihood)
    return np.array(totals)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _run(model: Decoder, ids: Sequence[int], past: State | None) -> tuple[np.ndarray, State]:
    logits, state = model.run(ids, past)
    if logits.ndim != 2 or logits.shape[0] != len(ids):
        raise EvaluationError(f"the model returned logits of shape {logits.shape} for {len(ids)} tokens.")
    return logits, state


def _log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Sum over positions of log softmax(logits)[target], in float64 (nats)."""
    vocabulary = logits.shape[1]
    if not all(0 <= target < vocabulary for target in targets):
        raise EvaluationError(f"the tokenizer gives token id {max(targets)}; the model's logits have {vocabulary}.")
    values = logits.astype(np.float64)
    if not np.isfinite(values).all():
        raise EvaluationError("the model's logits are not finite (overflow, or a damaged artifact).")
    top = values.max(axis=1)
    normaliser = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
    return float((values[np.arange(len(targets)), list(targets)] - normaliser).sum())
