"""What goes over the wire: OpenAI's chat completions, as far as an engine honours them. The rest is refused by name.

https://platform.openai.com/docs/api-reference/chat. `return_token_ids` is vLLM's: token ids beside the text. `x_tags`
(what a message is, such as "private"), `x_situation` (what an app knows of its phone) and `x_origin` (who answered)
are ours.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from pipeline.serve.engine import Message, Piece, Settings, standing
from pipeline.serve.hybrid.policy import Situation

_NEUTRAL: dict[str, Any] = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "top_logprobs": 0, "tools": [],
    "store": False, "response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto",
}  # fmt: skip
"""Parameters that are taken where they ask for nothing; None asks for nothing anywhere."""

# The runtime reads C strings: behind a NUL the rest would be lost in silence.
_Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
_Stop = Annotated[str, StringConstraints(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: _Text


class ChatMessage(_Strict):
    """A message of a chat; `name` is not shown to the model."""

    role: Literal["system", "user", "assistant"]
    content: _Text | list[TextPart]
    name: str | None = None

    def plain(self) -> Message:
        """As engines take it."""
        whole = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": whole}


class StreamOptions(_Strict):
    """What a stream says besides."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """A request for an answer to a chat. What it leaves out is as the bundle's own configuration says."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: list[_Stop] = Field([], max_length=4)
    seed: int | None = Field(None, ge=0, lt=2**31)
    logprobs: bool = False
    return_token_ids: bool = False
    user: str | None = None
    x_tags: list[str] = []
    x_situation: Situation | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None and _NEUTRAL.get(key) != value}

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    def plain(self) -> list[Message]:
        """The messages, as engines take them."""
        return [message.plain() for message in self.messages]

    def settings(self) -> Settings:
        """The rest, as engines take it."""
        most = self.max_completion_tokens or self.max_tokens
        return Settings(most, self.temperature, self.top_p, tuple(self.stop), self.seed, self.logprobs)


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error's body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Answer:
    """The bodies of one answer: whole, or chunk by chunk."""

    def __init__(self, request: ChatRequest):
        self._request = request
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of an answer that is not streamed."""
        pieces = standing(pieces)
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": pieces[-1].finish_reason} | self._extras(pieces)
        return {
            **self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(pieces[-1]),
            **_origin(pieces[-1]),
        }  # fmt: skip

    def chunk(self, piece: Piece, first: bool) -> str:
        """A piece as server-sent events, "" where it has nothing to say yet."""
        asked = self._request.logprobs or self._request.return_token_ids
        if not (first or piece.text or piece.origin or piece.finish_reason or asked):
            return ""
        delta = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        choice = {"index": 0, "delta": delta, "finish_reason": piece.finish_reason} | self._extras([piece])
        events = [self._event([choice], **_origin(piece))]
        if piece.finish_reason and self._request.stream_options.include_usage:
            events.append(self._event([], usage=_usage(piece)))
        return "".join(events)

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **extra})

    def _extras(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """Log-probabilities and ids, where they are asked for."""
        tokens = [piece for piece in pieces if piece.token_id is not None]
        found: dict[str, Any] = {"logprobs": None}
        if self._request.logprobs:
            rows: list[dict[str, Any]] = [
                {"token": piece.text, "logprob": piece.logprob, "bytes": None, "top_logprobs": []} for piece in tokens
            ]
            found["logprobs"] = {"content": rows, "refusal": None}
        return found | ({"token_ids": [piece.token_id for piece in tokens]} if self._request.return_token_ids else {})


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


END = "data: [DONE]\n\n"


def _usage(piece: Piece) -> dict[str, int] | None:
    if piece.usage is None:
        return None
    prompt, completion = piece.usage.prompt, piece.usage.completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _origin(piece: Piece) -> dict[str, Any]:
    return {"x_origin": asdict(piece.origin)} if piece.origin else {}
