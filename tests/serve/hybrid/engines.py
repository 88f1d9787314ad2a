"""A device's engine of a test's words, and a manager around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.hybrid import HybridConfig
from pipeline.config.typed_yaml import check
from pipeline.serve.engine import Busy, Message, Piece, Settings, Usage
from pipeline.serve.hybrid.manager import Manager
from tests.serve.hybrid.provider import KEY, Provider

LOCAL = ("from ", "the ", "device")


@dataclass
class Device:
    """Says `words`, the log-probability of each beside it; busy for the first `busy` requests. Its tokens are words."""

    words: Sequence[str] = LOCAL
    logprobs: Sequence[float] = (-0.1, -0.1, -0.1)
    busy: int = 0
    error: Exception | None = None
    model: str = "tiny/q4"
    asked: list[Settings] = field(default_factory=list)

    def count(self, messages: Sequence[Message]) -> int:
        return sum(3 + len(message["content"].split()) for message in messages)

    async def stream(
        self, messages: Sequence[Message], settings: Settings, tags: Sequence[str] = ()
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append(settings)
        if self.busy:
            self.busy -= 1
            raise Busy(0.01)
        if self.error:
            raise self.error
        for number, (word, logprob) in enumerate(zip(self.words, self.logprobs, strict=True)):
            await asyncio.sleep(0)
            yield Piece(word, number, logprob if settings.logprobs else None)
        yield Piece(token_id=9, finish_reason="stop", usage=Usage(self.count(messages), len(self.words) + 1))


def config(folder: Path, service: Provider | None = None, **changes: Any) -> HybridConfig:
    """Dollars of 1 and 10 per million tokens, short times, and what a test changes."""
    url = service.url if service else "http://127.0.0.1:9"  # the discard port, where nobody listens
    price = {"input": 1.0, "output": 10.0, "source": "a test", "date": "2026-11-30"}
    known = {"base_url": f"{url}/v1", "model": "big", "key": "TEST_KEY", "price": price}
    plain = {
        "mode": "prefer_cloud",
        "tags": {"health": "device", "weather": "anywhere"},
        "provider": "test",
        "providers": {"test": known},
        "attempts": {"first_token": 5.0, "whole": 10.0, "pause": 0.01},
        "ledger": str(folder / "ledger.sqlite"),
    }
    return check(HybridConfig, plain | changes, "a test")


def manager(folder: Path, service: Provider | None = None, device: Device | None = None, **changes: Any) -> Manager:
    """A manager with that configuration, whose key is in its environment."""
    return Manager(device or Device(), config(folder, service, **changes), {"TEST_KEY": KEY})


USER: list[Message] = [{"role": "user", "content": "what is the weather"}]


async def collected(own: Manager, messages: Sequence[Message] = USER, **options: Any) -> list[Piece]:
    """All pieces of an answer."""
    return [piece async for piece in own.stream(messages, options.pop("settings", Settings()), **options)]
