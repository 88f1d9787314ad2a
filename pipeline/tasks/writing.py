"""Answers written through onnxruntime-genai, in batches, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

from pipeline.journal import Journal
from pipeline.progress import Progress
from pipeline.runtime.generate import Limits, Sampling, Writer, derived_seed
from pipeline.tasks.subject import Subject
from pipeline.tasks.written import WritingConfig, name_of, names_of


def write(
    subject: Subject,
    title: str,
    requests: Mapping[str, str],
    journal: Journal,
    complete: Callable[[str], bool] = lambda text: False,
) -> None:
    """Every answer that is not in `journal` yet (prompt, ids, text, cut), recorded batch by batch.

    Args:
        requests: by name, what a model goes on with, or is asked in a chat where its entry says so.
        complete: whether a completion, as far as it is written, needs no more. A chat answer ends where the model ends
            it.
    """
    wanted, entry = subject.wanted, subject.entry
    limits = Limits(wanted.answer_tokens(entry), wanted.thinking_tokens(entry))
    names = {name for row in names_of(requests, wanted) for name in row}
    with Progress(f"{title} {subject.name}", len(names), "answers") as progress:
        progress.advance(len(names & journal.items.keys()), kept=True)
        if names <= journal.items.keys():
            return
        writer, chat = Writer(subject.folder), entry.humaneval_prompt != "completion"
        prompts = {name: writer.chat(request) if chat else request for name, request in requests.items()}
        for rows, sampling in _batches(writer, prompts, wanted, limits, journal.items):
            texts = [prompts[request] for request, _ in rows]
            stop = (lambda text: False) if chat else complete
            written = writer.continuations(texts, limits, stop, sampling)
            new = 0
            for row, prompt, one in zip(rows, texts, written, strict=True):
                if name_of(*row) not in journal.items:
                    item = {"prompt": prompt, "ids": list(one.ids), "text": one.text, "cut": one.cut}
                    journal.record(name_of(*row), item)
                    new += 1
            progress.advance(new)


def _batches(
    writer: Writer, prompts: Mapping[str, str], wanted: WritingConfig, limits: Limits, done: Container[str]
) -> Iterator[tuple[list[tuple[str, int]], Sampling | None]]:
    """Rows (request, sample) of each batch, and how to draw them.

    Greedy texts share batches as they come. Drawn ones depend on their batch: it holds samples of one request, always
    the same, and is drawn again as a whole if a kill left any of it unrecorded.
    """
    if wanted.temperature == 0:
        left = [request for request in prompts if name_of(request) not in done]
        for batch in writer.batches([prompts[request] for request in left], limits):
            yield [(left[row], 0) for row in batch], None
        return
    for request, prompt in prompts.items():
        size = writer.rows(writer.tokens(prompt), limits)
        for first in range(0, wanted.samples, size):
            rows = [(request, sample) for sample in range(first, min(first + size, wanted.samples))]
            if any(name_of(*row) not in done for row in rows):
                seed = derived_seed(wanted.seed, name_of(request, first))
                yield rows, Sampling(wanted.temperature, wanted.top_p, seed)
