"""HumanEval: solutions written through onnxruntime-genai, judged in the sandbox."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate import humaneval
from pipeline.evaluate.generate import Writer
from pipeline.evaluate.journal import Journal
from pipeline.evaluate.statistics import summarise_humaneval
from pipeline.progress import Progress
from pipeline.stages.texts import dataset
from pipeline.stages.validation.subject import Subject

ITEMS = "humaneval.jsonl"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`humaneval` metrics. Items (completion, correct, reason) by task id lie in `folder`."""
    wanted = subject.suite.humaneval
    problems = humaneval.spread(humaneval.load_problems(dataset("humaneval", subject.store)), wanted.problems)
    journal = Journal(folder / ITEMS)
    left = [problem for problem in problems if problem.task_id not in journal.items]
    with Progress(f"HumanEval {subject.name}", len(problems), "problems") as progress:
        progress.advance(len(problems) - len(left), kept=True)
        writer = Writer(subject.folder) if left else None
        prompts = [humaneval.completion_prompt(problem) for problem in left]
        for batch in writer.batches(prompts) if writer else ():
            texts = writer.continuations([prompts[row] for row in batch], wanted.max_new_tokens, humaneval.should_stop)
            pairs = [
                (left[row], humaneval.extract_completion(left[row], text))
                for row, text in zip(batch, texts, strict=True)
            ]
            for (problem, completion), outcome in zip(
                pairs, humaneval.judge_all(pairs, wanted.timeout_seconds), strict=True
            ):
                item = {"completion": completion, "correct": outcome.passed, **asdict(outcome)}
                journal.record(problem.task_id, item)
            progress.advance(len(batch))
    reference = subject.reference and _correct(Journal(subject.reference / ITEMS), problems)
    return summarise_humaneval(_correct(journal, problems), reference, subject.isolation)


def _correct(journal: Journal, problems: list[humaneval.Problem]) -> np.ndarray:
    return np.array([journal.items[problem.task_id]["correct"] for problem in problems], np.bool_)
