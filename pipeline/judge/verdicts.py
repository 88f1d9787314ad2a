"""Verdicts and their lines: written, read, described for people, turned into an exit status."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.files import read_json, sha256_of
from pipeline.workspace import REFERENCE, Workspace

PASS, FAIL, INCONCLUSIVE, ERROR = "PASS", "FAIL", "INCONCLUSIVE", "ERROR"
REPORTED = "REPORTED"  # of a line only: shown, decides nothing
_EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 2, ERROR: 3}
_SEVERITY = (PASS, INCONCLUSIVE, FAIL, ERROR)
_NOT_QUALITY = {"parity", "permission"}  # lines that say nothing about it


@dataclass(frozen=True)
class GateLine:
    """One gate's figures. Estimates, bounds, limit and detectable effect share the gate's unit.

    Units: nats, shares or a ratio as `Gate.format` of the gate's row shows; percentage points of a drop; relative error
    for `parity`. `high` None: the sample does not bound it. Bounds at a look hold at all looks together.
    """

    name: str
    verdict: str
    n: int | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    detectable: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """The worst of the lines that decide, all lines, and the row of configs/gates.yaml that they were judged by."""

    verdict: str
    lines: tuple[GateLine, ...]
    row: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for a verdict file; `Verdict.from_json(v.to_json()) == v`."""
        return dataclasses.asdict(self) | {"lines": [dataclasses.asdict(line) for line in self.lines]}

    @classmethod
    def from_json(cls, data: Any) -> Verdict:
        """Parse a verdict file's content.

        Raises:
            EvaluationError: it is not a verdict, or its verdict is not the one its lines give.
        """
        try:
            verdict = cls(data["verdict"], tuple(GateLine(**line) for line in data["lines"]), data["row"])
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"not a verdict file ({type(error).__name__}: {error}). Validate again.") from None
        if not isinstance(verdict.row, str):
            raise EvaluationError(f"a verdict file names its limits as {verdict.row!r}. Validate again.")
        for line in verdict.lines:
            numbers = (line.n, line.estimate, line.low, line.high, line.limit, line.detectable)
            texts = isinstance(line.name, str) and isinstance(line.note, str)
            if not texts or not all(value is None or isinstance(value, int | float) for value in numbers):
                wrong = "holds a value of the wrong type"
            elif line.verdict not in (*_EXIT_CODES, REPORTED):
                wrong = f"says {line.verdict!r}"
            else:
                continue
            raise EvaluationError(f"a verdict file's line {line.name!r} {wrong}. Validate again.")
        if verdict.verdict != overall(verdict.lines):
            raise EvaluationError(
                f"a verdict file says {verdict.verdict}, but its own lines give {overall(verdict.lines)}: it was "
                f"edited or damaged. Validate again."
            )
        return verdict


def worst(verdicts: Iterable[str]) -> str:
    """The most severe of PASS < INCONCLUSIVE < FAIL < ERROR; ERROR for none at all."""
    return max(verdicts, key=_SEVERITY.index, default=ERROR)


def overall(lines: Iterable[GateLine]) -> str:
    """The worst deciding line. ERROR when no measurement decides: parity and permission say nothing about quality."""
    deciding = [line for line in lines if line.verdict != REPORTED]
    quality = {line.name for line in deciding} - _NOT_QUALITY
    return worst(line.verdict for line in deciding) if quality else ERROR


def exit_code(verdict: str) -> int:
    """0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 ERROR."""
    return _EXIT_CODES[verdict]


def read_verdict(workspace: Workspace, variant: str) -> Verdict:
    """A written verdict. Raises EvaluationError when there is none."""
    path = workspace.verdict(variant)
    try:
        return Verdict.from_json(read_json(path))
    except (OSError, ValueError, EvaluationError) as error:
        raise EvaluationError(f"{path}: no readable verdict ({error}). Run `dvc repro` first.") from None


def digests(workspace: Workspace, variant: str) -> dict[str, str]:
    """SHA-256 of the measurements that a verdict on `variant` judges, as far as they are on this machine: a release
    machine may have none."""
    paths = {name: workspace.measurements(name) for name in (variant, REFERENCE)}
    return {name: sha256_of(path) for name, path in paths.items() if path.exists()}


def read_current(workspace: Workspace, variant: str) -> Verdict:
    """A written verdict on the measurements that are on this machine.

    Raises EvaluationError when there is none, or it judged other measurements.
    """
    verdict = read_verdict(workspace, variant)
    judged = read_json(workspace.verdict(variant)).get("judged", {})
    if any(judged.get(name, digest) != digest for name, digest in digests(workspace, variant).items()):
        raise EvaluationError(
            f"{workspace.verdict(variant)}: it judged other measurements than those in "
            f"{workspace.measurements(variant).parent}, which were edited or measured again since. Run `python -m "
            f"pipeline verdict {workspace.model} {variant}`, or `dvc repro`, to judge these."
        )
    return verdict


def describe_line(line: GateLine) -> str:
    """One gate for people: `kl_mean 0.738 (90 % interval 0.611 to 0.864), limit 0.39: FAIL`."""

    def number(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.3g}"

    text = line.name if line.estimate is None else f"{line.name} {number(line.estimate)}"
    if line.low is not None:
        text += f" (90 % interval {number(line.low)} to {number(line.high)})"
    if line.limit is not None:
        text += f", limit {number(line.limit)}"
    text += f": {line.verdict}"
    explained = line.estimate is None or line.verdict == INCONCLUSIVE
    return f"{text}; {line.note}" if explained and line.note else text


def gate(models: list[str], variants: list[str]) -> int:
    """Print each verdict and what decided it; return the worst one's exit code (see `exit_code`)."""
    found = []
    for model, variant in itertools.product(models, variants):
        verdict = read_current(Workspace(model), variant)
        found.append(verdict.verdict)
        print(f"{model} {variant}: {verdict.verdict}")
        for line in verdict.lines:
            if line.verdict == verdict.verdict != PASS:
                print(f"  {describe_line(line)}")
    return exit_code(worst(found))
