"""Texts written by a full-precision model that memory cannot hold: many side by side, a token of each with every pass.

What a text is depends on its request alone: when it ends is `generate`'s rule, and sampling draws each token by the
seed and the token's place. Tokens are recorded after every pass, so a killed run goes on behind its last token; the
texts that were being written are read again, with what they say so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.checkpoint.architecture import Architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.journal import Journal
from pipeline.machine import share
from pipeline.progress import Progress
from pipeline.runtime.device import chosen_device
from pipeline.runtime.generate import Prompter, Request, Sampling, Written
from pipeline.runtime.side_by_side import SideBySide, fitting_texts


class LayeredWriter(Prompter):
    """Continues prompts as `generate.Writer` does, with a model of which memory holds one layer at a time."""

    def __init__(self, graph: Path, architecture: Architecture, states: Path, label: str):
        """
        Args:
            graph: the full-precision graph, in the folder of its weights, tokenizer and genai_config.json.
            states: a folder for the tokens of unfinished texts, of one set of requests and one model; the caller
                removes it when nothing is left to be asked.
            label: what people call the model.
        """
        super().__init__(graph.parent)
        self._graph, self._architecture, self._states, self._label = graph, architecture, states, label

    def continuations(self, requests: Mapping[str, Request]) -> Iterator[Written]:
        """The text of each request, in their order. Texts are written as many at a time as memory holds.

        Raises:
            EvaluationError: as `Prompter.begin`, or ONNX Runtime refuses a layer.
            CheckpointError: weights are damaged.
        """
        self._states.mkdir(parents=True, exist_ok=True)
        work = _Work(self, requests, Journal(self._states / "tokens.jsonl"))
        with Progress(f"{self._label} layer by layer", work.most, "tokens at most") as progress:
            progress.advance(work.most - work.left, kept=True)
            for name in requests:
                while name not in work.done:
                    before = work.left
                    work.advance()
                    progress.advance(before - work.left)
                yield work.done.pop(name)

    def side_by_side(self, lengths: Sequence[int]) -> tuple[SideBySide, int]:
        """The model for texts of these lengths in tokens, and how many of them its share of memory runs at once."""
        memory = round(share() * chosen_device().memory(Checkpoint(self._graph.parent).weight_bytes))
        texts = fitting_texts(self._architecture, len(lengths), max(lengths), memory)
        return SideBySide(self._graph, self._architecture, texts, max(lengths)), texts


class _Work:
    """All texts of one call.

    Attributes:
        done: those that have ended, by name.
        most, left: the tokens that all texts take at most, and those that they may still take.
    """

    def __init__(self, writer: LayeredWriter, requests: Mapping[str, Request], journal: Journal):
        """What `journal` holds of the texts is theirs."""
        self._requests, self._journal = requests, journal
        self._begun = {name: writer.begin(request) for name, request in requests.items()}
        self.done: dict[str, Written] = {}
        self.most = self.left = sum(request.limits.total for request in requests.values())
        for tokens in journal.items.values():
            self._grow({name: tokens[name] for name in tokens if name in requests})
        self._running, self._waiting = list[str](), [name for name in requests if name not in self.done]
        if self._waiting:
            limits = (len(self._begun[name][0]) + requests[name].limits.total for name in self._waiting)
            self._model, self._texts = writer.side_by_side(list(limits))

    def advance(self) -> None:
        """One pass: a token more for every text that runs, and the first for those that there is room for."""
        new = [self._waiting.pop(0) for _ in self._waiting[: self._texts - len(self._running)]]
        whole = [prefix + text.ids for prefix, text in map(self._begun.__getitem__, self._running + new)]
        old, switched = len(self._running), self._model.switch + 1
        ids = [row if place >= old or len(row) == switched else row[-1:] for place, row in enumerate(whole)]
        self._running += new
        tokens = dict(zip(self._running, map(self._draw, self._running, self._model.run(ids)), strict=True))
        self._journal.record(str(len(self._journal.items)), tokens)
        self._grow(tokens)
        for place in reversed(range(len(self._running))):
            if self._running[place] in self.done:
                self._model.drop(place)
                self._running[place] = self._running[-1]
                self._running.pop()

    def _draw(self, name: str, logits: np.ndarray) -> int:
        return draw(logits, self._requests[name].sampling, len(self._begun[name][1].ids))

    def _grow(self, tokens: Mapping[str, int]) -> None:
        for name, token in tokens.items():
            text, self.left = self._begun[name][1], self.left - 1
            if written := text.grow(token):
                self.done[name] = written
                self.left -= self._requests[name].limits.total - len(text.ids)


def draw(logits: np.ndarray, sampling: Sampling | None, place: int) -> int:
    """The next token, by logits [vocab]: the likeliest, or one of the smallest set whose probability reaches `top_p`.

    `place`: how many tokens of the text came before it.
    """
    if sampling is None:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / np.float64(sampling.temperature)
    order = np.argsort(-scaled, kind="stable")
    reached = np.cumsum(np.exp(scaled[order]))
    most = reached[np.searchsorted(reached, sampling.top_p * reached[-1])]
    number = np.random.default_rng((sampling.seed, place)).random() * most
    return int(order[np.searchsorted(reached, number, side="right")])
