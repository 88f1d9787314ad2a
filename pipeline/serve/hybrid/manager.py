"""An engine that asks the device or a cloud, as the policy decides, and says who answered, why, how fast, at what cost.

Whoever fails is replaced: the cloud by the device, a device that is busy or in doubt by the cloud, and a cloud that was
asked for a doubt by the device again. An answer is never put together from two. Where the cloud fails after some of its
text was shown, a piece with a note in brackets follows, then an empty piece with an `origin`, then the whole answer of
the device. No other piece in the middle of an answer has an origin: a client that knows it drops what it showed before
(as `pipeline.serve.engine.standing` does), and one that does not shows the note between both.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Self

from pipeline.config.hybrid import HybridConfig
from pipeline.errors import ResourceError
from pipeline.serve.engine import Engine, Message, Origin, Piece, Settings, Unsupported
from pipeline.serve.hybrid.asking import Asking, Failed, Means
from pipeline.serve.hybrid.bill import Bill
from pipeline.serve.hybrid.cloud import Cloud
from pipeline.serve.hybrid.ledger import Ledger
from pipeline.serve.hybrid.policy import RULES, Asked, Decision, Place, Situation, decide, is_private

_WHEN = {rule.name: rule.when for rule in RULES}
_ANY = Situation()


class Refused(Unsupported):
    """A request that the policy lets nobody answer. Nothing of it was sent."""

    def __init__(self, decision: Decision, said: str):
        parameter = "x_tags" if decision.rule.startswith("private") else "x_situation"
        super().__init__(parameter, f"rule {decision.rule} lets nobody answer: {said}. Nothing was sent to the cloud.")
        self.decision = decision


class NoAnswer(ResourceError):
    """The cloud failed, and the device may not answer in its place."""


class Manager:
    """A device's engine and a cloud, under a policy. It is an engine itself, asked by many at once.

    It holds the ledger and the cloud's connections: `close` it, or use it as a context manager.
    """

    def __init__(self, engine: Engine, config: HybridConfig, environment: Mapping[str, str] = os.environ):
        """Raises ConfigError where the cloud may be asked and its key is not in `environment`; PipelineError where the
        ledger cannot be opened."""
        provider = config.providers[config.provider]
        cloud = None if config.mode == "only_device" else Cloud(provider, config.attempts, environment)
        self._means = Means(engine, cloud, config, Ledger(config.ledger), Bill(engine, config))

    @property
    def model(self) -> str:
        """The device's model: what a request names, whoever answers it."""
        return self._means.engine.model

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt, by the device's tokenizer. Raises EvaluationError where they cannot be rendered."""
        return self._means.engine.count(messages)

    async def close(self) -> None:
        """Close the ledger and the cloud's connections."""
        self._means.ledger.close()
        if self._means.cloud:
            await self._means.cloud.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def stream(
        self, messages: Sequence[Message], settings: Settings, tags: Sequence[str] = (), situation: Situation = _ANY
    ) -> AsyncGenerator[Piece, None]:
        """The answer, by whom `tags` and `situation` let answer. The last piece's origin is whole.

        Raises:
            Refused: the policy lets nobody answer.
            NoAnswer: the cloud failed, in mode only_cloud or where the device was not ready.
            Busy, TooLong, EvaluationError: of the device, where nobody else answered.
        """
        config = self._means.config
        turns = sum(message["role"] == "user" for message in messages)
        asked = Asked(self.count(messages), turns, is_private(tags, config.tags))
        decision = decide(config.mode, asked, situation, config.limits)
        figures = f"{asked.tokens:,} tokens, {decision.level}, turns: {turns}, mode {config.mode}"
        why = f"{_WHEN[decision.rule]} ({figures})"
        if decision.first is None:
            raise Refused(decision, why)
        answer = _Answer(Asking(self._means, messages, settings, asked.tokens, decision), why)
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                yield piece


@dataclass
class _Answer:
    """An answer on its way from place to place. `why`: the rule, and whoever failed so far."""

    asking: Asking
    why: str
    shown: bool = False
    began: float = field(default_factory=time.monotonic)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Those of whoever answers, signed."""
        failed: dict[Place, Failed] = {}
        for place, source in self._sources():
            if place in failed and not failed[place].again:
                break
            try:
                async with aclosing(source) as pieces:
                    async for piece in self._signed(pieces):
                        yield piece
                return
            except Failed as failure:
                failed[place] = failure
                self.why += f"; {failure.said}"
        if "device" in failed and (error := failed["device"].error):
            raise error
        raise NoAnswer(f"nobody answered: {self.why}. Ask again, or choose a mode in which the device may answer.")

    def _sources(self) -> list[tuple[Place, AsyncGenerator[Piece, None]]]:
        """Who is asked, in this order. The device as a last resort waits for its turn as long as a cloud may."""
        first, then, config = self.asking.decision.first, self.asking.decision.then, self.asking.means.config
        resort: tuple[Place, AsyncGenerator[Piece, None]] = "device", self.asking.device(patience=config.attempts.whole)
        if first == "device":
            if then is None:
                return [("device", self.asking.device())]
            return [("device", self.asking.device(config.cascade)), ("cloud", self.asking.cloud()), resort]
        return [("cloud", self.asking.cloud()), *[resort] * (then is not None)]

    async def _signed(self, pieces: AsyncIterable[Piece]) -> AsyncGenerator[Piece, None]:
        """The pieces of one place, the first and the last with an origin; behind a note, if text was shown before."""
        latency = None
        async for piece in pieces:
            first = latency is None
            latency = latency or time.monotonic() - self.began
            if first and self.shown:
                place = self.asking.attempts[-1].place
                yield Piece(text=f"\n\n[{self.why.rpartition('; ')[2]}; the {place} answers anew]\n\n")
                yield Piece(origin=self._origin(latency))
                first = False
            self.shown = True
            if piece.finish_reason:
                yield replace(piece, origin=self._origin(latency, whole=True))
            else:
                yield replace(piece, origin=self._origin(latency)) if first else piece

    def _origin(self, latency: float, whole: bool = False) -> Origin:
        attempts = self.asking.attempts
        last = attempts[-1]
        return Origin(
            who=last.model if last.place == "device" else f"cloud:{last.model}",
            why=self.why,
            latency=latency,
            seconds=time.monotonic() - self.began if whole else None,
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens if whole else None,
            cost=sum(one.cost for one in attempts) if whole else None,
        )
