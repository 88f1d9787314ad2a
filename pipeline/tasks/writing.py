"""Answers that a model writes, in memory or layer by layer, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.journal import Journal
from pipeline.runtime.chat import without_thought
from pipeline.runtime.generate import Complete, Limits, Request, Sampling, derived_seed
from pipeline.tasks.subject import Subject, fill
from pipeline.tasks.written import name_of


def _never(text: str) -> bool:
    """Of an answer that ends where the model ends it."""
    del text
    return False


def write(
    subject: Subject, title: str, requests: Mapping[str, str], journal: Journal, complete: Complete = _never
) -> None:
    """Every answer that is not in `journal` yet (prompt, ids, text, cut), recorded as it is written.

    Args:
        requests: by name, what a model goes on with, or is asked in a chat where its entry says so.
        complete: whether a completion, as far as it is written, needs no more. A chat answer ends where the model ends
            it: what it wrote may be followed by something better.
    """
    wanted, entry = subject.wanted, subject.entry
    named = {name_of(key, sample): text for key, text in requests.items() for sample in range(wanted.samples)}

    def items(left: Iterable[str]) -> Iterator[dict[str, Any]]:
        chats = entry.humaneval_prompt != "completion"
        limits = Limits(wanted.answer_tokens(entry), wanted.thinking_tokens(entry))
        asked: dict[str, Request] = {}
        for name in left:
            prompt, sampling = subject.writer.chat(named[name]) if chats else named[name], None
            if entry.humaneval_prompt == "closed":
                prompt = without_thought(prompt, True)
            if wanted.temperature:
                sampling = Sampling(wanted.temperature, wanted.top_p, derived_seed(wanted.seed, name))
            asked[name] = Request(prompt, limits, _never if chats else complete, sampling)
        for name, one in zip(asked, subject.writer.continuations(asked), strict=True):
            yield {"prompt": asked[name].prompt, "ids": list(one.ids), "text": one.text, "cut": one.cut}

    fill(journal, list(named), f"{title} {subject.name}", "answers", items, subject.engine, layered=subject.layered)
