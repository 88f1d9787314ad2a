"""HumanEval: solutions written through onnxruntime-genai, judged in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.confine.isolation import SAFE_LEVELS
from pipeline.journal import Journal
from pipeline.progress import Progress
from pipeline.runtime.chat import opens_thinking, without_thinking
from pipeline.runtime.generate import Limits, Sampling, Writer, derived_seed
from pipeline.tasks import humaneval_answers as answers
from pipeline.tasks.humaneval_judging import judge_all
from pipeline.tasks.humaneval_problems import Problem
from pipeline.tasks.solutions import ITEMS, name_of, problems_of
from pipeline.tasks.statistics import summarise_humaneval
from pipeline.tasks.subject import Subject

VERDICTS = "humaneval.jsonl"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`humaneval` metrics: `statistics.summarise_humaneval`, and how they came about.

    - `prompt`: "completion", "chat" or "thinking", as the model's entry says; `temperature` (0: greedy), `top_p`,
      `seed`; `answer_tokens`, `thinking_tokens`: the limits;
    - `cut_answers`, `cut_thinking`: solutions that met these limits, in the answer or still thinking;
    - `isolation`: the level that solutions ran at; `contained`: whether that level keeps hostile code in.

    Items lie in `folder`, by task id and sample: solutions (prompt, ids, text, cut) and verdicts (completion, correct,
    reason).
    """
    wanted, entry = subject.suite.humaneval, subject.entry
    problems = problems_of(subject)
    names = [[name_of(problem.task_id, sample) for sample in range(wanted.samples)] for problem in problems]
    solutions, verdicts = Journal(folder / ITEMS), Journal(folder / VERDICTS)
    _write(subject, problems, solutions)
    _judge(subject, problems, solutions, verdicts)
    cuts = [solutions.items[name]["cut"] for row in names for name in row]
    reference = subject.reference and _passed(Journal(subject.reference / VERDICTS), names)
    return {
        **summarise_humaneval(_passed(verdicts, names), reference, wanted.k),
        "prompt": entry.humaneval_prompt,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "seed": wanted.seed,
        "answer_tokens": wanted.answer_tokens(entry),
        "thinking_tokens": wanted.thinking_tokens(entry),
        "cut_answers": cuts.count("answer"),
        "cut_thinking": cuts.count("thinking"),
        "isolation": subject.isolation,
        "contained": subject.isolation in SAFE_LEVELS,
    }


def _passed(verdicts: Journal, names: Sequence[Sequence[str]]) -> np.ndarray:
    """bool [problems, samples], of the problems that were judged"""
    found = [[verdicts.items.get(name) for name in row] for row in names]
    return np.array([[item["correct"] for item in row] for row in found if all(row)], np.bool_)


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(subject: Subject, problems: Sequence[Problem], solutions: Journal) -> None:
    """Every solution that is not there yet, recorded as it is written."""
    wanted, entry = subject.suite.humaneval, subject.entry
    rows = [(name_of(problem.task_id, sample), problem) for problem in problems for sample in range(wanted.samples)]
    left = [row for row in rows if row[0] not in solutions.items]
    with Progress(f"HumanEval {subject.name}", len(rows), "solutions") as progress:
        progress.advance(len(rows) - len(left), kept=True)
        if not left:
            return
        writer = Writer(subject.folder)
        limits = Limits(wanted.answer_tokens(entry), wanted.thinking_tokens(entry))
        complete = answers.should_stop if entry.humaneval_prompt == "completion" else _never
        for name, problem in left:
            prompt, sampling = _prompt(subject, writer, problem), None
            if wanted.temperature:
                sampling = Sampling(wanted.temperature, wanted.top_p, derived_seed(wanted.seed, name))
            one = writer.continuation(prompt, limits, complete, sampling)
            solutions.record(name, {"prompt": prompt, "ids": list(one.ids), "text": one.text, "cut": one.cut})
            progress.advance()


def _prompt(subject: Subject, writer: Writer, problem: Problem) -> str:
    if subject.entry.humaneval_prompt == "completion":
        return answers.completion_prompt(problem)
    return writer.chat(answers.chat_request(problem))


def _never(_text: str) -> bool:
    """A chat answer ends where the model ends it: any code block may be followed by a better one."""
    return False


# --- judging ---------------------------------------------------------------------------------------------------------


def _judge(subject: Subject, problems: Sequence[Problem], solutions: Journal, verdicts: Journal) -> None:
    """A verdict for every solution that has none yet, recorded as it falls."""
    wanted = subject.suite.humaneval
    rows = [(problem, sample) for problem in problems for sample in range(wanted.samples)]
    left = {
        name: (problem, _completion(subject, problem, solutions.items[name]))
        for problem, sample in rows
        if (name := name_of(problem.task_id, sample)) not in verdicts.items
    }
    with Progress(f"judging {subject.name}", len(rows), "solutions") as progress:
        progress.advance(len(rows) - len(left), kept=True)
        outcomes = judge_all(list(left.values()), wanted.timeout_seconds, subject.isolation)
        for (name, (_, completion)), outcome in zip(left.items(), outcomes, strict=True):
            verdicts.record(name, {"completion": completion, "correct": outcome.passed, "reason": outcome.reason})
            progress.advance()


def _completion(subject: Subject, problem: Problem, item: Mapping[str, Any]) -> str:
    if subject.entry.humaneval_prompt == "completion":
        return answers.extract_completion(item["text"])
    text = item["text"]
    if subject.entry.humaneval_prompt == "thinking":
        text = without_thinking(text, opens_thinking(item["prompt"]))
    return answers.extract_answer(problem, text)
