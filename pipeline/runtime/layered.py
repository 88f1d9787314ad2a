"""A full-precision model larger than memory as a decoder: all that it will be asked passes it layer by layer, at once.

A decoder answers one question after the other, and each answer reads every weight: hours of disk when they do not stay
in memory. Here the questions are heard first, from whoever will ask them, with answers that mean nothing; then all of
them pass one layer before the next is loaded, so weights are read once; then the same questions are answered. Memory is
one layer in float32, or the head; hidden states lie in files, float32 [tokens, hidden] before each layer, of which one
is kept: an interrupted pass goes on at its layer.

A question may continue an earlier one, as an answer does its prompt: in each layer it then finds that one's keys and
values, which are kept as long as continuations follow.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.files import atomic_file, read_json, write_json
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.progress import Progress
from pipeline.runtime.session import SliceRun, open_slice

_QUESTIONS = "questions.json"


class Question(NamedTuple):
    """Token ids after those of the question with number `past`; None: after nothing."""

    past: int | None
    ids: tuple[int, ...]


class Listener:
    """A stand-in for `OnnxDecoder` that hears questions, each after the one that it continues. All logits are zero."""

    def __init__(self, vocab: int):
        self.numbers: dict[Question, int] = {}
        self._vocab = vocab

    def run(self, ids: Sequence[int], past: int | None = None) -> tuple[np.ndarray, int]:
        """float32 zeros [len(ids), vocab], and the question's number."""
        number = self.numbers.setdefault(Question(past, tuple(map(int, ids))), len(self.numbers))
        return np.broadcast_to(np.float32(0), (len(ids), self._vocab)), number


class LayeredDecoder:
    """A decoder graph as a function from tokens to logits, for tokens that were announced."""

    def __init__(self, graph: Path, architecture: Architecture, states: Path, label: str):
        """
        Args:
            graph: the full-precision graph in the folder of its weights.
            states: a folder of this decoder's own, which the caller removes when nothing is left to be asked.
            label: what people call the model.
        """
        self._slices = DecoderSlices(onnx.load(graph, load_external_data=False), architecture, cache=True)
        self._architecture, self._weights, self._states, self._label = architecture, graph.parent, states, label
        self._numbers: dict[Question, int] = {}
        self._starts: list[int] = []
        self._head = np.empty((0, architecture.hidden), np.float32)

    def prepare(self, ask: Callable[[Listener], object]) -> None:
        """Announce all that `ask` asks. It must ask the same whatever the logits are.

        Raises:
            EvaluationError: ONNX Runtime refuses a layer.
            OSError: the disk is full (wrap the work in `files.disk_full`).
        """
        listener = Listener(self._architecture.vocab)
        ask(listener)
        if not listener.numbers:
            return
        self._numbers = self._resume(listener.numbers)
        self._starts = np.cumsum([0, *(len(question.ids) for question in self._numbers)]).tolist()
        last = self._architecture.layers + 1
        with Progress(f"layers of {self._label}", last + 1, "layers") as progress:
            done = next((number for number in range(last, -1, -1) if self._file(number).exists()), -1)
            progress.advance(done + 1, kept=True)
            for number in range(done + 1, last + 1):
                self._pass(number)
                progress.advance()
        self._head = Checkpoint(self._weights).rows(self._architecture.head.name)

    def run(self, ids: Sequence[int], past: int | None = None) -> tuple[np.ndarray, int]:
        """Logits, float32 [len(ids), vocab], of `ids` after the state `past`, and the state after them.

        Raises EvaluationError for what was not announced.
        """
        number = self._numbers.get(Question(past, tuple(map(int, ids))))
        if number is None:
            raise EvaluationError(
                f"{self._label}: {len(ids)} tokens were not announced to the layer-by-layer decoder. This is a bug."
            )
        return self._hidden(self._architecture.layers + 1, number) @ self._head.T, number

    def _resume(self, asked: dict[Question, int]) -> dict[Question, int]:
        """The questions whose hidden states lie in the folder if those that are asked are all among them."""
        try:
            kept = {Question(past, tuple(ids)): n for n, (past, ids) in enumerate(read_json(self._states / _QUESTIONS))}
        except (OSError, ValueError):
            kept = {}
        if _chains(asked) <= _chains(kept):
            return kept
        shutil.rmtree(self._states, ignore_errors=True)
        write_json(self._states / _QUESTIONS, list(asked))
        return asked

    def _file(self, number: int) -> Path:
        """Hidden states after the embedding (0), after each layer, and after the last norm."""
        return self._states / f"hidden.{number}"

    def _pass(self, number: int) -> None:
        """All questions through the embedding (0), a layer, or the last norm."""
        part = self._slices.layer(number - 1) if number else self._slices.embedding()
        run = open_slice(part.model, self._weights)
        with atomic_file(self._file(number)) as file:
            for hidden in self._outputs(run, part, number):
                file.write(np.ascontiguousarray(hidden).data)
        self._file(number - 1).unlink(missing_ok=True)

    def _outputs(self, run: SliceRun, part: Slice, number: int) -> Iterator[np.ndarray]:
        """Hidden states of each question after a slice, float32 [tokens, hidden]."""
        output, present = part.target or part.taps["head"], list(part.cached.values())
        names = [name.replace("present.", "past_key_values.") for name in present]
        kept: dict[int | None, dict[str, np.ndarray]] = {}  # keys and values of questions that others continue
        following = Counter(question.past for question in self._numbers)
        lengths: list[int] = []
        for index, (past, ids) in enumerate(self._numbers):
            lengths.append(len(ids) + (0 if past is None else lengths[past]))
            arrays = {**kept.get(past, {}), "input_ids": np.array([ids], np.int64)}
            arrays["attention_mask"] = np.ones((1, lengths[index]), np.int64)
            if part.source:
                arrays[part.source] = self._hidden(number - 1, index)[None]
            hidden, *cache = run([output, *(present if following[index] else [])], arrays)
            if following[index]:
                kept[index] = dict(zip(names, cache, strict=True))
            if past is not None:
                following[past] -= 1
                if not following[past]:
                    del kept[past]
            yield hidden[0]

    def _hidden(self, number: int, question: int) -> np.ndarray:
        """A question's hidden states in a file, float32 [tokens, hidden]."""
        width, start, stop = self._architecture.hidden, *self._starts[question : question + 2]
        values = np.fromfile(self._file(number), np.float32, (stop - start) * width, offset=4 * start * width)
        return values.reshape(stop - start, width)


def _chains(questions: dict[Question, int]) -> set[tuple[Any, ...]]:
    """Each question as (the one that it continues, its ids), whatever numbers they have."""
    found: list[tuple[Any, ...]] = []
    for past, ids in questions:
        found.append((None if past is None else found[past], ids))
    return set(found)
