"""MMLU: log-likelihoods of the four answers of every question of the subset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate import mmlu
from pipeline.evaluate.journal import Journal
from pipeline.evaluate.statistics import MmluAnswers, answer_probability, summarise_mmlu
from pipeline.progress import Progress
from pipeline.stages.texts import dataset, encoder
from pipeline.stages.validation.subject import Subject

ITEMS = "mmlu.jsonl"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`mmlu` metrics. Items (subject, answer, scores [4], correct) by the question's number lie in `folder`."""
    wanted, mode = subject.suite.mmlu, subject.entry.mmlu_mode
    questions = mmlu.subset(mmlu.load_questions(dataset("mmlu", subject.store)), wanted.questions, wanted.seed)
    encode, journal = encoder(subject.folder), Journal(folder / ITEMS)
    left = [question for index, question in enumerate(questions) if str(index) not in journal.items]
    subject.prepare(lambda decoder: mmlu.score(left, mode, encode, decoder))
    with Progress(f"MMLU {subject.name}", len(questions), "questions") as progress:
        for index, question in enumerate(questions):
            kept = str(index) in journal.items
            if not kept:
                result = mmlu.score([question], mode, encode, subject.decoder)
                item = {
                    "subject": question.subject,
                    "scores": result.choice_scores[0].tolist(),
                    "answer": question.answer,
                    "correct": bool(result.correct[0]),
                }
                journal.record(str(index), item)
            progress.advance(kept=kept)
    reference = subject.reference and _answers(Journal(subject.reference / ITEMS), len(questions))
    return summarise_mmlu(_answers(journal, len(questions)), reference, mode)


def _answers(journal: Journal, questions: int) -> MmluAnswers:
    items = [item for index in range(questions) if (item := journal.items.get(str(index)))]
    correct = np.array([item["correct"] for item in items], np.bool_)
    scores = np.array([item["scores"] for item in items], np.float64).reshape(-1, 4)
    return MmluAnswers(correct, answer_probability(scores, np.array([item["answer"] for item in items], np.int64)))
