"""A conversation with a bundle on this machine: verified, loaded as it says, each answer streamed token by token.

Only answers go to stdout; what is said about them goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.bundle.release import CONTENT
from pipeline.errors import EvaluationError
from pipeline.serve.bundles import verified
from pipeline.serve.model import Chats, Model

_INTERRUPTED = 130  # the status of a program that Ctrl-C ended


@dataclass(frozen=True)
class Answer:
    """What a model said to one message.

    Attributes:
        cut: why it ended before its own end, and what was forgotten for it; "" for neither.
        read, written: tokens of the prompt that had to be computed, and tokens that were generated.
        read_seconds, write_seconds: what both took; the first new token counts to the prompt.
    """

    text: str
    cut: str
    read: int
    written: int
    read_seconds: float
    write_seconds: float

    def describe(self) -> str:
        """Its speed, in a line: the first token comes with the prompt, so one token has no speed of its own."""
        if not self.written:
            return f"[{self.cut} before the first token]"
        rate = f" at {(self.written - 1) / self.write_seconds:.1f} tokens/s" if self.written > 1 else ""
        read = f"prompt: {self.read:,} tokens at {self.read / self.read_seconds:.1f} tokens/s"
        return f"[{read}; answer: {self.written:,} tokens{rate}{self.cut and f'; {self.cut}'}]"


class Conversation:
    """A model and what was said so far. Tokens that a message shares with those before it are not computed again."""

    def __init__(self, folder: Path, system: str | None = None, greedy: bool = False, seed: int | None = None):
        """Load `folder`, which samples as its genai_config.json says unless `greedy`.

        Raises:
            EvaluationError: onnxruntime-genai cannot load it; or it has no chat template, and `system` is given.
        """
        self.folder, self._chats = folder, Chats(folder)
        if system and not self.has_template:
            raise EvaluationError(f"{folder} has no chat template, so it takes no system message: leave out --system.")
        self._model = Model(self._chats)
        self._search: dict[str, Any] = {"do_sample": False} if greedy else {}
        self._search |= {} if seed is None else {"random_seed": seed}
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = self._start

    @property
    def has_template(self) -> bool:
        """Whether messages are rendered by a chat template of the model's own."""
        return self._chats.has_template

    @property
    def context(self) -> int:
        """Tokens that a conversation may have."""
        return self._chats.context

    def answer(self, text: str, show: Callable[[str], object], max_tokens: int | None = None) -> Answer:
        """Answer a message, `show` each piece as it is generated, and remember both. Ctrl-C ends the answer.

        A conversation that has no room left is forgotten, and `cut` of the answer says so.

        Raises:
            EvaluationError: the message alone exceeds the context, the chat template refuses it, or the model fails.
        """
        message = {"role": "user", "content": text}
        before, forgotten = self.messages, ""
        ids = self._chats.encode([*before, message])
        if len(ids) >= self.context and before != self._start:
            forgotten = f"the context of {self.context:,} tokens was full: the conversation before it is forgotten"
            before = self._start
            ids = self._chats.encode([*before, message])
        if len(ids) >= self.context:
            raise EvaluationError(
                f"{self.folder}: a message of {len(ids):,} tokens leaves no room for an answer in the context of "
                f"{self.context:,}. Shorten it."
            )
        answer = self._generate(ids, show, max_tokens, forgotten)
        self.messages = [*before, message, {"role": "assistant", "content": answer.text}]
        return answer

    def _generate(self, ids: list[int], show: Callable[[str], object], most: int | None, forgotten: str) -> Answer:
        text, times, read = "", [time.monotonic()], 0
        room, cuts = self.context - len(ids), [forgotten]
        most = min(most or room, room)
        try:
            for part in self._model.begin(ids, self._search):
                self._model.read(part)
                read += len(part)
            while len(times) <= most:
                step = self._model.step()
                times.append(time.monotonic())
                if step.stops:
                    break
                text += step.text
                show(step.text)
            else:
                full = f"the context of {self.context:,} tokens is full"
                cuts.append(full if most == room else f"cut at {most:,} tokens")
        except KeyboardInterrupt:
            cuts.append("stopped")
        first = times[min(1, len(times) - 1)]
        seconds = first - times[0], times[-1] - first
        return Answer(text, "; ".join(filter(None, cuts)), read, len(times) - 1, *seconds)


def run(
    bundle: Path,
    public_keys: Sequence[Path],
    prompt: str | None = None,
    max_tokens: int | None = None,
    unverified: bool = False,
    **options: Any,
) -> int:
    """Answer `prompt`, or line by line what is typed; the exit status. `options`: as `Conversation` takes them.

    Raises:
        BundleError: the bundle does not verify under `public_keys` (none: those that signed on this machine).
        EvaluationError: as `Conversation` and its answers; of what is typed, the message is said and the next is read.
    """
    folder = bundle
    if not unverified:
        _tell(verified(bundle, public_keys).describe())
        folder = bundle / CONTENT
    conversation = Conversation(folder, **options)
    if not conversation.has_template:
        _tell("This model has no chat template: it goes on with the text that it is given.")
    if prompt is not None:
        return _INTERRUPTED if _answer(conversation, prompt, max_tokens).cut == "stopped" else 0
    with suppress(KeyboardInterrupt):
        for line in _lines():
            try:
                _answer(conversation, line, max_tokens)
            except EvaluationError as error:
                _tell(f"error: {error}")
    _tell("")
    return 0


def _answer(conversation: Conversation, text: str, max_tokens: int | None) -> Answer:
    """Print an answer, then its speed."""
    answer = conversation.answer(_encodable(text), lambda piece: print(piece, end="", flush=True), max_tokens)
    print(flush=True)
    _tell(answer.describe())
    return answer


def _lines() -> Iterator[str]:
    """What is typed or piped, to its end, without blank lines."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        import readline  # noqa: F401  # lines that are typed can be edited and recalled

        _tell("Ctrl-C ends an answer, Ctrl-D the conversation.")
    with suppress(EOFError):
        while True:
            if line := input("> " if typed else "").strip():
                yield line


def _encodable(text: str) -> str:
    """Text whose bytes were no UTF-8, with a mark in their place."""
    return text.encode(errors="replace").decode()


def _tell(text: str) -> None:
    click.echo(text, err=True)
