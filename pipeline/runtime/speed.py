"""Speed and memory of a model folder, measured in fresh processes as an app sees them (`pipeline.runtime.app`).

Two processes: one loads from a disk whose cache was emptied, one loads from memory, then reads prompts of several
lengths and decodes after each. The metrics, seconds, bytes and tokens per second:

    load_seconds                       with the files in the page cache
    cold_load_seconds                  with none of them there; null when some stayed, for then it was not cold
    cold_load_cached_bytes             what of the files stayed in the page cache although it was emptied
    prompts.<n>.                       after a prompt of n tokens:
      time_to_first_token_seconds        median of the repeats; also _low, _high (least, most) and _spread
      tokens_per_second                  of decoding: median; also _low, _high and _spread
      roofline_tokens_per_second         memory bandwidth ÷ bytes_per_token: the most that this machine allows
      bytes_per_token                    that decoding reads at least, with the cache's at the middle of the new tokens
    the same figures at the top        those of the longest prompt, whose length is prompt_tokens
    noisy                              whether any spread exceeds `NOISY`: something else ran, or the clock changed
    memory_bandwidth_bytes_per_second  read by all cores from as many bytes as a token reads (a model that the
                                       processor's cache holds in part is judged by a bandwidth that it also helps)
    load_peak_private_bytes, …_mapped_ from the process's start to the end of loading
    use_peak_private_bytes, …_mapped_  from there to the end of the last generation
    peak_private_bytes, …_mapped_      the larger of the two
    peak_memory_bytes                  the most of both kinds at one moment, so at most their sum

A spread is (most − least) ÷ median. Memory is the whole process's, the interpreter's share (about 40 MB) included, and
is looked at every 10 ms: a peak shorter than that can be missed. Private memory is backed by no file and counts against
an app; mapped memory is the files' and libraries' pages, which the system can drop.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from pydantic import TypeAdapter

from pipeline.errors import EvaluationError
from pipeline.files import read_json
from pipeline.runtime.app import Look, Observed
from pipeline.runtime.pagecache import evict
from pipeline.runtime.roofline import Traffic, require_possible, traffic

NOISY = 0.10
"""Share of the median above which a spread is flagged; an idle machine stays within 2 to 4 per cent."""
_INTERVAL = 0.01  # seconds between two looks at the process's memory
_ROOT = Path(__file__).resolve().parents[2]


def measure(folder: Path, prompt_tokens: Sequence[int], new_tokens: int, repeats: int) -> dict[str, Any]:
    """The `speed` metrics of a folder that onnxruntime-genai loads, each of `prompt_tokens` (lengths) repeated.

    Raises:
        EvaluationError: the folder is no model, a process fails (with the last line of its errors), or decodes faster
            than memory delivers what it must read.
    """
    context, reads = _describe(folder)
    lengths = prompt_lengths(prompt_tokens, new_tokens, context)
    cached = evict(folder)
    cold, _ = _run(folder)
    least = round(reads.per_token(lengths[0]))
    warm, looks = _run(folder, prompt_tokens=lengths, new_tokens=new_tokens, repeats=repeats, bytes_per_token=least)
    return {
        "load_seconds": warm.load_seconds,
        "cold_load_seconds": None if cached else cold.load_seconds,
        "cold_load_cached_bytes": cached,
        **_decoding(folder, warm, reads, new_tokens),
        **_memory_peaks(warm, looks),
    }


def prompt_lengths(prompt_tokens: Sequence[int], new_tokens: int, context: int) -> tuple[int, ...]:
    """Prompt lengths in tokens, shortest first; one that leaves no room for the new tokens is cut to what does.

    Raises EvaluationError when the context holds no prompt at all.
    """
    room = context - new_tokens
    if room < 1:
        raise EvaluationError(
            f"speed: {new_tokens} new tokens leave no room for a prompt in a context of {context} tokens. Lower "
            f"`new_tokens` in the evaluation suite."
        )
    return tuple(sorted({min(length, room) for length in prompt_tokens}))


def _describe(folder: Path) -> tuple[int, Traffic]:
    """The context in tokens, and what a token reads, from the folder's own files."""
    try:
        model = read_json(folder / "genai_config.json")["model"]
        graph = onnx.load(folder / model["decoder"]["filename"], load_external_data=False)
        return int(model["context_length"]), traffic(graph)
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
        raise EvaluationError(
            f"{folder}: measuring speed needs genai_config.json and the graph that it names: {error!r}. Run the export "
            f"or quantize stage again."
        ) from None


