"""What tasks share that let a model write: how long and how often, and what is said of it. `writing` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field, model_validator

from pipeline.config.models import ModelConfig
from pipeline.config.typed_yaml import Frozen
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.runtime.chat import opens_thinking, without_thinking
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import Cost, Metrics, number

ITEMS = "solutions.jsonl"

Item = TypeVar("Item")


class WritingConfig(Frozen):
    """How often an answer is drawn, and how long it may be."""

    samples: int = Field(default=1, ge=1, le=1000, description="answers to each request")
    temperature: float = Field(default=0, ge=0, description="0: greedy")
    top_p: float = Field(default=1, gt=0, le=1)
    seed: int = 0
    max_new_tokens: int = Field(gt=0, description="of a completion")
    max_chat_tokens: int = Field(default=768, gt=0, description="of a chat answer, prose included")
    max_think_tokens: int = Field(default=2048, gt=0, description="of the thinking before a chat answer")

    @model_validator(mode="after")
    def _samples_differ(self) -> WritingConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} greedy samples are {self.samples} times the same: raise `temperature`")
        return self

    def answer_tokens(self, entry: ModelConfig) -> int:
        """The limit of an answer, by how the model is asked."""
        return self.max_new_tokens if entry.humaneval_prompt == "completion" else self.max_chat_tokens

    def thinking_tokens(self, entry: ModelConfig) -> int:
        """The limit of what comes before the answer: 0 for a model that does not think."""
        return self.max_think_tokens if entry.humaneval_prompt == "thinking" else 0

    def most_tokens(self, entry: ModelConfig) -> int:
        """Both together."""
        return self.answer_tokens(entry) + self.thinking_tokens(entry)

    def cost(self, entry: ModelConfig, requests: int, prompt_tokens: int) -> Cost:
        """Prompts read, and answers that all meet their limit."""
        answers, most = requests * self.samples, self.most_tokens(entry)
        tokens = {"read": answers * prompt_tokens, "written": answers * most, "cached": prompt_tokens + most}
        return Cost(texts=answers, **tokens)


def name_of(request: str, sample: int = 0) -> str:
    """An answer's name among the items."""
    return f"{request}#{sample}"


def names_of(requests: Iterable[str], wanted: WritingConfig) -> list[list[str]]:
    """The names of each request's answers."""
    return [[name_of(request, sample) for sample in range(wanted.samples)] for request in requests]


def answer(item: Mapping[str, Any], entry: ModelConfig) -> str:
    """What a written item says, its thinking left out."""
    thinks = entry.humaneval_prompt == "thinking"
    return without_thinking(item["text"], opens_thinking(item["prompt"])) if thinks else item["text"]


def described(subject: Subject, journal: Journal, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How answers came about, for the metrics.

    - `prompt`: "completion", "chat" or "thinking", as the model's entry says; `temperature` (0: greedy), `top_p`,
      `seed`; `answer_tokens`, `thinking_tokens`: the limits;
    - `cut_answers`, `cut_thinking`: answers that met these limits, in the answer or still thinking.
    """
    wanted, entry = subject.wanted, subject.entry
    cuts = [journal.items[name]["cut"] for row in names for name in row]
    return {
        "prompt": entry.humaneval_prompt,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "seed": wanted.seed,
        "answer_tokens": wanted.answer_tokens(entry),
        "thinking_tokens": wanted.thinking_tokens(entry),
        "cut_answers": cuts.count("answer"),
        "cut_thinking": cuts.count("thinking"),
    }


def how_drawn(section: Metrics) -> str:
    """How answers were drawn, in words."""
    samples, temperature = section.get("samples", 1), section.get("temperature", 0)
    return f"{samples:,} sampled at temperature {temperature:g}" if temperature else "one greedy"


def cut_short(section: Metrics) -> str:
    """How many answers met a limit, in words; "" for none."""
    answers, thinking = (number(section, f"cut_{part}") or 0 for part in ("answers", "thinking"))
    if not answers and not thinking:
        return ""
    return f"{answers:.0f}" + (f" and {thinking:.0f} while thinking" if thinking else "")


def spread(items: Sequence[Item], n: int, what: str) -> list[Item]:
    """`n` items evenly spread over all, in their order; a smaller `n` chooses a subset of a larger one.

    Positions follow the van der Corput sequence in base 2 (0, 1/2, 1/4, 3/4, …).

    Raises:
        EvaluationError: `n` is not between 1 and the number of items.
    """
    if not 1 <= n <= len(items):
        raise EvaluationError(f"cannot choose {n} of {len(items)} {what}; choose 1 to {len(items)}.")
    bits = len(items).bit_length()
    positions = (int(f"{k:0{bits}b}"[::-1], 2) * len(items) >> bits for k in range(1 << bits))
    return [items[position] for position in sorted(list(dict.fromkeys(positions))[:n])]
