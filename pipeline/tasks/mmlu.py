"""MMLU: log-likelihoods of the four answers of every question of the subset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipeline.calibrate.texts import dataset, encoder
from pipeline.config.models import ModelConfig
from pipeline.config.typed_yaml import Frozen
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.runtime.chat import has_thought, read_template, without_thought
from pipeline.tasks import mmlu_questions as mmlu
from pipeline.tasks import task
from pipeline.tasks.mmlu_scoring import Scorer, item_names
from pipeline.tasks.statistics import LOOKS, MmluAnswers, summarise_mmlu
from pipeline.tasks.subject import CHUNK, Decoder, Subject, fill
from pipeline.tasks.task import percent, share

ITEMS = "mmlu.jsonl"
TOKENS = {"five-shot": 97, "letter": 111, "chat": 124, "cloze": 95}
"""Mean tokens of a question: prompt without examples, and in cloze mode the four answers (SmolLM2, 570 questions)."""
EXAMPLES = {"five-shot": 512}
"""Mean tokens of a subject's examples, which are read once."""
LONGEST = {"five-shot": 3146, "letter": 1004, "chat": 1017, "cloze": 979}
"""Tokens of the longest prompt (with the development split's examples; without any, of 2,850 questions)."""


class MmluConfig(Frozen):
    """MMLU subset: `questions` stratified over the 57 subjects, and what five-shot prompts show before each."""

    questions: int = Field(ge=2, le=14_042)
    most: int | None = Field(
        default=None, le=14_042, description="questions that a variant is asked at most, while looks do not decide"
    )
    seed: int = 0
    exemplars: Literal["held-out", "dev"] = Field(
        default="held-out",
        description="held-out: test questions that are never asked; dev: the official development split, from the Hub",
    )

    @property
    def shallow(self) -> str:
        """Why no real model may be asked so little; "" where it may."""
        least = mmlu.SUBJECTS
        return "" if self.questions >= least else f"mmlu: {self.questions} questions, and one a subject is {least}"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`mmlu` metrics. Items (number, subject, answer, scores [4], correct) by name lie in `folder`.

    `number` counts the questions of the subset; they are asked subject by subject: each one's examples are read once.
    """
    wanted = subject.wanted
    split = mmlu.load_questions(dataset("mmlu", subject.store))
    questions = mmlu.subset(split, wanted.questions, wanted.seed)
    ask, conditions = _asker(subject, split)
    prompts = [ask(question) for question in questions]
    names, journal = item_names(questions, prompts), Journal(folder / ITEMS)
    asked = {name: (number, questions[number], prompts[number]) for number, name in enumerate(names)}
    order = sorted(names, key=lambda name: asked[name][1].subject)
    encode = encoder(subject.folder)

    def items(decoder: Decoder, left: Iterable[str]) -> Iterator[dict[str, Any]]:
        scorer = Scorer(encode, decoder, subject.entry.context)
        for number, question, prompt in (asked[name] for name in left):
            scores = scorer.scores(prompt)
            right = bool(scores.argmax() == question.answer)
            about = {"number": number, "subject": question.subject}
            yield about | {"scores": scores.tolist(), "answer": question.answer, "correct": right}

    def answer(left: Sequence[str]) -> Iterator[dict[str, Any]]:
        subject.prepare(lambda stand_in: list(items(stand_in, left)))
        return items(subject.decoder, left)

    fill(journal, order, f"MMLU {subject.name}", "questions", answer, subject.engine, layered=subject.layered)
    journal.arrange(names)
    reference = _answers(Journal(subject.reference / ITEMS), names) if subject.reference else None
    return summarise_mmlu(_answers(journal, names), reference, subject.entry.mmlu_mode) | conditions


def _asker(subject: Subject, split: Sequence[mmlu.Question]) -> tuple[mmlu.Asker, dict[str, str]]:
    """How the model's mode asks, and what the metrics say about it besides the mode."""
    mode, wanted = subject.entry.mmlu_mode, subject.wanted
    if mode == "five-shot":
        if wanted.exemplars == "dev":
            examples = mmlu.by_subject(mmlu.load_questions(dataset("mmlu-dev", subject.store), "dev"))
        else:
            examples = mmlu.held_out_examples(split, wanted.questions, wanted.seed)
        return mmlu.asker(mode, examples), {"exemplars": wanted.exemplars}
    if mode == "chat":
        template, thinks = read_template(subject.folder), subject.entry.mmlu_close_think
        ask = mmlu.asker(mode, render=lambda *messages: without_thought(template(*messages), thinks))
        return ask, {"think": "closed" if has_thought(ask(split[0]).text) else "none"}
    return mmlu.asker(mode), {}


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
    return MmluAnswers(correct, scores, np.array([item["answer"] for item in items], np.int64))


def _stops(part: MmluConfig) -> tuple[int, ...]:
    """The number of questions to begin with, and the looks after it that the suite allows."""
    return part.questions, *(look for look in LOOKS if part.questions < look <= (part.most or 0))


def _cost(part: MmluConfig, entry: ModelConfig) -> task.Cost:
    """All questions that may be asked. The longest prompt's keys and values are held twice: before a question and
    after it."""
    mode = entry.mmlu_mode
    read = _stops(part)[-1] * TOKENS[mode] + mmlu.SUBJECTS * EXAMPLES.get(mode, 0)
    return task.Cost(read=read, window=CHUNK, cached=2 * LONGEST[mode])


def _conditions(section: task.Metrics) -> str:
    said = [f"{key} {section[key]}" for key in ("exemplars", "think") if key in section]
    asked = ", ".join([section.get("mode", "unknown"), *said])
    return f"MMLU questions asked in mode {asked} (chance {100 * section.get('chance', 0.25):.0f} %)"


_LEGEND = (
    "MMLU with a margin is judged at looks, which share an error of 5 % (a group-sequential test): its interval holds "
    "at all looks together and is wider than one look's alone. The graded drop counts near misses by degrees, which "
    "decides with fewer questions; the drop in accuracy beside it can only refuse."
)

TASK = task.Task(
    name="mmlu",
    title="MMLU",
    place=2,
    measure=measure,
    config=MmluConfig,
    counted=("questions", "most"),
    stops=_stops,
    runs_graph=True,
    unit="questions",
    datasets=lambda part: ("mmlu", *["mmlu-dev"] * (part.exemplars == "dev")),
    texts=lambda part, store: [("mmlu", [item.text for item in mmlu.load_questions(dataset("mmlu", store))])],
    cost=_cost,
    asks=lambda part: (
        f"{' to '.join(f'{n:,}' for n in dict.fromkeys((part.questions, _stops(part)[-1])))} MMLU questions"
    ),
    pairing=task.items_of("accuracy"),
    gates=(
        judged := task.margin_gate("mmlu", task.LOOKS, "accuracy", "MMLU graded drop"),
        replace(judged, name="mmlu_accuracy", kind=task.VETO, title="MMLU drop", allowed=None),
    ),
    columns=(task.interval_column("MMLU", "accuracy", share, percent, n=True),),
    conditions=_conditions,
    measures=(
        task.Measure("accuracy", "MMLU accuracy", "share", "accuracy"),
        task.Measure("drop_points", "MMLU drop", "percentage points"),
    ),
    detail=lambda section, texts: f"MMLU, mode {section.get('mode')}, {section.get('n')} questions",
    dataset=("MMLU", "cais/mmlu"),
    legend=_LEGEND,
)
