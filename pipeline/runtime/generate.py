"""Generation through onnxruntime-genai: greedy or sampled, one text at a time, stopped as soon as it is complete.

A phone decodes one text at a time. Several side by side would share a pass over the weights, and would be other texts:
the kernels of quantized products round one row otherwise than two (17 of 24 greedy texts of a q4 file differed).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnxruntime_genai as genai

from pipeline.errors import EvaluationError
from pipeline.files import read_json
from pipeline.machine import cores
from pipeline.runtime.chat import END_OF_THINKING, is_thinking, opens_thinking
from pipeline.runtime.session import check_weights

# What the model's maker would have a chat sound like is not what is measured, here and layer by layer.
GREEDY: dict[str, float | int | bool] = {
    "do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
}  # fmt: skip
_CHECK_EVERY = 8  # steps between looks at the text: decoding it costs more than a token of a small model

Complete = Callable[[str], bool]


@dataclass(frozen=True)
class Limits:
    """Tokens that may be written: in the answer, and before it in thinking (0: the model does not think)."""

    answer: int
    thinking: int = 0

    @property
    def total(self) -> int:
        """The most that a text takes."""
        return self.answer + self.thinking


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are drawn: from the smallest set whose probability reaches `top_p`."""

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        ids: its tokens, the end-of-text token included.
        text: the same without that token.
        cut: which of `Limits` ended it; "" if it came to its end.
    """

    ids: tuple[int, ...]
    text: str
    cut: Literal["", "thinking", "answer"]


def derived_seed(seed: int, name: str) -> int:
    """A seed for one of many draws, the same on every machine: 31 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4]) >> 1


def load(folder: Path, overlay: Mapping[str, Any] | None = None) -> genai.Model:
    """Load a folder that holds genai_config.json, as it says with `overlay` laid over it, on all cores.

    Raises EvaluationError when onnxruntime-genai refuses it, and CheckpointError as `session.check_weights`.
    """
    for graph in folder.glob("*.onnx"):
        check_weights(graph, folder)
    try:
        settings = genai.Config(str(folder))
        # Left to itself the runtime uses half of the cores.
        threads = {"session_options": {"intra_op_num_threads": cores()}}
        settings.overlay(json.dumps({"model": {"decoder": threads}}))
        if overlay:
            settings.overlay(json.dumps(overlay))
        return genai.Model(settings)
    except Exception as error:  # the bindings raise plain RuntimeError and their own types
        raise EvaluationError(f"{folder}: onnxruntime-genai cannot load it: {error}") from None


class Request(NamedTuple):
    """A text that is asked for. `complete`: whether an answer, as far as it is written, needs no more."""

    prompt: str
    limits: Limits
    complete: Complete
    sampling: Sampling | None = None


class Prompter:
    """The tokenizer and the chat template of one folder: how texts begin, and how each ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.tokenizer = genai.Tokenizer(str(folder))
            settings = read_json(folder / "genai_config.json")["model"]
        except Exception as error:  # as in `load`
            raise EvaluationError(f"{folder}: onnxruntime-genai cannot load its tokenizer: {error}") from None
        stops = settings["eos_token_id"]
        self.stop_ids = set(stops if isinstance(stops, list) else [stops])
        self.vocab, self.context = settings["vocab_size"], settings["context_length"]

    def chat(self, request: str) -> str:
        """The prompt for a user's request, by the model's own chat template.

        Raises EvaluationError when the model has none, or it cannot be rendered.
        """
        try:
            messages = json.dumps([{"role": "user", "content": request}])
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # as in `load`
            raise EvaluationError(
                f"{self.folder}: onnxruntime-genai cannot render the chat template: {error}. A model without one is "
                f"asked by completion: set `humaneval_prompt: completion` in its entry."
            ) from None

    def begin(self, request: Request) -> tuple[list[int], Text]:
        """The prompt's tokens, and the text that is to follow them.

        Raises:
            EvaluationError: the prompt and the limits exceed the model's context.
        """
        prefix, limits = list(map(int, self.tokenizer.encode(request.prompt))), request.limits
        if len(prefix) + limits.total > self.context:
            raise EvaluationError(
                f"{self.folder}: a prompt of {len(prefix):,} tokens with {limits.thinking:,} to think and "
                f"{limits.answer:,} to answer exceeds the context of {self.context:,}. Lower the suite's limits in "
                f"configs/evaluation, or raise `context` in the model's entry."
            )
        decode = partial(self._decode, special=bool(limits.thinking))
        return prefix, Text(decode, self.stop_ids, limits, request.complete, opens_thinking(request.prompt))

    def _decode(self, ids: list[int], special: bool) -> str:
        """With special tokens where the model thinks: some models' markers are special, and would be left out."""
        self.tokenizer.update_options(skip_special_tokens="false" if special else "true")
        return self.tokenizer.decode(ids)


