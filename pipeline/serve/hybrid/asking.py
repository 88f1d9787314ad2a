"""One request, asked of the device or of the cloud. Each attempt has its row in the ledger."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from pipeline.config.hybrid import Cascade, HybridConfig
from pipeline.errors import PipelineError
from pipeline.serve.engine import Busy, Engine, Message, Piece, Settings, Usage
from pipeline.serve.hybrid.bill import Bill
from pipeline.serve.hybrid.cloud import Cloud, CloudFailure, Patience
from pipeline.serve.hybrid.ledger import ANSWERED, FAILED, Attempt, Ledger
from pipeline.serve.hybrid.policy import Decision, Place, doubts


class Failed(Exception):
    """A place failed. `again`: it may be asked once more when the other one has failed too; `error`: the device's."""

    def __init__(self, said: str, again: bool = False, error: Exception | None = None):
        super().__init__(said)
        self.said, self.again, self.error = said, again, error


@dataclass(frozen=True)
class Means:
    """Whom requests are asked of, and where that is noted. `cloud`: None where the mode asks none."""

    engine: Engine
    cloud: Cloud | None
    config: HybridConfig
    ledger: Ledger
    bill: Bill


@dataclass
class Asking:
    """One request of `tokens` tokens, and its attempts so far."""

    means: Means
    messages: Sequence[Message]
    settings: Settings
    tokens: int
    decision: Decision
    attempts: list[Attempt] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def device(self, cascade: Cascade | None = None, patience: float = 0) -> AsyncGenerator[Piece, None]:
        """The device's answer. While it is busy, it is asked again for `patience` seconds.

        Raises Failed: it is busy, it fails, or the beginning of its answer is doubted (nothing of it is given then).
        """
        settings = replace(self.settings, logprobs=True) if cascade else self.settings
        while True:
            with self.means.ledger.attempt(self._attempt("device")) as row:
                try:
                    async with aclosing(self.means.engine.stream(self.messages, settings)) as pieces:
                        counted = _counted(pieces, row)
                        async for piece in _trusted(counted, cascade) if cascade else counted:
                            yield piece if self.settings.logprobs else replace(piece, logprob=None)
                    return
                except Failed:
                    row.outcome = "in doubt"
                    raise
                except Busy as busy:
                    row.outcome, pause = "busy", busy.retry_after
                    if (patience := patience - pause) < 0:
                        raise Failed("the device was busy", again=True, error=busy) from None
                except PipelineError as error:
                    row.outcome = FAILED
                    raise Failed("the device failed", error=error) from None
            await asyncio.sleep(pause)

    async def cloud(self) -> AsyncGenerator[Piece, None]:
        """The cloud's answer, by as many attempts as are allowed; none after a first text. Raises Failed."""
        limits, outcomes = self.means.config.attempts, []
        patience = Patience(limits.whole)
        for left in reversed(range(1 + limits.retries)):
            try:
                async with aclosing(self._attempt_at_cloud(patience)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except CloudFailure as failure:
                outcomes.append(failure.outcome)
                pause = max(limits.pause, failure.after)
                if not (left and failure.again and pause < patience.left):
                    raise Failed(f"the cloud failed ({', then '.join(outcomes)})") from None
            await patience.pause(pause)

    async def _attempt_at_cloud(self, patience: Patience) -> AsyncGenerator[Piece, None]:
        cloud, bill = self.means.cloud, self.means.bill
        assert cloud is not None, "the policy asks no cloud in mode only_device"
        with self.means.ledger.attempt(self._attempt("cloud")) as row:
            began, texts = time.monotonic(), list[str]()
            try:
                async with aclosing(cloud.attempt(self.messages, self.settings, patience)) as events:
                    async for event in events:
                        if event.finish:
                            row.outcome = ANSWERED
                            bill.settle(row, "".join(texts), event.usage)
                            usage = Usage(row.prompt_tokens, row.completion_tokens)
                            yield Piece(finish_reason=event.finish, usage=usage)
                        else:
                            row.first_token = row.first_token or time.monotonic() - began
                            texts.append(event.text)
                            yield Piece(text=event.text)
            except CloudFailure as failure:
                row.outcome = failure.outcome
                raise
            finally:
                if row.outcome != ANSWERED:
                    bill.settle(row, "".join(texts), None)

    def _attempt(self, place: Place) -> Attempt:
        config, cloud = self.means.config, place == "cloud"
        row = Attempt(
            request=self.name,
            number=len(self.attempts) + 1,
            place=place,
            provider=config.provider if cloud else place,
            model=config.providers[config.provider].model if cloud else self.means.engine.model,
            mode=config.mode,
            rule=self.decision.rule,
            level=self.decision.level,
            own_prompt_tokens=self.tokens,
            usage="estimated" if cloud else "counted",
            prompt_tokens=self.tokens,
            cost=self.means.bill.dollars(self.tokens, 0) if cloud else 0.0,
        )
        self.attempts.append(row)
        return row


async def _counted(pieces: AsyncIterable[Piece], row: Attempt) -> AsyncGenerator[Piece, None]:
    """The device's pieces, counted in the ledger's row."""
    began = time.monotonic()
    async for piece in pieces:
        row.first_token = row.first_token or time.monotonic() - began
        row.completion_tokens += piece.token_id is not None
        if piece.usage:
            row.prompt_tokens, row.completion_tokens = piece.usage.prompt, piece.usage.completion
        row.own_completion_tokens = row.completion_tokens
        if piece.finish_reason:
            row.outcome = ANSWERED
        yield piece


async def _trusted(pieces: AsyncIterable[Piece], cascade: Cascade) -> AsyncGenerator[Piece, None]:
    """The pieces, once the first ones are judged; they are held back until then. Raises Failed for a doubt."""
    held: list[Piece] = []
    judged = False
    async for piece in pieces:
        held.append(piece)
        known = [one.logprob for one in held if one.logprob is not None][: cascade.tokens]
        if not judged and not piece.finish_reason and len(known) < cascade.tokens:
            continue
        if not judged and doubts(known, cascade):
            raise Failed(f"the device was in doubt ({sum(known) / len(known):.2f} nats per token)", again=True)
        judged = True
        for one in held:
            yield one
        held = []
