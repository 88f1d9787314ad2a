"""One runtime in a process of its own, as an app runs it: load a model folder, read a prompt, decode.

    python -m benchmarks.engines decode '{"engine": "onnxruntime", "folder": "…", …}'
    python -m benchmarks.engines prepack MODEL.onnx TARGET.onnx

Each prints one JSON object. Nothing heavy is imported beside the runtime, because the process's memory is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the runtime is loaded

import numpy as np
import psutil

_WIDTHS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class Task:
    """What one process measures. `threads` is None for the engine's own default."""

    engine: str  # "onnxruntime" or "onnxruntime-genai"
    folder: str
    threads: int | None
    prompt_tokens: int
    segment_tokens: int  # tokens of one timed stretch of decoding
    segments: int


class Engine(Protocol):
    """A loaded model with one greedy generation at a time."""

    def start(self, ids: list[int], total: int) -> int:
        """Begin a generation of at most `total` tokens with the prompt `ids`; return the first new token."""

    def step(self) -> int:
        """Return the next token."""


def settings(folder: Path) -> dict[str, Any]:
    """The `model` part of a folder's genai_config.json."""
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]


class OrtEngine:
    """onnxruntime alone; keys and values go from one call to the next without a copy in Python."""

    def __init__(self, folder: Path, threads: int | None):
        import onnxruntime as ort

        ort.set_default_logger_severity(3)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self._value = ort.OrtValue.ortvalue_from_numpy
        model = folder / settings(folder)["decoder"]["filename"]
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        cache = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self._empty = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), _WIDTHS[value.type]) for value in cache
        }
        self._outputs = [value.name for value in self._session.get_outputs()]

    def start(self, ids: list[int], total: int) -> int:
        self._past = [self._value(array) for array in self._empty.values()]
        self._length = 0
        return self._run(ids)

    def step(self) -> int:
        return self._run([self._token])

    def _run(self, ids: list[int]) -> int:
        self._length += len(ids)
        feeds = {
            "input_ids": self._value(np.asarray([ids], np.int64)),
            "attention_mask": self._value(np.ones((1, self._length), np.int64)),
            **dict(zip(self._empty, self._past, strict=True)),
        }
        logits, *self._past = self._session.run_with_ort_values(self._outputs, feeds)
        self._token = int(logits.numpy()[0, -1].argmax())
        return self._token


class GenaiEngine:
    """onnxruntime-genai, with the folder's own configuration but for the number of threads and what overlays it."""

    def __init__(self, folder: Path, threads: int | None, overlay: dict[str, Any] | None = None):
        import onnxruntime_genai as genai

        self._genai = genai
        config = genai.Config(str(folder))
        if overlay:
            config.overlay(json.dumps(overlay))
        if threads:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)

    def start(self, ids: list[int], total: int) -> int:
        params = self._genai.GeneratorParams(self._model)
        # min_length keeps an early end of text from shortening the measurement.
        params.set_search_options(max_length=total, min_length=total, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        self._generator.append_tokens(ids)
        return self.step()

    def step(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


ENGINES = {"onnxruntime": OrtEngine, "onnxruntime-genai": GenaiEngine}


def _memory() -> tuple[int, int]:
    """(private, mapped) bytes that this process has in memory."""
    usage = psutil.Process().memory_info()
    return usage.rss - usage.shared, usage.shared


def decode(task: Task) -> dict[str, Any]:
    """Load, run one token, read the prompt, decode the segments; times in seconds, memory in bytes.

    The prompt is random but seeded: the tokens that follow tell whether two files compute the same.
    """
    folder = Path(task.folder)
    before, _ = _memory()
    start = time.perf_counter()
    engine: Engine = ENGINES[task.engine](folder, task.threads)
    load_seconds = time.perf_counter() - start
    private, mapped = _memory()
    vocabulary = settings(folder)["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, task.prompt_tokens).tolist()
    start = time.perf_counter()
    engine.start(ids[:1], 2)
    first_seconds = time.perf_counter() - start  # a mapped file is read here, not at load
    report = {
        "load_seconds": load_seconds,
        "first_token_seconds": first_seconds,
        "interpreter_private_bytes": before,
        "loaded_private_bytes": private,
        "loaded_mapped_bytes": mapped,
    }
    if task.segments:
        report |= _generate(engine, ids, task)
    return report


def _generate(engine: Engine, ids: list[int], task: Task) -> dict[str, Any]:
    """Seconds to the first token of the prompt, and tokens per second of every segment after it."""
    total = len(ids) + 1 + task.segments * task.segment_tokens
    start = time.perf_counter()
    tokens = [engine.start(ids, total)]
    prefill_seconds = time.perf_counter() - start
    rates = []
    for _ in range(task.segments):
        start = time.perf_counter()
        tokens += [engine.step() for _ in range(task.segment_tokens)]
        rates.append(task.segment_tokens / (time.perf_counter() - start))
    return {"prefill_seconds": prefill_seconds, "segment_rates": rates, "tokens": tokens}


def prepack(model: Path, target: Path) -> dict[str, Any]:
    """Save `model` as ONNX Runtime holds it in memory on this processor, into `target` and a `.data` file beside it."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(target)
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{target.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    start = time.perf_counter()
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return {"seconds": time.perf_counter() - start}


def main(command: str, *arguments: str) -> None:
    """Run one command and print its result."""
    if command == "prepack":
        result = prepack(Path(arguments[0]), Path(arguments[1]))
    else:
        result = decode(Task(**json.loads(arguments[0])))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
