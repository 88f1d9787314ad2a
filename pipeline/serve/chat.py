"""A conversation with a bundle on this machine: verified, loaded as it says, each answer streamed token by token.

Only answers go to stdout; what is said about them goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import onnxruntime_genai as genai
from google.protobuf.message import DecodeError

from pipeline.bundle.release import CONTENT
from pipeline.bundle.verify import verify
from pipeline.errors import BundleError, EvaluationError
from pipeline.files import read_json
from pipeline.runtime.chat import template_text
from pipeline.runtime.generate import Prompter, load
from pipeline.workspace import ARTIFACTS, GENAI_CONFIG

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
        self.folder = folder
        try:
            self._model, self._prompter = load(folder), Prompter(folder)
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{folder / GENAI_CONFIG} is not complete: its model lacks {error}.") from None
        except DecodeError as error:
            raise EvaluationError(f"{folder}: its graph cannot be read: {error}.") from None
        self._search: dict[str, Any] = {"max_length": self._prompter.context}
        self._search |= {"do_sample": False} if greedy else {}
        self._search |= {} if seed is None else {"random_seed": seed}
        # LongRoPE's factors change within the context, where such models are run in whole prompts: nothing is reused.
        self._reuses = read_json(folder / GENAI_CONFIG).get("search", {}).get("chunk_size", 1) != 0
        self._generator: Any = None
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = self._start
        self.has_template = self._rendered([{"role": "user", "content": "Hello"}]) is not None
        if system and not self.has_template:
            raise EvaluationError(f"{folder} has no chat template, so it takes no system message: leave out --system.")

    @property
    def context(self) -> int:
        """Tokens that a conversation may have."""
        return self._prompter.context

    def answer(self, text: str, show: Callable[[str], object], max_tokens: int | None = None) -> Answer:
        """Answer a message, `show` each piece as it is generated, and remember both. Ctrl-C ends the answer.

        A conversation that has no room left is forgotten, and `cut` of the answer says so.

        Raises:
            EvaluationError: the message alone exceeds the context, the chat template refuses it, or the model fails.
        """
        message = {"role": "user", "content": text}
        before, forgotten = self.messages, ""
        ids = self._encoded([*before, message])
        if len(ids) >= self.context and before != self._start:
            forgotten = f"the context of {self.context:,} tokens was full: the conversation before it is forgotten"
            before = self._start
            ids = self._encoded([*before, message])
        if len(ids) >= self.context:
            raise EvaluationError(
                f"{self.folder}: a message of {len(ids):,} tokens leaves no room for an answer in the context of "
                f"{self.context:,}. Shorten it."
            )
        try:
            answer = self._generate(ids, show, max_tokens, forgotten)
        except RuntimeError as error:  # of the runtime
            raise EvaluationError(f"{self.folder}: onnxruntime-genai cannot generate: {error}") from None
        self.messages = [*before, message, {"role": "assistant", "content": answer.text}]
        return answer

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens up to where the answer begins: by the chat template, or of the plain text of a model without one."""
        text = self._rendered(messages)
        if text is None:
            text = "".join(one["content"] + "\n" * (one["role"] == "assistant") for one in messages)
        if not (ids := list(map(int, self._prompter.tokenizer.encode(text)))):
            raise EvaluationError(f"{self.folder}: an empty prompt cannot be continued. Give it a first word.")
        return ids

    def _rendered(self, messages: list[dict[str, str]]) -> str | None:
        try:
            return self._prompter.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        except Exception as error:  # the bindings raise plain RuntimeError and their own types
            if not template_text(self.folder):
                return None
            raise EvaluationError(
                f"{self.folder}: onnxruntime-genai cannot render the chat template with these messages: {error}."
            ) from None

    def _generate(self, ids: list[int], show: Callable[[str], object], most: int | None, forgotten: str) -> Answer:
        stream, text, times = self._prompter.tokenizer.create_stream(), "", [time.monotonic()]
        read, room, cuts = 0, self.context - len(ids), [forgotten]
        most = min(most or room, room)
        try:
            read = self._feed(ids)
            while len(times) <= most:
                self._generator.generate_next_token()
                times.append(time.monotonic())
                if (token := int(self._generator.get_next_tokens()[0])) in self._prompter.stop_ids:
                    break
                text += (piece := stream.decode(token))
                show(piece)
            else:
                full = f"the context of {self.context:,} tokens is full"
                cuts.append(full if most == room else f"cut at {most:,} tokens")
        except KeyboardInterrupt:
            cuts.append("stopped")
        first = times[min(1, len(times) - 1)]
        seconds = first - times[0], times[-1] - first
        return Answer(text, "; ".join(filter(None, cuts)), read, len(times) - 1, *seconds)

    def _feed(self, ids: list[int]) -> int:
        """Make `ids` what the generator has read; how many of them it had to compute."""
        kept = 0
        if self._generator is not None and self._reuses:
            # At least one is computed: logits are those of the last.
            pairs = zip(ids[:-1], map(int, self._generator.get_sequence(0)), strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self._generator.rewind_to(kept)
        else:
            params = genai.GeneratorParams(self._model)
            params.set_search_options(**self._search)
            self._generator = genai.Generator(self._model, params)
        self._generator.append_tokens(ids[kept:])
        return len(ids) - kept


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
    folder = bundle if unverified else _verified(bundle, public_keys)
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


def _verified(bundle: Path, public_keys: Sequence[Path]) -> Path:
    """The content of a bundle that verifies, a development bundle included."""
    if (bundle / GENAI_CONFIG).is_file():
        raise BundleError(
            f"{bundle} is a model's folder, not a bundle's, which holds {CONTENT}/ and model.sig. Name the bundle, or "
            f"give --unverified to load the folder as it is."
        )
    if not (bundle / CONTENT).is_dir():
        known = sorted(str(found.parent) for found in (ARTIFACTS / "bundles").glob("*/*/model.sig"))
        here = f"Bundles here: {', '.join(known)}." if known else "`dvc repro` makes those of configs/pipeline.yaml."
        raise BundleError(f"{bundle} is no folder of a bundle: it has no {CONTENT}/. {here}")
    keys = list(public_keys) or sorted((ARTIFACTS / "keys").glob("*.pem"))
    if not keys:
        raise BundleError(
            f"there is no key to verify {bundle} with: artifacts/keys holds none that signed here. Give --public-key "
            f"KEY, the PEM file of whom you trust to have made it."
        )
    report = verify(bundle, keys, allow_development=True)
    if not report.ok:
        wrong = "; ".join(map(str, report.findings))
        raise BundleError(f"{bundle} does not verify under {' or '.join(report.trusted)}: {wrong}.")
    _tell(report.describe())
    return bundle / CONTENT
