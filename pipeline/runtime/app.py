"""A model folder as an app uses it: onnxruntime-genai with its own defaults, in a process that loads nothing else.

    python -m pipeline.runtime.app '{"folder": "…", "prompt_tokens": [32, 128], "new_tokens": 32, "repeats": 3,
                                      "bytes_per_token": 92000000}'

prints one JSON object (`Observed`). `pipeline.runtime.speed` runs it and reads its memory from outside: the runtime
holds Python's lock while it loads, so nothing in this process could look.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.machine import cores, resident_memory

_TEXT = "The history of the town goes back to the time when the river was the only road through the forest. "
_ATTEMPTS = 3


@dataclass(frozen=True)
class Task:
    """What one process does. Without `prompt_tokens` it only loads.

    Attributes:
        prompt_tokens: prompt lengths, shortest first; each is generated from `repeats` times.
        new_tokens: decoded after each prompt, at least two.
        bytes_per_token: what decoding a token must read: the working set that the memory's bandwidth is measured on.
    """

    folder: str
    prompt_tokens: tuple[int, ...] = ()
    new_tokens: int = 2
    repeats: int = 1
    bytes_per_token: int = 0


@dataclass(frozen=True)
class Look:
    """Private and mapped bytes of this process at a moment of the monotonic clock, which all processes share."""

    seconds: float
    private: int
    mapped: int

    @classmethod
    def at(cls, pid: int | str = "self") -> Look:
        """A look at a process now."""
        return cls(time.monotonic(), *resident_memory(pid))


@dataclass(frozen=True)
class Generation:
    """One generation: its prompt's tokens, seconds to the first new token, and new tokens per second after it."""

    prompt_tokens: int
    first_seconds: float
    rate: float


@dataclass(frozen=True)
class Observed:
    """What the process saw. `bandwidth`: bytes per second that all cores read together, measured after use."""

    load_seconds: float
    loaded: Look
    used: Look | None = None
    generations: list[Generation] = field(default_factory=list)
    bandwidth: float | None = None


def observe(task: Task) -> Observed:
    """Load, generate, and measure the machine's bandwidth once the model's memory is free again."""
    import onnxruntime_genai as genai

    start = time.monotonic()
    model = genai.Model(task.folder)
    load_seconds = time.monotonic() - start
    loaded = Look.at()
    if not task.prompt_tokens:
        return Observed(load_seconds, loaded)
    ids = _prompt(genai.Tokenizer(model), max(task.prompt_tokens))
    _generate(model, ids[: task.prompt_tokens[0]], task.new_tokens)  # warms up, and is not counted
    # In turns, so that a disturbance of some seconds does not fall on one length alone.
    generations = [
        _generate(model, ids[:length], task.new_tokens) for _ in range(task.repeats) for length in task.prompt_tokens
    ]
    used = Look.at()
    del model
    bandwidth = _bandwidth(task.bytes_per_token, [item.rate for item in generations])
    return Observed(load_seconds, loaded, used, generations, bandwidth)


def _prompt(tokenizer: Any, length: int) -> list[int]:
    """`length` token ids of a text."""
    sentence = [int(token) for token in tokenizer.encode(_TEXT)]
    return (sentence * -(-length // len(sentence)))[:length]


def _generate(model: Any, ids: list[int], new_tokens: int) -> Generation:
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model)
    length = len(ids) + new_tokens
    # min_length keeps an early end of text from shortening the measurement.
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    start = time.monotonic()
    generator.append_tokens(ids)
    generator.generate_next_token()
    first = time.monotonic()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    return Generation(len(ids), first - start, (new_tokens - 1) / (time.monotonic() - first))


def _bandwidth(bytes_per_token: int, rates: list[float]) -> float:
    """Bytes per second. Other programs can only lower it: it is measured again before a rate seems impossible."""
    from pipeline.runtime.bandwidth import LARGEST_WORKING_SET, memory_bandwidth  # numba: not while memory counts

    needed, best = bytes_per_token * statistics.median(rates), 0.0
    for _ in range(_ATTEMPTS):
        best = max(best, memory_bandwidth(cores(), min(bytes_per_token, LARGEST_WORKING_SET)))
        if best >= needed:
            break
    return best


if __name__ == "__main__":
    print(json.dumps(asdict(observe(Task(**json.loads(sys.argv[1]))))))
