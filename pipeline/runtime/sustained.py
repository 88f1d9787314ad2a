"""What a device showed under sustained load: one record for phones (phone/ writes it) and for this machine.

docs/schemas/sustained.schema.json is made from these classes.
"""

from __future__ import annotations

import statistics
from typing import ClassVar, Literal

from pydantic import Field, JsonValue

from pipeline.config.phones import Measured
from pipeline.config.typed_yaml import Frozen, Name
from pipeline.errors import EvaluationError

WINDOW = 10.0
"""Seconds over which a rate is taken."""
THROTTLED = 0.90
"""Share of the first minute's median rate below which a device is throttled."""


class Sample(Frozen):
    """One look: seconds since the start, tokens written since the look before, the step of the power profile, and what
    the system shows: bytes of memory, temperature, Android's headroom, iOS's thermal state, the clock in hertz."""

    seconds: float = Field(ge=0)
    tokens: int = Field(ge=0)
    step: int = Field(ge=0)
    private_bytes: int | None = None
    mapped_bytes: int | None = None
    celsius: float | None = None
    headroom: float | None = None
    thermal_state: float | None = None
    hertz: float | None = None


class Sustained(Frozen):
    """`device` is a row of configs/devices.yaml, or any name. A cold start reads the model from storage, a warm one
    from memory. `way` is that of tiers.json, in part or whole."""

    file_name: ClassVar[str] = "sustained.json"

    format: Literal[1]
    kind: Literal["sustained"]
    device: Name
    system: str
    model: Name
    variant: Name
    release: int | None
    way: dict[str, JsonValue]
    runtime: str
    started: str
    cold_start_seconds: float | None
    warm_start_seconds: float | None
    samples: list[Sample] = Field(min_length=1)


def rates(record: Sustained) -> list[tuple[float, float]]:
    """(seconds at its end, tokens per second) of each window that has passed."""
    found, begin, tokens = [], 0.0, 0
    for sample in record.samples:
        tokens += sample.tokens
        if sample.seconds - begin >= WINDOW:
            found.append((sample.seconds, tokens / (sample.seconds - begin)))
            begin, tokens = sample.seconds, 0
    return found


def throttled_after(record: Sustained) -> float | None:
    """Seconds after which the rate never again reached `THROTTLED` of the first minute's median; None if it did at the
    end."""
    windows = rates(record)
    least = THROTTLED * statistics.median(rate for _, rate in first_minute(windows))
    fast = [end for end, rate in windows if rate >= least]
    return None if fast[-1] == windows[-1][0] else fast[-1]


def first_minute(windows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Windows that ended in it; the first at least."""
    return [window for window in windows if window[0] <= 60.0] or windows[:1]


def summary(record: Sustained) -> Measured:
    """The row of configs/measured.yaml.

    Raises:
        EvaluationError: it lasted less than three windows, which says nothing about sustained load.
    """
    windows = rates(record)
    if len(windows) < 3:
        lasted = record.samples[-1].seconds
        raise EvaluationError(
            f"the record of {record.device} lasted {lasted:.0f} seconds; sustained load takes {3 * WINDOW:.0f} or more."
        )
    first = [rate for _, rate in first_minute(windows)]
    last = [rate for _, rate in windows[-max(1, len(windows) // 4) :]]
    return Measured(
        **record.model_dump(include={"device", "model", "variant", "release", "started"}),
        **record.model_dump(include={"cold_start_seconds", "warm_start_seconds", "runtime"}),
        weights="mapped" if record.way.get("weights") == "mapped" else "private",
        seconds=round(record.samples[-1].seconds, 1),
        tokens_per_second=round(statistics.median(first), 2),
        sustained_tokens_per_second=round(statistics.median(last), 2),
        throttled_after_seconds=throttled_after(record),
        peak_private_bytes=max((one.private_bytes for one in record.samples if one.private_bytes), default=None),
        hottest_celsius=max((one.celsius for one in record.samples if one.celsius is not None), default=None),
    )
