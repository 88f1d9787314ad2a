"""Who answers: a table of rules, of which the first that holds decides. Pure, and small enough to port.

phone/vectors/policy.json says the same as inputs and decisions: ports in other languages run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from pipeline.config.hybrid import Cascade, Heat, Limits, Mode
from pipeline.config.typed_yaml import Frozen

Place = Literal["device", "cloud"]
Level = Literal["LOW", "MEDIUM", "HIGH"]
_HEATS: tuple[str, ...] = get_args(Heat)


class Situation(Frozen):
    """What the app knows of its phone. Unknown is what harms least: no answer is lost for it.

    Attributes:
        battery: share that is left; None: unknown, or no battery.
        device_ready: whether the model is there and fits live memory.
    """

    network: Literal["none", "metered", "unmetered"] = "unmetered"
    battery: float | None = Field(default=None, ge=0, le=1)
    charging: bool = False
    heat: Heat = "nominal"
    device_ready: bool = True


@dataclass(frozen=True)
class Asked:
    """A request as the rules see it: tokens of its prompt, the user's messages, whether it may not leave the device."""

    tokens: int
    turns: int
    private: bool = False


@dataclass(frozen=True)
class Case:
    """All that a decision depends on."""

    mode: Mode
    asked: Asked
    situation: Situation
    limits: Limits

    @property
    def level(self) -> Level:
        """LOW below `limits.low` tokens, HIGH above `limits.high`, else MEDIUM."""
        if self.asked.tokens < self.limits.low:
            return "LOW"
        return "HIGH" if self.asked.tokens > self.limits.high else "MEDIUM"

    @property
    def ready(self) -> bool:
        """Whether the device can answer."""
        return self.situation.device_ready

    @property
    def offline(self) -> bool:
        """Whether no network that may be used reaches the cloud."""
        network = self.situation.network
        return network == "none" or (network == "metered" and not self.limits.metered)

    @property
    def hot(self) -> bool:
        """Whether heat has reached its limit."""
        return _HEATS.index(self.situation.heat) >= _HEATS.index(self.limits.heat)

    @property
    def drained(self) -> bool:
        """Whether the battery is below its limit and not being charged."""
        battery = self.situation.battery
        return battery is not None and battery < self.limits.battery and not self.situation.charging


@dataclass(frozen=True)
class Rule:
    """One row: `first` is asked (None: nobody, the request is refused), and `then` where that fails or is in doubt."""

    name: str
    when: str
    holds: Callable[[Case], bool]
    first: Place | None
    then: Place | None = None


RULES: tuple[Rule, ...] = (
    Rule("private_only_cloud", "private, mode only_cloud", lambda c: c.asked.private and c.mode == "only_cloud", None),
    Rule("private_no_device", "private, device not ready", lambda c: c.asked.private and not c.ready, None),
    Rule("private", "private", lambda c: c.asked.private, "device"),
    Rule("only_cloud_offline", "mode only_cloud, offline", lambda c: c.mode == "only_cloud" and c.offline, None),
    Rule("only_cloud", "mode only_cloud", lambda c: c.mode == "only_cloud", "cloud"),
    Rule("no_device", "mode only_device, device not ready", lambda c: c.mode == "only_device" and not c.ready, None),
    Rule("only_device", "mode only_device", lambda c: c.mode == "only_device", "device"),
    Rule("nobody", "offline, device not ready", lambda c: c.offline and not c.ready, None),
    Rule("offline", "offline", lambda c: c.offline, "device"),
    Rule("device_not_ready", "device not ready", lambda c: not c.ready, "cloud"),
    Rule("prefer_cloud", "mode prefer_cloud", lambda c: c.mode == "prefer_cloud", "cloud", "device"),
    Rule("heat", "heat at its limit or above", lambda c: c.hot, "cloud", "device"),
    Rule("battery", "battery below its limit, not charging", lambda c: c.drained, "cloud", "device"),
    Rule("low", "LOW", lambda c: c.level == "LOW", "device", "cloud"),
    Rule("high", "HIGH", lambda c: c.level == "HIGH", "cloud", "device"),
    Rule("turns", "more turns than their limit", lambda c: c.asked.turns > c.limits.turns, "cloud", "device"),
    Rule("threshold", "tokens above the threshold", lambda c: c.asked.tokens > c.limits.threshold, "cloud", "device"),
    Rule("short", "otherwise", lambda c: True, "device", "cloud"),
)


@dataclass(frozen=True)
class Decision:
    """The rule that decided, who is asked `first` (None: nobody), and who `then`, where that fails or is in doubt."""

    rule: str
    first: Place | None
    then: Place | None
    level: Level


def decide(mode: Mode, asked: Asked, situation: Situation, limits: Limits) -> Decision:
    """The first rule of `RULES` that holds."""
    case = Case(mode, asked, situation, limits)
    rule = next(rule for rule in RULES if rule.holds(case))
    return Decision(rule.name, rule.first, rule.then, case.level)


def is_private(tags: Iterable[str], known: Mapping[str, Literal["device", "anywhere"]]) -> bool:
    """Whether a tag keeps a request on the device. One that `known` lacks does: a misspelt tag must not leak."""
    return any(known.get(tag, "device") == "device" for tag in tags)


def doubts(logprobs: Sequence[float], cascade: Cascade) -> bool:
    """Whether an answer whose first tokens had these log-probabilities (nats) is doubted; of none, it is not."""
    first = logprobs[: cascade.tokens]
    return bool(first) and sum(first) / len(first) < cascade.threshold
