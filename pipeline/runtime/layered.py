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

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from pipeline.checkpoint.architecture import Architecture, bias_of
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.files import atomic_file, read_json, write_json
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.progress import Progress
from pipeline.runtime.session import SliceRun, open_slice

_QUESTIONS = "questions.json"


class Question(NamedTuple):
    """Token ids after those of the question with the name `past`; None: after nothing."""

    past: str | None
    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """SHA-256 of all that it asks, what it continues included: 64 hex digits, the same in every run."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class Listener:
    """A stand-in for `OnnxDecoder` that hears questions, each after the one that it continues. All logits are zero."""

    def __init__(self, vocab: int):
        self.questions: dict[str, Question] = {}
        self._vocab = vocab

    def run(self, ids: Sequence[int], past: str | None = None) -> tuple[np.ndarray, str]:
        """float32 zeros [len(ids), vocab], and the question's name."""
        question = Question(past, tuple(map(int, ids)))
        self.questions[question.name] = question
        return np.broadcast_to(np.float32(0), (len(ids), self._vocab)), question.name


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
        self._questions: dict[str, Question] = {}
        self._starts: dict[str, int] = {}  # the first token of each question in a file of hidden states
        self._head, self._bias = np.empty((0, architecture.hidden), np.float32), np.empty(0, np.float32)

    def prepare(self, ask: Callable[[Listener], object]) -> None:
        """Announce all that `ask` asks. It must ask the same whatever the logits are.

        Raises:
            EvaluationError: ONNX Runtime refuses a layer.
            OSError: the disk is full (wrap the work in `files.disk_full`).
        """
        listener = Listener(self._architecture.vocab)
        ask(listener)
        if not listener.questions:
            return
        self._questions = self._resume(listener.questions)
        lengths = (len(question.ids) for question in self._questions.values())
        self._starts = dict(zip(self._questions, accumulate(lengths, initial=0), strict=False))
        last = self._architecture.layers + 1
        with Progress(f"layers of {self._label}", last + 1, "layers") as progress:
            done = next((number for number in range(last, -1, -1) if self._file(number).exists()), -1)
            progress.advance(done + 1, kept=True)
            for number in range(done + 1, last + 1):
                self._pass(number)
                progress.advance()
        checkpoint, head = Checkpoint(self._weights), self._architecture.head
        self._head, self._bias = checkpoint.rows(head.name), bias_of(head, checkpoint)

    def run(self, ids: Sequence[int], past: str | None = None) -> tuple[np.ndarray, str]:
        """Logits, float32 [len(ids), vocab], of `ids` after the state `past`, and the state after them.

        Raises EvaluationError for what was not announced.
        """
        name = Question(past, tuple(map(int, ids))).name
        if name not in self._questions:
            raise EvaluationError(
                f"{self._label}: {len(ids)} tokens were not announced to the layer-by-layer decoder. This is a bug."
            )
        return self._hidden(self._architecture.layers + 1, name) @ self._head.T + self._bias, name

    def _resume(self, asked: dict[str, Question]) -> dict[str, Question]:
        """The questions whose hidden states lie in the folder if those that are asked are all among them."""
        try:
            stored = [Question(past, tuple(ids)) for past, ids in read_json(self._states / _QUESTIONS)]
        except (OSError, ValueError):
            stored = []
        kept = {question.name: question for question in stored}
        if asked.keys() <= kept.keys():
            return kept
        shutil.rmtree(self._states, ignore_errors=True)
        write_json(self._states / _QUESTIONS, list(asked.values()))
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
        kept: dict[str | None, dict[str, np.ndarray]] = {}  # keys and values of questions that others continue
        following = Counter(question.past for question in self._questions.values())
        lengths: dict[str | None, int] = {None: 0}
        for name, (past, ids) in self._questions.items():
            lengths[name] = len(ids) + lengths[past]
            arrays = {**kept.get(past, {}), "input_ids": np.array([ids], np.int64)}
            arrays["attention_mask"] = np.ones((1, lengths[name]), np.int64)
            if part.source:
                arrays[part.source] = self._hidden(number - 1, name)[None]
            hidden, *cache = run([output, *(present if following[name] else [])], arrays)
            if following[name]:
                kept[name] = dict(zip(names, cache, strict=True))
            following[past] -= 1
            if not following[past]:
                kept.pop(past, None)
            yield hidden[0]

    def _hidden(self, number: int, question: str) -> np.ndarray:
        """A question's hidden states in a file, float32 [tokens, hidden]."""
        width, start, tokens = self._architecture.hidden, self._starts[question], len(self._questions[question].ids)
        values = np.fromfile(self._file(number), np.float32, tokens * width, offset=4 * start * width)
        return values.reshape(tokens, width)
