"""Answers written through onnxruntime-genai, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.journal import Journal
from pipeline.progress import Progress
from pipeline.runtime.generate import Limits, Sampling, Writer, derived_seed
from pipeline.tasks.subject import Subject
from pipeline.tasks.written import name_of


def write(
    subject: Subject,
    title: str,
    requests: Mapping[str, str],
    journal: Journal,
    complete: Callable[[str], bool] = lambda text: False,
) -> None:
    """Every answer that is not in `journal` yet (prompt, ids, text, cut), recorded as it is written.

    Args:
        requests: by name, what a model goes on with, or is asked in a chat where its entry says so.
        complete: whether a completion, as far as it is written, needs no more. A chat answer ends where the model ends
            it: what it wrote may be followed by something better.
    """
    wanted, entry = subject.wanted, subject.entry
    rows = [(name_of(name, sample), request) for name, request in requests.items() for sample in range(wanted.samples)]
    left = [row for row in rows if row[0] not in journal.items]
    with Progress(f"{title} {subject.name}", len(rows), "answers") as progress:
        progress.advance(len(rows) - len(left), kept=True)
        if not left:
            return
        writer, chats = Writer(subject.folder), entry.humaneval_prompt != "completion"
        limits = Limits(wanted.answer_tokens(entry), wanted.thinking_tokens(entry))
        for name, request in left:
            prompt, sampling = writer.chat(request) if chats else request, None
            if wanted.temperature:
                sampling = Sampling(wanted.temperature, wanted.top_p, derived_seed(wanted.seed, name))
            one = writer.continuation(prompt, limits, (lambda text: False) if chats else complete, sampling)
            journal.record(name, {"prompt": prompt, "ids": list(one.ids), "text": one.text, "cut": one.cut})
            progress.advance()
