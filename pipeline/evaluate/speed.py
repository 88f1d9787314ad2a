"""Speed and memory of a model folder, as an app sees them: one fresh process, onnxruntime-genai, nothing else loaded.

    python -m pipeline.evaluate.speed FOLDER PROMPT_TOKENS NEW_TOKENS REPEATS

prints one JSON object. Memory is the whole process's, the interpreter's share (about 60 MB) included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import SpeedConfig
from pipeline.errors import EvaluationError

_TEXT = "The history of the town goes back to the time when the river was the only road through the forest. "


def measure(folder: Path, config: SpeedConfig) -> dict[str, Any]:
    """Run the measurement in a process of its own and return its `speed` metrics.

    Raises EvaluationError with the last line of the process's errors when it fails.
    """
    numbers = map(str, (config.prompt_tokens, config.new_tokens, config.repeats))
    command = [sys.executable, "-m", "pipeline.evaluate.speed", str(folder), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"{folder}: measuring speed failed with status {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _once(model: Any, ids: list[int], new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, tokens per second after it) of one generation."""
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model)
    length = len(ids) + new_tokens
    # min_length keeps an early end of text from shortening the measurement.
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    return first - start, (new_tokens - 1) / (time.perf_counter() - first)


def main(folder: Path, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    """Measure and print."""
    import onnxruntime_genai as genai
    import psutil

    process = psutil.Process()
    start = time.perf_counter()
    model = genai.Model(str(folder))
    load_seconds = time.perf_counter() - start
    tokenizer = genai.Tokenizer(model)
    ids: list[int] = []
    while len(ids) < prompt_tokens:
        ids += [int(token) for token in tokenizer.encode(_TEXT)]
    ids = ids[:prompt_tokens]
    runs, peaks = [], []
    for _ in range(repeats + 1):  # the first run warms up and is not counted
        runs.append(_once(model, ids, new_tokens))
        usage = process.memory_full_info()
        peaks.append((usage.rss, usage.uss))
    rates = [rate for _, rate in runs[1:]]
    resident, private = max(peaks)
    report = {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_low": min(rates),
        "tokens_per_second_high": max(rates),
        "time_to_first_token_seconds": statistics.median(seconds for seconds, _ in runs[1:]),
        "prompt_tokens": prompt_tokens,
        "load_seconds": load_seconds,
        "peak_memory_bytes": resident,
        "peak_private_bytes": private,
        "peak_mapped_bytes": resident - private,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
