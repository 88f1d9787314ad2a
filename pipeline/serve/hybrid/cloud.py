"""One attempt at an OpenAI-compatible service: what it says, piece by piece, or in a word why it failed.

A failure never quotes the service: its messages may repeat the prompt, or the key. Redirections are not followed: a
prompt goes to the address that is configured, and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import openai

from pipeline.config.hybrid import Attempts, Provider
from pipeline.errors import ConfigError
from pipeline.serve.engine import FinishReason, Message, Settings

_AFTERWARDS = 1.0  # seconds that usage may take after the end of the answer
UNBILLED = ("HTTP", "no connection")
"""How outcomes begin of which no service has read a prompt."""
_NO_KEY = "none"  # else the client would send OPENAI_API_KEY, whoever it is for

T = TypeVar("T")


class CloudFailure(Exception):
    """An attempt that failed: its outcome in a word or two, whether it may be tried again, after how many seconds."""

    def __init__(self, outcome: str, again: bool = False, after: float = 0):
        super().__init__(outcome)
        self.outcome, self.again, self.after = outcome, again, after


@dataclass(frozen=True)
class Reported:
    """Tokens that a service says it read and wrote; `hidden` of the latter it does not show (thoughts)."""

    prompt: int
    completion: int
    hidden: int = 0


@dataclass(frozen=True)
class Heard:
    """What one event added: text; at the end a reason, and the usage if it was reported."""

    text: str = ""
    finish: FinishReason | None = None
    usage: Reported | None = None


class Patience:
    """Seconds that may be spent waiting for the cloud. While the answer's reader is slow, none are."""

    def __init__(self, seconds: float):
        self.left = seconds

    async def wait(self, event: Awaitable[T], most: float | None = None) -> T:
        """The event's result. Raises TimeoutError after `most` seconds, or when no patience is left."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(self.left, self.left if most is None else most)):
                return await event
        finally:
            self.left -= time.monotonic() - began

    async def pause(self, seconds: float) -> None:
        """Wait before the next attempt."""
        self.left -= seconds
        await asyncio.sleep(seconds)


class Cloud:
    """A configured service, asked by many at once."""

    def __init__(self, provider: Provider, attempts: Attempts, environment: Mapping[str, str] = os.environ):
        """Raises ConfigError, which names the variable, where its key is not in the environment."""
        key = environment.get(provider.key, "") if provider.key else _NO_KEY
        if not key:
            raise ConfigError(
                f"the environment has no {provider.key}, which configs/hybrid.yaml names as the key of "
                f"{provider.base_url}. Set it, name another provider, or choose mode only_device."
            )
        self.provider, self._attempts = provider, attempts
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=provider.base_url,
            max_retries=0,
            timeout=attempts.whole,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )
        self._client.organization = self._client.project = None  # of the environment: they are OpenAI's, not everyone's

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def attempt(
        self, messages: Sequence[Message], settings: Settings, patience: Patience
    ) -> AsyncGenerator[Heard, None]:
        """One answer, whose last event has `finish` and which has a text. Closing it closes the connection.

        Raises CloudFailure: no first text in time, a status, a stream that is cut, malformed or empty.
        """
        due, texts, finish, usage = time.monotonic() + self._attempts.first_token, 0, None, None
        try:
            stream = await patience.wait(self._open(messages, settings), self._attempts.first_token)
            async with stream:
                while True:
                    most = _AFTERWARDS if finish else None if texts else due - time.monotonic()
                    try:
                        chunk = await patience.wait(anext(stream, None), most)
                    except Exception:
                        if finish:
                            break  # the answer is whole; what should have followed is only its usage
                        raise
                    if chunk is None:
                        break
                    heard = _heard(chunk)
                    finish, usage = finish or heard.finish, heard.usage or usage
                    if heard.text:
                        texts += 1
                        yield Heard(heard.text)
        except Exception as error:
            raise self._failure(error, texts > 0) from None
        if not finish:
            raise CloudFailure("stream cut", again=not texts)
        if not texts:
            raise CloudFailure("empty answer")
        yield Heard(finish=finish, usage=usage)

    def _open(self, messages: Sequence[Message], settings: Settings) -> Awaitable[Any]:
        provider = self.provider
        asked: dict[str, Any] = {name: getattr(settings, name) for name in provider.passes}
        asked["stop"] = list(settings.stop) if "stop" in provider.passes and settings.stop else None
        asked[provider.max_tokens] = settings.max_tokens
        if provider.reports_usage:
            asked["stream_options"] = {"include_usage": True}
        given = {name: value for name, value in asked.items() if value is not None}
        create: Any = self._client.chat.completions.create
        return create(model=provider.model, messages=list(messages), stream=True, **given)

    def _failure(self, error: Exception, heard: bool) -> CloudFailure:
        """Why an attempt failed; after a first text (`heard`), it is never tried again."""
        if isinstance(error, openai.APIStatusError):
            pause = _retry_after(error.response.headers)
            patient = pause <= self._attempts.longest_pause
            return CloudFailure(
                f"HTTP {error.status_code}",
                error.status_code in self._attempts.statuses and patient and not heard,
                pause,
            )
        outcome = "malformed event"
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            outcome = "too slow" if heard else "no first token in time"
        elif isinstance(error, openai.APIConnectionError):
            outcome = "stream cut" if heard else "no connection"
        elif isinstance(error, openai.APIError):
            outcome = "error event"
        return CloudFailure(outcome, again=not heard)


def _heard(chunk: Any) -> Heard:
    """One event of a stream. Whatever has not the form of one raises some error: the client does not check it."""
    usage = chunk.usage and _reported(chunk.usage)
    if not chunk.choices:
        return Heard(usage=usage)
    choice = chunk.choices[0]
    text = choice.delta.content or ""
    if not isinstance(text, str):
        raise TypeError
    reason = choice.finish_reason
    return Heard(text, None if reason is None else "length" if reason == "length" else "stop", usage)


def _reported(usage: Any) -> Reported | None:
    """Usage in whole numbers from 0 on; None for what is no usage."""
    details = getattr(usage, "completion_tokens_details", None)
    counts = [usage.prompt_tokens, usage.completion_tokens, getattr(details, "reasoning_tokens", None) or 0]
    valid = all(isinstance(count, int) and 0 <= count < 1 << 40 for count in counts)
    return Reported(*counts) if valid else None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, given as seconds or as a date; 0 where it does not."""
    said = headers.get("retry-after", "")
    try:
        return max(0.0, float(said) if said.replace(".", "", 1).isdigit() else _until(said))
    except (TypeError, ValueError):
        return 0.0


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
