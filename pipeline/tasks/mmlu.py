"""MMLU: log-likelihoods of the four answers of every question of the subset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibrate.texts import dataset, encoder
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.progress import Progress
from pipeline.runtime.chat import has_thought, read_template, without_thought
from pipeline.tasks import mmlu_prompts
from pipeline.tasks import mmlu_questions as mmlu
from pipeline.tasks.mmlu_scoring import Decoder, Scorer, item_names
from pipeline.tasks.statistics import MmluAnswers, answer_probability, summarise_mmlu
from pipeline.tasks.subject import Subject

ITEMS = "mmlu.jsonl"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`mmlu` metrics. Items (number, subject, answer, scores [4], correct) by name lie in `folder`.

    `number` counts the questions of the subset; they are asked subject by subject: each one's examples are read once.
    """
    wanted, mode = subject.suite.mmlu, subject.entry.mmlu_mode
    split = mmlu.load_questions(dataset("mmlu", subject.store))
    questions = mmlu.subset(split, wanted.questions, wanted.seed)
    ask, conditions = _asker(subject, split)
    prompts = [ask(question) for question in questions]
    names, journal = item_names(questions, prompts), Journal(folder / ITEMS)
    left = sorted(
        (number for number, name in enumerate(names) if name not in journal.items),
        key=lambda number: (questions[number].subject, number),
    )
    encode = encoder(subject.folder)

    def scores(decoder: Decoder) -> Iterator[np.ndarray]:
        scorer = Scorer(encode, decoder, subject.entry.context)
        return (scorer.scores(prompts[number]) for number in left)

    subject.prepare(lambda stand_in: list(scores(stand_in)))
    with Progress(f"MMLU {subject.name}", len(questions), "questions") as progress:
        progress.advance(len(questions) - len(left), kept=True)
        for number, found in zip(left, scores(subject.decoder) if left else (), strict=True):
            journal.record(names[number], _item(number, questions[number], found))
            progress.advance()
    journal.arrange(names)
    reference = subject.reference and _answers(Journal(subject.reference / ITEMS), names)
    return summarise_mmlu(_answers(journal, names), reference, mode) | conditions


def _asker(subject: Subject, split: Sequence[mmlu.Question]) -> tuple[mmlu_prompts.Asker, dict[str, str]]:
    """How the model's mode asks, and what the metrics say about it besides the mode."""
    mode = subject.entry.mmlu_mode
    if mode == "five-shot":
        return mmlu_prompts.asker(mode, _examples(subject, split)), {"exemplars": subject.suite.mmlu.exemplars}
    if mode == "chat":
        template, thinks = read_template(subject.folder), subject.entry.mmlu_close_think
        ask = mmlu_prompts.asker(mode, render=lambda *messages: without_thought(template(*messages), thinks))
        return ask, {"think": "closed" if has_thought(ask(split[0]).text) else "none"}
    return mmlu_prompts.asker(mode), {}


def _examples(subject: Subject, split: Sequence[mmlu.Question]) -> mmlu.Examples:
    wanted = subject.suite.mmlu
    if wanted.exemplars == "dev":
        return mmlu.development_examples(mmlu.load_questions(dataset("mmlu-dev", subject.store), "dev"))
    return mmlu.held_out_examples(split, wanted.questions, wanted.seed)


def _item(number: int, question: mmlu.Question, scores: np.ndarray) -> dict[str, Any]:
    return {
        "number": number,
        "subject": question.subject,
        "scores": scores.tolist(),
        "answer": question.answer,
        "correct": bool(scores.argmax() == question.answer),
    }


def _answers(journal: Journal, names: Sequence[str]) -> MmluAnswers:
    """Answers in the order of `names`. Raises EvaluationError where the journal lacks one of them."""
    if missing := sum(name not in journal.items for name in names):
        raise EvaluationError(
            f"the reference lacks {missing:,} of {len(names):,} MMLU questions as they are asked here: it was measured "
            f"with another subset, mode, examples or template. Measure it again: python -m pipeline validate MODEL "
            f"reference."
        )
    items = [journal.items[name] for name in names]
    correct = np.array([item["correct"] for item in items], np.bool_)
    scores = np.array([item["scores"] for item in items], np.float64)
    return MmluAnswers(correct, answer_probability(scores, np.array([item["answer"] for item in items], np.int64)))
