"""Four log-likelihoods per MMLU question from one forward pass over it.

- The prompt is run once: its state serves all four answers, and an answer of one token needs nothing but the prompt's
  last logits.
- What a subject's questions have in common (five examples) is run once for all of them: lm-evaluation-harness runs it
  four times for every question.
- No token is run alone. Of one row, or one left over by blocks of 128, ONNX Runtime adds products in another order: a
  difference of float noise, which the int8 activations of quantized products amplify to 0.1 nats (SmolLM2, q4). All
  other divisions of a prompt give the same bits, so that reusing a beginning changes no score.
- Scores are kept, not only right or wrong: paired changes of a score are far more sensitive than accuracy.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import log_softmax

from pipeline.errors import EvaluationError
from pipeline.tasks.mmlu_questions import Prompt, Question
from pipeline.tasks.subject import CHUNK, Decoder, State

_BLOCK = 128  # rows of one block of ONNX Runtime's matrix products

Encode = Callable[[str], list[int]]
_NOTHING: tuple[str, list[int], State] = ("", [], None)  # text, its tokens, and a model's state after them


class Scorer:
    """Scores prompts with one model. Give those that share a beginning one after another: it is kept until another.

    `encode` maps text to token ids (with whatever start token the model wants); `context` is the most tokens that the
    model reads.
    """

    def __init__(self, encode: Encode, model: Decoder, context: int):
        self._encode, self._model, self._context = encode, model, context
        self._beginning = _NOTHING

    def scores(self, prompt: Prompt) -> np.ndarray:
        """float64 [4]: natural log-likelihood of each answer after the prompt; for `per_token`, over its tokens.

        Raises:
            EvaluationError: an answer adds no token, the prompt is longer than the context, or the model's logits are
                misshapen or not finite.
        """
        sequences = [self._encode(prompt.text + answer) for answer in prompt.answers]
        # Usually the whole prompt. Where a tokenizer merges across the boundary, the tokens that changed are scored
        # with the answer, and all four answers start from the same context.
        context = self._encode(prompt.text)
        shared = min(_common_prefix(context, sequence) for sequence in sequences)
        self._check(prompt, sequences, shared)
        logits, state = self._read(context[:shared], prompt.shared)
        totals = []
        for sequence in sequences:
            targets = sequence[shared:]
            rows = logits
            if len(targets) > 1:
                fed = targets if _leaves_one(len(targets) - 1) else targets[:-1]
                rows = np.concatenate([rows, self._run(fed, state)[0][: len(targets) - 1]])
            log_likelihood = _log_likelihood(rows, targets)
            totals.append(log_likelihood / len(targets) if prompt.per_token else log_likelihood)
        return np.array(totals)

    def _check(self, prompt: Prompt, sequences: Sequence[list[int]], shared: int) -> None:
        if shared == 0 or any(len(sequence) == shared for sequence in sequences):
            raise EvaluationError(
                f"the tokenizer leaves nothing to condition on or nothing to score after an MMLU question: "
                f"…{prompt.own[-80:]!r}. Check the checkpoint's tokenizer."
            )
        if (longest := max(map(len, sequences))) > self._context:
            raise EvaluationError(
                f"an MMLU question needs {longest:,} tokens with what precedes it, and the model's context is "
                f"{self._context:,}: …{prompt.own[-80:]!r}. Raise `context` in the model's entry in "
                f"configs/models/, or set its `mmlu_mode` to one without examples."
            )

    def _read(self, ids: list[int], beginning: str) -> tuple[np.ndarray, State]:
        """Logits [1, vocabulary] after `ids`, and the state; from the state after `beginning` if its tokens lead."""
        if beginning and beginning != self._beginning[0]:
            self._beginning = _NOTHING  # gives its memory back before the next takes some
            start = self._encode(beginning)
            self._beginning = beginning, start, self._prefill(start, None)[1]
        _, known, state = self._beginning if beginning else _NOTHING
        if not known or len(known) + 2 > len(ids) or ids[: len(known)] != known:
            return self._prefill(ids, None)  # no beginning, or a tokenizer that merges its end with what follows
        return self._prefill(ids[len(known) :], state)

    def _prefill(self, ids: list[int], state: State | None) -> tuple[np.ndarray, State]:
        """Logits [1, vocabulary] of the last of `ids` after `state`, and the state after it."""
        start = 0
        for end in _run_ends(len(ids)):
            logits, state = self._run(ids[start:end], state)
            start = end
        return logits[-1:], state

    def _run(self, ids: Sequence[int], past: State | None) -> tuple[np.ndarray, State]:
        logits, state = self._model.run(ids, past)
        if logits.ndim != 2 or logits.shape[0] != len(ids):
            raise EvaluationError(f"the model returned logits of shape {logits.shape} for {len(ids)} tokens.")
        return logits, state


def item_names(questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[str]:
    """A name for each question as it is asked, 32 hex digits: a digest of prompt, answers and which of them is right.

    The same question in a larger subset has the same name; with other examples or another template it has another.
    A question that occurs twice has two names.
    """
    seen: Counter[str] = Counter()
    names = []
    for question, prompt in zip(questions, prompts, strict=True):
        asked = json.dumps([prompt.text, prompt.answers, question.answer])
        names.append(hashlib.sha256(f"{asked} {seen[asked]}".encode()).hexdigest()[:32])
        seen[asked] += 1
    return names


def _leaves_one(rows: int) -> bool:
    """Whether one of `rows` would be computed alone."""
    return rows % _BLOCK == 1


def _run_ends(count: int) -> list[int]:
    """Where runs over `count` tokens end, so that each has at most CHUNK and, of two tokens or more, none is alone."""
    ends = [*range(CHUNK, count, CHUNK), count]
    if _leaves_one(count) and count > 1:
        return [*(end for end in ends if end < count - 2), count - 2, count]
    return ends


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))


def _log_likelihood(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Sum over positions of log softmax(logits)[target], in float64 (nats)."""
    vocabulary = logits.shape[1]
    if not all(0 <= target < vocabulary for target in targets):
        raise EvaluationError(f"the tokenizer gives token id {max(targets)}; the model's logits have {vocabulary}.")
    values = logits.astype(np.float64)
    if not np.isfinite(values).all():
        raise EvaluationError("the model's logits are not finite (overflow, or a damaged artifact).")
    return float(log_softmax(values, axis=1)[np.arange(len(targets)), list(targets)].sum())
