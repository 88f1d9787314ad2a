"""Teacher forcing: every token of a text is told from those before it, whatever the chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.tasks import agreement
from pipeline.tasks.agreement import ask, force

VOCAB = 40


class Running:
    """A decoder whose logits depend on all tokens so far, in their order. Its state is what it has read."""

    def run(self, ids: Sequence[int], past: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
        read, rows = past or (), []
        for token in ids:
            read = (*read, int(token))
            rows.append(np.random.default_rng(read).normal(size=VOCAB))
        return np.array(rows, np.float32), read


def expected(prompt: list[int], text: list[int]) -> tuple[list[int], list[float]]:
    """Token by token, each from all before it."""
    top, logprob = [], []
    for index, token in enumerate(text):
        logits = Running().run([*prompt, *text[:index]])[0][-1].astype(float)
        top.append(int(logits.argmax()))
        logprob.append(logits[token] - np.log(np.exp(logits).sum()))
    return top, logprob


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 256])
@pytest.mark.parametrize(("prompt", "text"), [(1, 1), (1, 9), (9, 1), (6, 6), (7, 7), (13, 2)])
def test_every_token_is_told_from_all_before_it(
    chunk: int, prompt: int, text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "CHUNK", chunk)
    rng = np.random.default_rng(prompt + 20 * text)
    before, after = rng.integers(VOCAB, size=prompt).tolist(), rng.integers(VOCAB, size=text).tolist()
    found, (top, logprob) = force(Running(), before, after), expected(before, after)
    assert found[0].tolist() == top
    assert found[1] == pytest.approx(logprob, abs=1e-5)


def test_what_is_asked_does_not_depend_on_the_answers() -> None:
    class Heard(Running):
        def __init__(self, scale: float) -> None:
            self.scale, self.asked = scale, []

        def run(self, ids: Sequence[int], past: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
            self.asked.append((past, tuple(map(int, ids))))
            logits, state = super().run(ids, past)
            return self.scale * logits, state

    heard, answered = Heard(0), Heard(1)
    list(ask(heard, [1, 2, 3], [4, 5]))
    force(answered, [1, 2, 3], [4, 5])
    assert heard.asked == answered.asked == [(None, (1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("scale", "text", "message"),
    [(np.nan, [1], "NaN or infinity"), (np.inf, [1], "NaN or infinity"), (1, [VOCAB], "token id 40, the model has 40")],
)
def test_what_cannot_be_read_is_an_error(scale: float, text: list[int], message: str) -> None:
    class Broken(Running):
        def run(self, ids: Sequence[int], past: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
            logits, state = super().run(ids, past)
            return np.float32(scale) * logits, state

    with pytest.raises(EvaluationError, match=message):
        force(Broken(), [1, 2], text)