def watch(command: Sequence[str], what: str) -> tuple[str, list[Look]]:
    """The last line that a command prints, and looks at its memory every 10 ms while it runs.

    Raises EvaluationError with the last line of its errors when it fails.
    """
    looks: list[Look] = []
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=_ROOT, stdout=output, stderr=errors) as process:
            try:
                while process.poll() is None:
                    time.sleep(_INTERVAL)
                    looks.append(Look.at(process.pid))
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise EvaluationError(
                f"{what} failed with status {process.returncode} (negative: the signal; 9 is what the kernel sends "
                f"when memory is out): {last}"
            )
        return output.read().strip().splitlines()[-1], looks


def _run(folder: Path, **task: Any) -> tuple[Observed, list[Look]]:
    """What a fresh process that runs `app.observe` saw of itself, and looks at its memory while it ran."""
    task["folder"] = str(folder.resolve())
    command = [sys.executable, "-m", "pipeline.runtime.app", json.dumps(task)]
    said, looks = watch(command, f"{folder}: measuring speed")
    return TypeAdapter(Observed).validate_json(said), looks


# --- figures ---


def _decoding(folder: Path, observed: Observed, reads: Traffic, new_tokens: int) -> dict[str, Any]:
    """Figures of each prompt length, and those of the longest at the top."""
    prompts: dict[str, dict[str, float]] = {}
    for length in sorted({item.prompt_tokens for item in observed.generations}):
        own = [item for item in observed.generations if item.prompt_tokens == length]
        per_token = reads.per_token(length + new_tokens / 2)
        prompts[str(length)] = figures = {
            **_spread("time_to_first_token_seconds", [item.first_seconds for item in own]),
            **_spread("tokens_per_second", [item.rate for item in own]),
            "bytes_per_token": per_token,
            "roofline_tokens_per_second": observed.bandwidth / per_token,
        }
        what = f"{folder}, after a prompt of {length} tokens"
        require_possible(figures["tokens_per_second"], figures["roofline_tokens_per_second"], what)
    spreads = [value for figures in prompts.values() for key, value in figures.items() if key.endswith("_spread")]
    return {
        **figures,
        "prompt_tokens": length,
        "prompts": prompts,
        "noisy": max(spreads) > NOISY,
        "memory_bandwidth_bytes_per_second": observed.bandwidth,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median of repeats as `name`, the extremes as `_low` and `_high`, and their distance ÷ median as `_spread`."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return {name: middle, f"{name}_low": low, f"{name}_high": high, f"{name}_spread": (high - low) / middle}


def _memory_peaks(observed: Observed, looks: Sequence[Look]) -> dict[str, int]:
    """Peaks of loading, of use, and of both. What comes after use (the bandwidth's working set) is left out."""
    loaded, used = observed.loaded, observed.used
    loading = [look for look in looks if look.seconds <= loaded.seconds] + [loaded]
    using = [look for look in looks if loaded.seconds < look.seconds <= used.seconds] + [loaded, used]
    return {
        **_peaks("load_peak", loading),
        **_peaks("use_peak", using),
        **_peaks("peak", loading + using),
        "peak_memory_bytes": max(look.private + look.mapped for look in loading + using),
    }


def _peaks(name: str, looks: Sequence[Look]) -> dict[str, int]:
    return {f"{name}_{kind}_bytes": max(getattr(look, kind) for look in looks) for kind in ("private", "mapped")}
