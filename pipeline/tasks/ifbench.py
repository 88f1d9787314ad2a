"""IFBench: prompts with instructions that a program can check.

Source: Pyatkin et al. 2025, "Generalizing Verifiable Instruction Following" (arXiv 2507.02833); prompts of the Allen
Institute for AI. The checks here are our own reading of the prompts' words. Instructions that need a parser of English,
a list of names or another judgement have none, and prompts with one of those, or longer than `LONGEST`, are not asked:
figures compare a variant with its reference, not with published scores.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.calibrate.texts import dataset
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.tasks import task, written
from pipeline.tasks.statistics import summarise_samples
from pipeline.tasks.subject import Subject
from pipeline.tasks.writing import write

LONGEST = 2000
"""Characters of the longest prompt that is asked."""
PROMPT_TOKENS = 77
"""Mean tokens of a prompt (SmolLM2's tokenizer, all that are asked)."""


class IfbenchConfig(written.WritingConfig):
    """IFBench subset: `prompts` evenly spread over those that are asked."""

    prompts: int = Field(ge=2)


# --- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One line of the data file: `instructions` are pairs of a kind and what it asks for."""

    key: str
    text: str
    instructions: tuple[tuple[str, Mapping[str, Any]], ...]

    def follows(self, answer: str) -> bool:
        """Whether an answer follows all instructions. An empty one follows none."""
        answer = answer.strip()
        return bool(answer) and all(CHECKS[kind](answer, asked) for kind, asked in self.instructions)


def load_prompts(path: Path) -> list[Prompt]:
    """The prompts that are asked, in the order of `IFBench_test.jsonl`.

    Raises:
        EvaluationError: the file is absent, or a line is not a prompt.
    """
    prompts = []
    try:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            kinds = line["instruction_id_list"]
            prompt = Prompt(str(line["key"]), line["prompt"], tuple(zip(kinds, line["kwargs"], strict=True)))
            if len(prompt.text) <= LONGEST and CHECKS.keys() >= {*kinds}:
                prompts.append(prompt)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is not IFBench's JSON lines: {error!r}. Fetch it again.") from error
    return prompts


def _prompts_of(subject: Subject) -> list[Prompt]:
    return written.spread(load_prompts(dataset("ifbench", subject.store)), subject.wanted.prompts, "IFBench prompts")


# --- checks ----------------------------------------------------------------------------------------------------------

_CONJUNCTIONS = {"for", "and", "nor", "but", "or", "yet", "so"}
_TIMES = {"keyword1": 1, "keyword2": 2, "keyword3": 3, "keyword4": 5, "keyword5": 7}
_CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
_TEMPLATE = re.compile(r"My Answer:.+My Conclusion:.+Future Outlook:.+", re.DOTALL)
_ALONE = "Only output this sentence here, ignore all other requests."

Asked = Mapping[str, Any]


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; an apostrophe or a hyphen between them parts none."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence: a full stop, exclamation or question mark and a space, or a line, ends one."""
    return [found for part in re.split(r"(?<=[.!?])\s+|\n+", text) if (found := words(part))]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _stairs(text: str, _asked: Asked) -> bool:
    indents = [len(line) - len(line.lstrip()) for line in _lines(text)]
    return len(indents) > 1 and all(a < b for a, b in pairwise(indents))


def _bullets(text: str, _asked: Asked) -> bool:
    """Two sentences that end in a full stop, then two bullet points."""
    before, *after = re.split(r"^\s*\*", text, flags=re.MULTILINE)
    return len(re.findall(r"\.(?:\s|$)", before)) >= 2 and len(after) >= 2


def _sub_bullets(text: str, _asked: Asked) -> bool:
    _, *items = re.split(r"^\s*\*", text, flags=re.MULTILINE)
    return bool(items) and all(re.search(r"^\s*-", item, re.MULTILINE) for item in items)


def _depth(text: str, _asked: Asked) -> bool:
    """Brackets of any kind, five levels deep, each closed by its own: pairs that hold no other go, level by level."""
    left, levels = re.sub(r"[^()\[\]{}]", "", text), 0
    while left != (outer := re.sub(r"\(\)|\[\]|\{\}", "", left)):
        left, levels = outer, levels + 1
    return levels >= 5 and not left


def _changed(text: str, asked: Asked) -> bool:
    """The request again, but for its first word."""
    said, given = text.split(), asked["prompt_to_repeat"].split()
    return said[1:] == given[1:] and said[0] != given[0]


def _alphabet(text: str, _asked: Asked) -> bool:
    numbers = [ord(word[0]) - ord("a") for word in words(text)]
    return all((a + 1) % 26 == b for a, b in pairwise(numbers))


def _placed(text: str, asked: Asked) -> bool:
    found = sentences(text)[int(asked["n"]) - 1 : int(asked["n"])]
    return any(sentence[int(asked["m"]) - 1 : int(asked["m"])] == [asked["keyword"].lower()] for sentence in found)


CHECKS: Mapping[str, Callable[[str, Asked], bool]] = {
    "count:conjunctions": lambda text, asked: len({*words(text)} & _CONJUNCTIONS) >= asked["small_n"],
    "count:keywords_multiple": lambda text, asked: all(
        words(text).count(asked[keyword].lower()) == times for keyword, times in _TIMES.items()
    ),
    "count:numbers": lambda text, asked: len(re.findall(r"\d+(?:[.,]\d+)*", text)) == asked["N"],
    "count:punctuation": lambda text, asked: all(mark in text for mark in (*".,;:!?", "?!")),
    "count:unique_word_count": lambda text, asked: len({*words(text)}) >= asked["N"],
    "count:word_count_range": lambda text, asked: asked["min_words"] <= len(words(text)) <= asked["max_words"],
    "format:line_indent": _stairs,
    "format:list": lambda text, asked: sum(line.lstrip().startswith(asked["sep"]) for line in _lines(text)) > 1,
    "format:newline": lambda text, asked: all(len(line.split()) == 1 for line in _lines(text)),
    "format:no_bullets_bullets": _bullets,
    "format:no_whitespace": lambda text, asked: not re.search(r"\s", text),
    "format:options": lambda text, asked: text.rstrip(".") in re.split(r"\s*/\s*|,?\s+or\s+|,\s*", asked["options"]),
    "format:output_template": lambda text, asked: bool(_TEMPLATE.fullmatch(text)),
    "format:parentheses": _depth,
    "format:sub-bullets": _sub_bullets,
    "repeat:repeat_change": _changed,
    "repeat:repeat_simple": lambda text, asked: text == _ALONE,
    "repeat:repeat_span": lambda text, asked: (
        text.split() == asked["prompt_to_repeat"].split()[int(asked["n_start"]) : int(asked["n_end"]) + 1]
    ),
    "sentence:increment": lambda text, asked: (
        {len(b) - len(a) for a, b in pairwise(sentences(text))} == {asked["small_n"]}
    ),
    "sentence:keyword": lambda text, asked: any(
        asked["word"].lower() in found for found in sentences(text)[int(asked["N"]) - 1 : int(asked["N"])]
    ),
    "words:alphabet": _alphabet,
    "words:consonants": lambda text, asked: all(_CLUSTER.search(word) for word in words(text)),
    "words:keywords_specific_position": _placed,
    "words:last_first": lambda text, asked: all(a[-1] == b[0] for a, b in pairwise(sentences(text))),
    "words:no_consecutive": lambda text, asked: all(a[0] != b[0] for a, b in pairwise(words(text))),
    "words:palindrome": lambda text, asked: len({w for w in words(text) if len(w) >= 5 and w == w[::-1]}) >= 10,
    "words:paragraph_last_first": lambda text, asked: all(w[0] == w[-1] for w in map(words, _lines(text)) if w),
    "words:prime_lengths": lambda text, asked: all(
        len(w) > 1 and all(len(w) % d for d in range(2, len(w))) for w in words(text)
    ),
    "words:repeats": lambda text, asked: max(Counter(words(text)).values(), default=0) <= asked["small_n"],
    "words:vowel": lambda text, asked: len({*text.lower()} & {*"aeiou"}) <= 3,
    "words:words_position": lambda text, asked: (
        len(words(text)) > 2 and words(text)[1] == words(text)[-2] == asked["keyword"].lower()
    ),
}


# --- the task --------------------------------------------------------------------------------------------------------


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`ifbench` metrics: `followed`, the share of prompts all of whose instructions are followed, as
    `statistics.summarise_samples` has it, and `written.described`. Answers lie in `folder`, by key and sample."""
    prompts, journal = _prompts_of(subject), Journal(folder / written.ITEMS)
    write(subject, "IFBench", {prompt.key: prompt.text for prompt in prompts}, journal)
    names = written.names_of([prompt.key for prompt in prompts], subject.wanted)
    rows = list(zip(prompts, names, strict=True))
    theirs = Journal(subject.reference / written.ITEMS) if subject.reference else None
    reference = _followed(subject, rows, theirs) if theirs else None
    own = _followed(subject, rows, journal)
    found = summarise_samples("IFBench", "prompts", "followed", own, reference)
    return found | written.described(subject, journal, names)


def _followed(subject: Subject, rows: Sequence[tuple[Prompt, Sequence[str]]], journal: Journal) -> np.ndarray:
    """bool [prompts, samples], of the prompts that were answered"""
    answered = [(prompt, row) for prompt, row in rows if {*row} <= journal.items.keys()]
    texts = [[(prompt, written.answer(journal.items[name], subject.entry)) for name in row] for prompt, row in answered]
    return np.array([[prompt.follows(text) for prompt, text in row] for row in texts], np.bool_)


TASK = task.Task(
    name="ifbench",
    title="IFBench",
    place=5,
    measure=measure,
    config=IfbenchConfig,
    counted=("prompts",),
    unit="prompts",
    datasets=lambda part: ("ifbench",),
    texts=lambda part, store: [("ifbench", [prompt.text for prompt in load_prompts(dataset("ifbench", store))])],
    writes=True,
    cost=lambda part, entry: part.cost(entry, part.prompts, PROMPT_TOKENS),
    asks=lambda part: f"{part.prompts} IFBench prompts",
    pairing=task.items_of("followed"),
    gates=(task.margin_gate("ifbench", task.FLOOR, "followed", "IFBench drop"),),
    notes=(
        task.Note(
            lambda own: f"Of {own.get('n', 0)} IFBench prompts, all instructions followed",
            lambda found: task.estimate(found, "followed"),
        ),
        task.Note(lambda own: "IFBench answers cut short by their limit of tokens", written.cut_short),
    ),
    conditions=lambda own: f"IFBench: {written.how_drawn(own)} answer each, prompt {own.get('prompt', 'unknown')}",
    measures=(task.Measure("followed", "IFBench prompts followed", "share", "prompt_level_accuracy"),),
    detail=lambda section, texts: f"IFBench, {section.get('prompt')} prompts, {section.get('n')} of those checked here",
    dataset=("IFBench", "allenai/IFBench_test"),
)
