"""Agreement on the reference's own HumanEval solutions, token by token: finer than whether they pass.

pass@1 moves only when a whole solution breaks. Here the reference's own solutions are read token by token: whether the
model would have written the same one next, and with which probability. A variant that agrees everywhere writes the same
solutions; every place where it does not is a place where it may leave the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibrate.texts import encoder
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.tasks import written
from pipeline.tasks.divergence_scores import log_normalisers
from pipeline.tasks.humaneval_problems import PROMPT_TOKENS, problems_of
from pipeline.tasks.statistics import summarise_agreement
from pipeline.tasks.subject import CHUNK, Decoder, Subject, fill
from pipeline.tasks.task import Cost, Metrics, Note, Task, estimate, number

ITEMS = "agreement.jsonl"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`agreement` metrics (`statistics.summarise_agreement`), on the first solution of each problem.

    Items by task id lie in `folder`: the reference's have prompt and ids (of its solution), which variants read there;
    all have top and logprob of each token.
    """
    problems = [problem.task_id for problem in problems_of(subject)]
    journal, encode = Journal(folder / ITEMS), encoder(subject.folder)
    known = _solutions(subject, problems)
    left = [name for name in problems if name not in journal.items]
    texts = {name: (encode(known[name]["prompt"]), known[name]["ids"]) for name in left}

    def read(left: Sequence[str]) -> Iterator[dict[str, Any]]:
        subject.prepare(lambda decoder: [list(ask(decoder, *texts[name])) for name in left])
        for name in left:
            top, logprob = force(subject.decoder, *texts[name])
            own = {"top": top.tolist(), "logprob": logprob.tolist()}
            yield (known[name] if subject.reference is None else {}) | own

    fill(journal, problems, f"agreement {subject.name}", "solutions", read, subject.engine, layered=subject.layered)
    items, theirs = [journal.items[name] for name in problems], [known[name] for name in problems]
    problem = np.repeat(np.arange(len(items)), [len(item["top"]) for item in items])
    if subject.reference is None:
        return summarise_agreement(_joined(items, "logprob"), problem)
    equal = _joined(items, "top") == _joined(theirs, "top")
    return summarise_agreement(_joined(items, "logprob"), problem, _joined(theirs, "logprob"), equal)


def _solutions(subject: Subject, problems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The reference's solution of each problem: prompt, ids; for a variant also what the reference makes of them."""
    if subject.reference:
        found = Journal(subject.reference / ITEMS).items
    else:
        items = Journal((subject.source or Path()) / written.ITEMS).items
        first = {name: items.get(written.name_of(name)) for name in problems}
        found = {name: {key: item[key] for key in ("prompt", "ids")} for name, item in first.items() if item}
    if missing := [name for name in problems if name not in found]:
        raise EvaluationError(
            f"{subject.name}: the reference has {len(problems) - len(missing)} of {len(problems)} HumanEval solutions, "
            f"{missing[0]} is not among them. Run `python -m pipeline validate {subject.model} reference`."
        )
    return found


def _joined(items: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.concatenate([item[key] for item in items])


# --- teacher forcing -------------------------------------------------------------------------------------------------


def ask(decoder: Decoder, prompt: Sequence[int], text: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Run `text` after `prompt`: in each chunk of both the number of its first token, and its logits."""
    ids, state = [*prompt, *text][:-1], None
    for start in range(0, len(ids), CHUNK):
        logits, state = decoder.run(ids[start : start + CHUNK], state)
        yield start, logits


def force(decoder: Decoder, prompt: Sequence[int], text: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read `text` after `prompt`, both token ids, at least one each.

    Returns, per token of `text`, the model's most likely one, int64, and the log-probability of its own, float64 nats.

    Raises:
        EvaluationError: a token is outside the model's vocabulary, or a logit is NaN or infinite.
    """
    ids, first = np.array([*prompt, *text], np.int64), len(prompt) - 1  # the row that tells the text's first token
    top, logprob = [], []
    for start, rows in ask(decoder, prompt, text):
        logits = rows[max(0, first - start) :]
        end = start + len(rows) + 1
        targets = ids[end - len(logits) : end]
        vocab = logits.shape[1]
        if len(targets) and not 0 <= targets.min() <= targets.max() < vocab:
            raise EvaluationError(
                f"the reference's solutions hold token id {targets.max():,}, the model has {vocab:,} logits: they are "
                f"not of the same model. Measure the reference again."
            )
        if not np.isfinite(logits).all():
            raise EvaluationError("logits of the reference's solutions contain NaN or infinity; the file is broken.")
        top.append(logits.argmax(axis=1))
        logprob.append(logits[np.arange(len(targets)), targets] - log_normalisers(logits))
    return np.concatenate(top), np.concatenate(logprob)


def _heading(own: Metrics) -> str:
    tokens = number(own, "tokens") or 0
    return f"Agreement with the reference on the {tokens:,.0f} tokens of its own HumanEval solutions"


TASK = Task(
    name="agreement",
    title="agreement",
    place=4,
    measure=measure,
    counted=("problems", "k"),
    runs_graph=True,
    against_reference=True,
    reads="humaneval",
    datasets=lambda part: ("humaneval",),
    cost=lambda part, entry: Cost(read=part.problems * (PROMPT_TOKENS + part.most_tokens(entry)), window=CHUNK),
    notes=(Note(_heading, lambda section: estimate(section, "top1")),),
)
