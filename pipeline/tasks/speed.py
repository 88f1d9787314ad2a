"""Speed and memory, measured in a process of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.config.typed_yaml import Frozen
from pipeline.machine import cores, processor
from pipeline.runtime import speed
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import DASH, Column, Cost, Metrics, Task, bounds, maybe, memory, number


class SpeedConfig(Frozen):
    """Speed and memory, measured in fresh processes through onnxruntime-genai."""

    prompt_tokens: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        min_length=1, description="prompt lengths; the context caps them"
    )
    new_tokens: int = Field(gt=1)
    repeats: int = Field(gt=0)


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`speed` metrics; never kept from a killed run."""
    del folder
    wanted = subject.wanted
    return speed.measure(subject.folder, wanted.prompt_tokens, wanted.new_tokens, wanted.repeats)


def _cost(part: SpeedConfig, entry: Any) -> Cost:
    """Every prompt as often as it is repeated, and once to warm up."""
    del entry
    read = sum(part.prompt_tokens) * part.repeats + min(part.prompt_tokens)
    return Cost(read=read, written=part.new_tokens * (len(part.prompt_tokens) * part.repeats + 1))


def _seconds(value: float) -> str:
    """Milliseconds below one second."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _rate(section: Metrics) -> tuple[str, str]:
    rate, most = number(section, "tokens_per_second"), number(section, "roofline_tokens_per_second")
    if rate is None:
        return DASH, ""
    decimals = 0 if rate >= 100 else 1 if rate >= 10 else 2
    extremes = bounds(section, "tokens_per_second", _short)
    return f"{rate:.{decimals}f}/{maybe(most, _short)}", "~" * bool(section.get("noisy")) + extremes


def _first_token(section: Metrics) -> tuple[str, str]:
    after = maybe(number(section, "prompt_tokens"), lambda tokens: f"at {tokens:.0f}", "")
    return maybe(number(section, "time_to_first_token_seconds"), _seconds), after


def _peak(section: Metrics) -> tuple[str, str]:
    private = maybe(number(section, "peak_private_bytes"), memory, "")
    return maybe(number(section, "peak_memory_bytes"), memory), private


_LEGEND = (
    "tokens/s: the median after the longest prompt / the most that the memory's bandwidth allows; below it the "
    "repeats' least and most, with ~ where they differ by more than a tenth: something else ran. First token: after a "
    "prompt of as many tokens as stand below it. Peak: the process's memory; below it, what no file backs."
)

TASK = Task(
    name="speed",
    title="speed",
    place=9,
    measure=measure,
    config=SpeedConfig,
    whole=True,
    machine=lambda part: [processor(), cores()],
    cost=_cost,
    columns=(
        Column(("tokens/s", "/ most"), _rate),
        Column(("first", "token"), _first_token),
        Column(("peak", "private"), _peak),
    ),
    legend=_LEGEND,
)
