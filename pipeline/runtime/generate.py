"""Generation through onnxruntime-genai: greedy or sampled, batched, stopped as soon as every text is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime_genai as genai

from pipeline.errors import EvaluationError
from pipeline.files import read_json
from pipeline.runtime.chat import END_OF_THINKING, is_thinking, opens_thinking

_CHECK_EVERY = 8  # steps between looks at the text: decoding it costs more than a token of a small model
_LOGIT_BYTES = 1 << 29  # the runtime computes the logits of every prompt position of a batch
_CACHE_BYTES = 1 << 31  # keys and values of a batch, allocated for its longest text

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
    """How the tokens of a batch are drawn: from the smallest set whose probability reaches `top_p`."""

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


def load(folder: Path) -> genai.Model:
    """Load a folder that holds genai_config.json, for batched prompts, on all cores.

    Raises EvaluationError when onnxruntime-genai refuses it.
    """
    try:
        settings = genai.Config(str(folder))
        # Chunked prefill serves one prompt at a time; a batch whose rows differ in length is refused with it. Left to
        # itself the runtime uses half of the cores.
        threads = {"intra_op_num_threads": os.cpu_count() or 1}
        settings.overlay(json.dumps({"search": {"chunk_size": 0}, "model": {"decoder": {"session_options": threads}}}))
        return genai.Model(settings)
    except Exception as error:  # the bindings raise plain RuntimeError and their own types
        raise EvaluationError(f"{folder}: onnxruntime-genai cannot load it: {error}") from None


class Writer:
    """Continues prompts with the model and tokenizer of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = load(folder)
        self.tokenizer = genai.Tokenizer(self.model)
        settings = read_json(folder / "genai_config.json")["model"]
        decoder, stops = settings["decoder"], settings["eos_token_id"]
        self.stop_ids = set(stops if isinstance(stops, list) else [stops])
        self.vocab, self.context = settings["vocab_size"], settings["context_length"]
        channels = decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        self.cache_bytes = 2 * 4 * channels  # of one token, in float32

    def chat(self, request: str) -> str:
        """The prompt for a user's request, by the model's own chat template.

        Raises EvaluationError when the model has none, or it cannot be rendered.
        """
        try:
            return self.tokenizer.apply_chat_template(
                json.dumps([{"role": "user", "content": request}]), add_generation_prompt=True
            )
        except Exception as error:  # as in `load`
            raise EvaluationError(
                f"{self.folder}: onnxruntime-genai cannot render the chat template: {error}. A model without one is "
                f"asked by completion: set `humaneval_prompt: completion` in its entry."
            ) from None

    def rows(self, prompt_tokens: int, limits: Limits) -> int:
        """Prompts of this length that one batch can hold, by its logits and its keys and values; at least one."""
        by_logits = _LOGIT_BYTES // (4 * self.vocab * prompt_tokens)
        return max(1, min(by_logits, _CACHE_BYTES // (self.cache_bytes * (prompt_tokens + limits.total))))

    def tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt."""
        return len(self.tokenizer.encode(prompt))

    def batches(self, prompts: Sequence[str], limits: Limits) -> Iterator[list[int]]:
        """Indices of `prompts` in batches of similar length, the longest first, as large as memory allows.

        A batch pays for its weights once and for its longest prompt in every row.
        """
        lengths = [self.tokens(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
        while order:
            rows = self.rows(lengths[order[0]], limits)
            yield order[:rows]
            order = order[rows:]

    def continuations(
        self, prompts: Sequence[str], limits: Limits, complete: Complete, sampling: Sampling | None = None
    ) -> list[Written]:
        """The text after each prompt of one batch: greedy, or drawn as `sampling` says.

        A text ends with an end-of-text token, with the look (every 8 tokens) that finds its answer `complete`, or at
        its limit. Greedy ones do not depend on the batch they are in; drawn ones do, and on the order of its rows.

        Raises:
            EvaluationError: the longest prompt and the limits exceed the model's context.
        """
        prefix = max(map(self.tokens, prompts))
        if prefix + limits.total > self.context:
            raise EvaluationError(
                f"{self.folder}: a prompt of {prefix:,} tokens with {limits.thinking:,} to think and {limits.answer:,} "
                f"to answer exceeds the context of {self.context:,}. Lower the suite's limits under `humaneval` in "
                f"configs/evaluation, or raise `context` in the model's entry."
            )
        # Some models' thinking markers are special tokens, which decoding would leave out.
        self.tokenizer.update_options(skip_special_tokens="false" if limits.thinking else "true")
        params = genai.GeneratorParams(self.model)
        # The KV cache is allocated for max_length: what this batch needs, not the model's context.
        search = self._search(sampling)
        params.set_search_options(max_length=prefix + limits.total, batch_size=len(prompts), **search)
        generator = genai.Generator(self.model, params)
        generator.append_tokens(self.tokenizer.encode_batch(list(prompts)))
        rows = [_Row(self, limits, complete, opens_thinking(prompt)) for prompt in prompts]
        for step in range(1, limits.total + 1):
            generator.generate_next_token()
            # The generator's own sequence may lack the end-of-text token.
            for row, token in zip(rows, generator.get_next_tokens(), strict=True):
                row.ids.append(int(token))
            last = generator.is_done() or step == limits.total
            if last or step % _CHECK_EVERY == 0:
                for row in rows:
                    row.look()
                if last or all(row.written for row in rows):
                    break
        return [written for row in rows if (written := row.written)]

    def _search(self, sampling: Sampling | None) -> dict[str, float | int | bool]:
        """Without `top_k` the model's own default would limit the draw; with 0 the runtime does not honour `top_p`."""
        if sampling is None:
            return {"do_sample": False}
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "random_seed": sampling.seed}
        return {"do_sample": True, "top_k": self.vocab, **drawn}


class _Row:
    """One text of a batch while its `ids` grow; `written` once it has ended, whatever follows."""

    def __init__(self, writer: Writer, limits: Limits, complete: Complete, opened: bool) -> None:
        self._writer, self._limits, self._complete, self._opened = writer, limits, complete, opened
        self._answer_from: int | None = None if limits.thinking else 0
        self.ids: list[int] = []
        self.written: Written | None = None

    def look(self) -> None:
        """Decide whether the text has ended, and where."""
        if self.written:
            return
        ids = self.ids
        stop = next((index for index, token in enumerate(ids) if token in self._writer.stop_ids), None)
        told = ids[:stop]
        if self._answer_from is None:
            self._answer_from = self._end_of_thinking(told)
        begun = self._answer_from is not None
        most = self._answer_from + self._limits.answer if begun else self._limits.thinking
        text = self._decode(told[:most])
        if begun and self._complete(text):
            self.written = Written(tuple(told[:most]), text, "")
        elif len(told) > most or (len(told) == most and stop is None):
            self.written = Written(tuple(told[:most]), text, "answer" if begun else "thinking")
        elif stop is not None:
            self.written = Written(tuple(ids[: stop + 1]), text, "")

    def _end_of_thinking(self, ids: list[int]) -> int | None:
        """Number of tokens up to where the answer begins, within the limit; 0 for a text that does not think."""
        ids = ids[: self._limits.thinking]
        text = self._decode(ids)
        if is_thinking(text, self._opened):
            return None
        if END_OF_THINKING not in text:
            return 0
        # A marker once closed stays closed, so its last token can be found by bisection.
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if is_thinking(self._decode(ids[:middle]), self._opened):
                low = middle + 1
            else:
                high = middle
        return low

    def _decode(self, ids: list[int]) -> str:
        return self._writer.tokenizer.decode(ids)
