"""Greedy generation through onnxruntime-genai, batched, stopped as soon as every text is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnxruntime_genai as genai

from pipeline.errors import EvaluationError
from pipeline.files import read_json

_CHECK_EVERY = 8  # steps between looks at the text: decoding it costs more than a token of a small model
_LOGIT_BYTES = 1 << 29  # the runtime computes the logits of every prompt position of a batch


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
    """Continues prompts greedily with the model and tokenizer of one folder."""

    def __init__(self, folder: Path):
        self.model = load(folder)
        self.tokenizer = genai.Tokenizer(self.model)
        settings = read_json(folder / "genai_config.json")["model"]
        stops = settings["eos_token_id"]
        self.stop_ids = set(stops if isinstance(stops, list) else [stops])
        self.vocab = settings["vocab_size"]

    def batches(self, prompts: Sequence[str]) -> Iterator[list[int]]:
        """Indices of `prompts` in batches of similar length, the longest first, as large as their logits allow.

        A batch pays for its weights once and for its longest prompt in every row.
        """
        lengths = [len(self.tokenizer.encode(prompt)) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
        while order:
            rows = max(1, _LOGIT_BYTES // (4 * self.vocab * lengths[order[0]]))
            yield order[:rows]
            order = order[rows:]

    def continuations(self, prompts: Sequence[str], max_new_tokens: int, complete: Callable[[str], bool]) -> list[str]:
        """The text after each prompt of one batch, at most `max_new_tokens` tokens, end-of-text tokens cut off.

        A row that is `complete` goes on only as long as others need; the caller cuts it.
        """
        prefix = max(len(self.tokenizer.encode(prompt)) for prompt in prompts)
        params = genai.GeneratorParams(self.model)
        # The KV cache is allocated for max_length: what this batch needs, not the model's context.
        params.set_search_options(max_length=prefix + max_new_tokens, batch_size=len(prompts), do_sample=False)
        generator = genai.Generator(self.model, params)
        generator.append_tokens(self.tokenizer.encode_batch(list(prompts)))
        for step in range(max_new_tokens):
            if generator.is_done():
                break
            generator.generate_next_token()
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                rows = [self._text(generator, row, prefix) for row in range(len(prompts))]
                if all(ended or complete(text) for text, ended in rows):
                    break
        return [self._text(generator, row, prefix)[0] for row in range(len(prompts))]

    def _text(self, generator: genai.Generator, row: int, prefix: int) -> tuple[str, bool]:
        """The row's new text and whether it has ended by itself."""
        ids = [int(token) for token in generator.get_sequence(row)[prefix:]]
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), None)
        return self.tokenizer.decode(ids[:end]), end is not None
