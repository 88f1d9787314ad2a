"""HumanEval: solutions written through onnxruntime-genai, judged in the sandbox."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.confine.isolation import SAFE_LEVELS
from pipeline.journal import Journal
from pipeline.progress import Progress
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
    """Every solution that is not there yet, recorded batch by batch."""
    wanted, entry = subject.suite.humaneval, subject.entry
    names = {name_of(problem.task_id, sample) for problem in problems for sample in range(wanted.samples)}
    with Progress(f"HumanEval {subject.name}", len(names), "solutions") as progress:
        progress.advance(len(names & solutions.items.keys()), kept=True)
        if names <= solutions.items.keys():
            return
        writer = Writer(subject.folder)
        limits = Limits(wanted.answer_tokens(entry), wanted.thinking_tokens(entry))
        prompts = {problem: _prompt(subject, writer, problem) for problem in problems}
        complete = answers.should_stop if entry.humaneval_prompt == "completion" else _never
        for rows, sampling in _batches(subject, writer, prompts, limits, solutions.items):
            texts = [prompts[problem] for problem, _ in rows]
            written = writer.continuations(texts, limits, complete, sampling)
            new = [
                (name, {"prompt": text, "ids": list(one.ids), "text": one.text, "cut": one.cut})
                for row, text, one in zip(rows, texts, written, strict=True)
                if (name := name_of(row[0].task_id, row[1])) not in solutions.items
            ]
            for name, item in new:
                solutions.record(name, item)
            progress.advance(len(new))


def _prompt(subject: Subject, writer: Writer, problem: Problem) -> str:
    if subject.entry.humaneval_prompt == "completion":
        return answers.completion_prompt(problem)
    return writer.chat(answers.chat_request(problem))


def _batches(
    subject: Subject, writer: Writer, prompts: Mapping[Problem, str], limits: Limits, done: Container[str]
) -> Iterator[tuple[list[tuple[Problem, int]], Sampling | None]]:
    """Rows (problem, sample) of each batch, and how to draw them.

    Greedy texts share batches as they come. Drawn ones depend on their batch: it holds samples of one problem, always
    the same, and is drawn again as a whole if a kill left any of it unrecorded.
    """
    wanted = subject.suite.humaneval
    if wanted.temperature == 0:
        left = [problem for problem in prompts if name_of(problem.task_id) not in done]
        for batch in writer.batches([prompts[problem] for problem in left], limits):
            yield [(left[row], 0) for row in batch], None
        return
    for problem, prompt in prompts.items():
        size = writer.rows(writer.tokens(prompt), limits)
        for first in range(0, wanted.samples, size):
            rows = [(problem, sample) for sample in range(first, min(first + size, wanted.samples))]
            if any(name_of(problem.task_id, sample) not in done for _, sample in rows):
                seed = derived_seed(wanted.seed, name_of(problem.task_id, first))
                yield rows, Sampling(wanted.temperature, wanted.top_p, seed)


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
        text = answers.without_thinking(text, answers.opens_thinking(item["prompt"]))
    return answers.extract_answer(problem, text)
