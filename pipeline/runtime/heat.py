"""How hard a device may work as it warms: phone/profile.json, followed as phone/ does (phone/vectors/heat.json).

A reading at a threshold raises the step at once; it falls only when the reading is more than the hysteresis below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from pipeline.config.typed_yaml import Frozen, load

PROFILE = Path("phone/profile.json")


class Step(Frozen):
    """What is left of a way: threads and chunk when a model is loaded, tokens of an answer (None: the context's),
    milliseconds between two tokens."""

    name: str
    threads_percent: int = Field(gt=0, le=100)
    prefill_chunk: int = Field(gt=0)
    answer_tokens: int | None = Field(ge=0)
    pause_ms: int = Field(ge=0)


class Sensor(Frozen):
    """Thresholds, one for each step above the first, and the hysteresis, in the sensor's own unit."""

    thresholds: list[float] = Field(alias="from")
    hysteresis: float = Field(ge=0)

    def next(self, step: int, reading: float | None) -> int:
        """The step after a reading; the same step where there is none."""
        if reading is None or math.isnan(reading):
            return step
        reached = sum(reading >= one for one in self.thresholds)
        kept = sum(reading + self.hysteresis >= one for one in self.thresholds)
        return max(reached, min(step, kept))


class Profile(Frozen):
    """Steps from the coolest on, and sensors by name: celsius, headroom (Android), thermal_state (iOS)."""

    steps: list[Step] = Field(min_length=1)
    sensors: dict[str, Sensor]


def load_profile(path: Path = PROFILE) -> Profile:
    """Raises ConfigError for a file that is missing or no profile."""
    return load(Profile, path)


class Governor:
    """Follows a device's sensors; the one that is worst decides."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._steps = dict.fromkeys(profile.sensors, 0)

    def observe(self, readings: Mapping[str, float | None]) -> int:
        """The step after these readings, by the sensor's name."""
        for name, sensor in self._profile.sensors.items():
            self._steps[name] = sensor.next(self._steps[name], readings.get(name))
        return self.step

    @property
    def step(self) -> int:
        """The worst sensor's."""
        return max(self._steps.values(), default=0)

    @property
    def row(self) -> Step:
        """What the step leaves."""
        return self._profile.steps[self.step]


def replayed(celsius: Sequence[float], share: float) -> float | None:
    """The temperature of a made-up trace when `share` (0 to 1) of a run has passed; None without a trace."""
    return celsius[min(int(share * len(celsius)), len(celsius) - 1)] if celsius else None
