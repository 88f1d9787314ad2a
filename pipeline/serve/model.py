"""One model folder that answers chats in onnxruntime-genai, a token at a time.

Tokens that a prompt shares with what was read before are not computed again. The runtime holds Python's lock during a
call, so a long prompt is read in the chunks that the bundle's own configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from google.protobuf.message import DecodeError

from pipeline.errors import EvaluationError
from pipeline.files import read_json
from pipeline.runtime.chat import template_text
from pipeline.runtime.generate import Prompter, load
from pipeline.serve.engine import Message
from pipeline.workspace import GENAI_CONFIG


class Chats(Prompter):
    """How chats become a folder's tokens. Its weights are not loaded."""

    def __init__(self, folder: Path):
        """Raises EvaluationError when onnxruntime-genai cannot load the tokenizer or genai_config.json lacks a key."""
        try:
            super().__init__(folder)
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{folder / GENAI_CONFIG} is not complete: its model lacks {error}.") from None
        self.has_template = self._rendered([{"role": "user", "content": "Hello"}]) is not None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the answer begins: by the chat template, or of the plain text of a model without one.

        Raises EvaluationError when the template refuses the messages, or nothing is in them.
        """
        text = self._rendered(messages) if self.has_template else None
        if text is None:
            text = "".join(one["content"] + "\n" * (one["role"] == "assistant") for one in messages)
        if not (ids := list(map(int, self.tokenizer.encode(text)))):
            raise EvaluationError(f"{self.folder}: an empty prompt cannot be continued. Give it a first word.")
        return ids

    def _rendered(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        except Exception as error:  # the bindings raise plain RuntimeError and their own types
            if not template_text(self.folder):
                return None
            raise EvaluationError(
                f"{self.folder}: onnxruntime-genai cannot render the chat template with these messages: {error}."
            ) from None


@dataclass(frozen=True)
class Step:
    """One token: the whole characters that it completes, whether it ends the text, its log-probability if asked."""

    token: int
    text: str
    stops: bool
    logprob: float | None


class Model:
    """Weights in memory, and the text that is being written. `begin` one, `read` its prompt, then `step`."""

    def __init__(self, chats: Chats):
        """Load the folder of `chats`. Raises EvaluationError when onnxruntime-genai refuses it."""
        self._chats = chats
        try:
            self._model = load(chats.folder)
        except DecodeError as error:
            raise EvaluationError(f"{chats.folder}: its graph cannot be read: {error}.") from None
        # LongRoPE's factors change within the context; such models' configuration has chunks of 0: whole prompts.
        self._chunk = read_json(chats.folder / GENAI_CONFIG).get("search", {}).get("chunk_size")
        self._generator: Any = None
        self._search: dict[str, Any] | None = None
        self._stream: Any = None

    def begin(self, ids: Sequence[int], search: dict[str, Any], fresh: bool = False) -> list[Sequence[int]]:
        """Begin a text after the prompt `ids`: the parts of it that are still to be read, in order.

        Args:
            search: the runtime's search options; others are those of genai_config.json.
            fresh: read all of it again, so that the text depends on nothing that was asked before.
        """
        with self._runtime():
            self._stream = self._chats.tokenizer.create_stream()
            kept = 0
            if self._generator is not None and self._search == search and self._chunk != 0 and not fresh:
                # At least one is computed: logits are those of the last.
                pairs = zip(ids[:-1], map(int, self._generator.get_sequence(0)), strict=False)
                kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                self._generator.rewind_to(kept)
            else:
                self._generator = None  # two caches need not fit
                params = genai.GeneratorParams(self._model)
                params.set_search_options(max_length=self._chats.context, **search)
                self._generator, self._search = genai.Generator(self._model, params), search
        size = self._chunk or len(ids)
        return [ids[start : start + size] for start in range(kept, len(ids), size)]

    def read(self, ids: Sequence[int]) -> None:
        """Compute a part of the prompt."""
        with self._runtime():
            self._generator.append_tokens(ids)

    def step(self, logprobs: bool = False) -> Step:
        """Write a token."""
        with self._runtime():
            logits = self._generator.get_logits()[0, -1] if logprobs else None
            self._generator.generate_next_token()
            token = int(self._generator.get_next_tokens()[0])
            stops = token in self._chats.stop_ids
            text = "" if stops else self._stream.decode(token)
        return Step(token, text, stops, None if logits is None else _logprob(logits, token))

    @contextmanager
    def _runtime(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._generator = None  # whatever state it is in
            raise EvaluationError(f"{self._chats.folder}: onnxruntime-genai cannot generate: {error}") from None


def _logprob(logits: np.ndarray, token: int) -> float:
    """Natural logarithm of a token's probability under logits [vocab]."""
    wide = logits.astype(np.float64) - logits.max()
    return float(wide[token] - np.log(np.exp(wide).sum()))