class Writer(Prompter):
    """Continues prompts with the model and tokenizer of one folder, held in memory."""

    def __init__(self, folder: Path):
        self.model = load(folder)
        super().__init__(folder)

    def continuations(self, requests: Mapping[str, Request]) -> Iterator[Written]:
        """The text of each request, in their order, one after the other."""
        return (self.continuation(*request) for request in requests.values())

    def continuation(
        self, prompt: str, limits: Limits, complete: Complete, sampling: Sampling | None = None
    ) -> Written:
        """The text after a prompt: greedy, or drawn as `sampling` says. It depends on nothing else.

        A text ends with an end-of-text token, with the look (every 8 tokens) that finds its answer `complete`, or at
        its limit.

        Raises:
            EvaluationError: the prompt and the limits exceed the model's context.
        """
        prefix, text = self.begin(Request(prompt, limits, complete))
        search = dict(GREEDY)
        if sampling is not None:
            # Without `top_k` the model's own would limit the draw; with 0 the runtime does not honour `top_p`.
            search |= {"do_sample": True, "top_k": self.vocab, "top_p": sampling.top_p}
            search |= {"temperature": sampling.temperature, "random_seed": sampling.seed}
        params = genai.GeneratorParams(self.model)
        # The KV cache is allocated for max_length: what this text needs, not the model's context.
        params.set_search_options(max_length=len(prefix) + limits.total, **search)
        generator = genai.Generator(self.model, params)
        generator.append_tokens(prefix)
        written = None
        while written is None:
            generator.generate_next_token()
            # The generator's own sequence may lack the end-of-text token.
            written = text.grow(int(generator.get_next_tokens()[0]))
        return written


class Text:
    """One text while its `ids` grow, whatever makes them."""

    def __init__(
        self, decode: Callable[[list[int]], str], stops: set[int], limits: Limits, complete: Complete, opened: bool
    ) -> None:
        """`opened`: whether its prompt has opened the thinking that it is to go on with."""
        self._decode, self._stops = decode, stops
        self._limits, self._complete, self._opened = limits, complete, opened
        self._answer_from: int | None = None if limits.thinking else 0
        self.ids: list[int] = []

    def grow(self, token: int) -> Written | None:
        """One token more; the text, if a look finds that it has ended."""
        self.ids.append(token)
        due = token in self._stops or len(self.ids) == self._limits.total or len(self.ids) % _CHECK_EVERY == 0
        return self.look() if due else None

    def look(self) -> Written | None:
        """The text, if it has ended."""
        ids, stopped = self.ids, self.ids[-1] in self._stops
        told = ids[:-1] if stopped else ids
        if self._answer_from is None:
            self._answer_from = self._end_of_thinking(told)
        start, limits = self._answer_from, self._limits
        begun, most = (False, limits.thinking) if start is None else (True, start + limits.answer)
        text = self._decode(told[:most])
        if begun and self._complete(text):
            return Written(tuple(told[:most]), text, "")
        if len(told) > most or (len(told) == most and not stopped):
            return Written(tuple(told[:most]), text, "answer" if begun else "thinking")
        return Written(tuple(ids), text, "") if stopped else None

    def _end_of_thinking(self, ids: list[int]) -> int | None:
        """Number of tokens up to where the answer begins, within the limit; 0 for a text that does not think."""
        ids = ids[: self._limits.thinking]
        text = self._decode(ids)
        if is_thinking(text, self._opened):
            return None
        if END_OF_THINKING not in text:
            return 0

        def ended(count: int) -> bool:
            return not is_thinking(self._decode(ids[:count]), self._opened)

        # A marker once closed stays closed, so its last token can be found by bisection.
        return bisect_left(range(len(ids)), True, key=ended)
