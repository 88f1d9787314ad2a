"""What answers a chat, whatever it is: a bundle on this machine, a model elsewhere, or a manager that chooses.

An engine is anything with `model`, `count` and `stream`. Whoever asks it needs to know nothing more of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.errors import EvaluationError, ResourceError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""
FinishReason = Literal["stop", "length"]


class Busy(ResourceError):
    """As many wait for the engine as may. `retry_after`: seconds until there is room, by the rates measured so far."""

    def __init__(self, retry_after: float, message: str = "the engine's queue is full"):
        super().__init__(f"{message}: ask again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class TooLong(EvaluationError):
    """A prompt of `tokens` tokens that leaves no room within `limit` for the answer that was asked for."""

    def __init__(self, model: str, tokens: int, limit: int, answer: int | None = None):
        asked = f"and {answer:,} for the answer exceed" if answer else "leaves no room for an answer in"
        super().__init__(
            f"{model}: a prompt of {tokens:,} tokens {asked} the context of {limit:,}. Shorten the messages"
            f"{', or lower max_tokens' if answer else ''}."
        )
        self.tokens, self.limit = tokens, limit


class Unsupported(EvaluationError):
    """What an engine does not honour. `parameter` is its name in a request."""

    def __init__(self, parameter: str, message: str):
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class Settings:
    """How an answer is written. None: as the model's own configuration says.

    Attributes:
        max_tokens: tokens of the answer, at most; None: up to the end of the context.
        temperature: 0 takes the most likely token.
        top_p: tokens are drawn from the smallest set whose probability reaches it.
        stop: texts of which the first one ends the answer, and is not part of it.
        seed: of sampling; None: another one each time.
        logprobs: whether pieces carry the log-probability of their token.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Usage:
    """Tokens of a rendered prompt and of the answer to it, its stop token included."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Origin:
    """Who answered, and why they did.

    Attributes:
        who: the model that answered, such as "smollm2-135m/q4" or "cloud:gpt-5".
        why: a sentence with the figures that decided.
        latency: seconds to the first token; None while there is none.
        seconds: of the whole answer; None until it has ended.
        cost: dollars that it cost; None where no price is known.
    """

    who: str
    why: str
    latency: float | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    Attributes:
        text: whole characters; "" while a character lacks bytes, or a text may still become a stop.
        token_id: None where the engine has no tokens of ours.
        logprob: natural logarithm of the token's probability, where `Settings.logprobs` asked for it.
        finish_reason: of the last piece, and of no other.
        usage: of the last piece.
        origin: from engines that choose: on the first piece as far as it is known, whole on the last one. In between it
            says that the answer begins anew, by somebody else: what was shown before does not stand.
    """

    text: str = ""
    token_id: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    origin: Origin | None = None


def standing(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Those of the answer that stands: what came before it began anew is left out."""
    return pieces[max((place for place, piece in enumerate(pieces[:-1]) if piece.origin), default=0) :]


class Engine(Protocol):
    """A model that can be asked, by one asker or by many at once."""

    @property
    def model(self) -> str:
        """Its id, as a request names it."""
        ...

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that these messages become. Raises EvaluationError where they cannot be rendered."""
        ...

    def stream(
        self, messages: Sequence[Message], settings: Settings, tags: Sequence[str] = ()
    ) -> AsyncGenerator[Piece, None]:
        """The answer piece by piece, the last one with its `finish_reason` and `usage`.

        `tags` are the asker's words on the messages, such as "private", for engines that could send them elsewhere.

        Closing it (`aclose`), or cancelling the task that reads it, ends the generation within a token.

        Raises, before the first piece:
            Busy: as many wait as may.
            TooLong: the prompt leaves no room for an answer.
            Unsupported: `settings` asks for what it cannot do.
            EvaluationError: the model fails, which may also happen later.
        """
        ...
