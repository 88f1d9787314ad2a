"""What attempts cost: tokens as they were reported or as the device's tokenizer counts them, times a price."""

from __future__ import annotations

from pipeline.config.hybrid import HybridConfig
from pipeline.serve.engine import Engine
from pipeline.serve.hybrid.cloud import UNBILLED, Reported
from pipeline.serve.hybrid.ledger import Attempt

_SLACK = 16  # tokens by which usage may differ from our count, whatever the factor: templates and tokenizers differ


class Bill:
    """Counts with a device's engine, at the price of the configured provider."""

    def __init__(self, engine: Engine, config: HybridConfig):
        self._engine, self._plausible = engine, config.plausible
        self._price = config.providers[config.provider].price
        self._frame: int | None = None

    def dollars(self, read: int, written: int) -> float:
        """The price of so many tokens."""
        return (read * self._price.input + written * self._price.output) / 1e6

    def settle(self, row: Attempt, text: str, reported: Reported | None) -> None:
        """Fill in what an ended attempt at the cloud read and wrote, and its cost. What was refused costs nothing; what
        was cut, or is not reported, is estimated as read and written."""
        row.own_completion_tokens = self._written(text)
        row.prompt_tokens = 0 if row.outcome.startswith(UNBILLED) else row.own_prompt_tokens
        row.completion_tokens = row.own_completion_tokens
        if reported:
            row.prompt_tokens, row.completion_tokens = reported.prompt, reported.completion
            shown = reported.completion - reported.hidden
            near = self._near(reported.prompt, row.own_prompt_tokens) and self._near(shown, row.own_completion_tokens)
            row.usage = "reported" if near else "disputed"
        row.cost = self.dollars(row.prompt_tokens, row.completion_tokens)

    def _near(self, said: int, own: int) -> bool:
        return max(said, own) <= self._plausible * min(said, own) + _SLACK

    def _written(self, text: str) -> int:
        """Tokens of an answer: what a message of it has more than a message of one letter."""
        if self._frame is None:
            self._frame = self._engine.count([{"role": "user", "content": "a"}]) - 1
        return max(1, self._engine.count([{"role": "user", "content": text}]) - self._frame) if text else 0
