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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.machine import cores, resident_memory

_TEXT = "The history of the town goes back to the time when the river was the only road through the forest. "
_ATTEMPTS = 3


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
    """What the process saw.

    Attributes:
        used: after the last generation; as `loaded` where nothing was generated.
        bandwidth: bytes per second that all cores read together, measured after use; 0 where nothing was generated.
    """

    load_seconds: float
    loaded: Look
    used: Look
    generations: list[Generation]
    bandwidth: float


def observe(
    folder: str, prompt_tokens: Sequence[int] = (), new_tokens: int = 2, repeats: int = 1, bytes_per_token: int = 0
) -> Observed:
    """Load, generate, and measure the machine's bandwidth once the model's memory is free again.

    Args:
        prompt_tokens: prompt lengths, shortest first; each is generated from `repeats` times. Without any, the model is
            only loaded.
        new_tokens: decoded after each prompt, at least two.
        bytes_per_token: what decoding a token must read: the working set that the memory's bandwidth is measured on.
    """
    import onnxruntime_genai as genai

    start = time.monotonic()
    model = genai.Model(folder)
    load_seconds = time.monotonic() - start
    loaded = Look.at()
    if not prompt_tokens:
        return Observed(load_seconds, loaded, loaded, [], 0.0)
    sentence = [int(token) for token in genai.Tokenizer(model).encode(_TEXT)]
    ids = sentence * -(-max(prompt_tokens) // len(sentence))
    _generate(model, ids[: prompt_tokens[0]], new_tokens)  # warms up, and is not counted
    # In turns, so that a disturbance of some seconds does not fall on one length alone.
    generations = [_generate(model, ids[:length], new_tokens) for _ in range(repeats) for length in prompt_tokens]
    used = Look.at()
    del model
    bandwidth = _bandwidth(bytes_per_token, [item.rate for item in generations])
    return Observed(load_seconds, loaded, used, generations, bandwidth)


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
    print(json.dumps(asdict(observe(**json.loads(sys.argv[1])))))
