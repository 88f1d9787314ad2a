"""What a task is: one thing that is measured of a model, and all that the rest of the pipeline has to know of it.

A module of this package that defines `TASK = Task(...)` is a task (`pipeline.tasks.registry` finds it). Its part of a
suite, what it reads and costs, its gates and what of it is shown are rows and functions here; nothing else lists tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

from pipeline.checkpoint.blobs import Store
from pipeline.config.models import ModelConfig
from pipeline.config.typed_yaml import Frozen
from pipeline.tasks.subject import Subject

Metrics = Mapping[str, Any]
"""A task's section of the metrics; empty where it was not measured."""
Format = Callable[[float], str]
DASH = "–"

# Kinds of gates: `pipeline.judge.gates` has a function for each.
AT_MOST, AT_LEAST = "at most", "at least"  # an interval within its limit
LOOKS = "looks"  # a paired drop within its margin, judged at the looks of `pipeline.judge.sequential`
VETO = "veto"  # a coarser figure of the same drop: it fails beyond the margin at a look, and never passes
FLOOR = "floor"  # a paired drop within its margin, where the sample can see one at all
RATCHET = "ratchet"  # an estimate against the last release's


# --- numbers as text -------------------------------------------------------------------------------------------------


def share(value: float) -> str:
    """0.861 as 86.1 %."""
    return f"{100 * value:.1f} %"


def percent(value: float) -> str:
    """0.861 as 86.1."""
    return f"{100 * value:.1f}"


def nats(value: float) -> str:
    """Three significant digits, at least three decimals below one."""
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


def points(value: float) -> str:
    """Percentage points."""
    return f"{value:.1f} points"


def share_points(value: float) -> str:
    """A difference of shares: points, not per cent."""
    return points(100 * value)


def memory(value: float) -> str:
    """Bytes as decimal MB or GB."""
    return f"{value / 1e6:.0f} MB" if value < 1e9 else f"{value / 1e9:.{2 if value < 1e10 else 1}f} GB"


def number(section: Metrics, key: str) -> float | None:
    """One figure of a section, or None where it was not measured."""
    value = section.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def maybe(value: float | None, format_: Format, absent: str = DASH) -> str:
    """`value` as text, or what stands for its absence."""
    return absent if value is None or math.isnan(value) else format_(value)


def bounds(section: Metrics, key: str, format_: Format) -> str:
    """An interval as text, "" where it has not both ends."""
    low, high = number(section, f"{key}_low"), number(section, f"{key}_high")
    return "" if low is None or high is None else f"{format_(low)}–{format_(high)}"


def estimate(section: Metrics, key: str) -> str:
    """A share and its interval as text, "" where it was not measured."""
    return maybe(number(section, key), lambda value: f"{share(value)} ({bounds(section, key, percent)})", "")


# --- what of a task is judged and shown ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A row of the table of gates.

    Attributes:
        name: of its line in a verdict.
        kind: which rule judges it.
        key: its metric; of a paired drop, the accuracy that dropped.
        title: for people.
        format: of its estimate, bounds and limit.
        limit: its field in a row of configs/gates.yaml; "" for none.
        allowed: what that field may hold. With a default of None, a gate without a limit is reported.
        effect: format of the effect that the sample detects; None: as its estimate, and no sentence tells it.
        highest: the largest possible estimate of an interval.
    """

    name: str
    kind: str
    key: str
    title: str
    format: Format = nats
    limit: str = ""
    allowed: FieldInfo | None = None
    effect: Format | None = None
    highest: float = math.inf


def margin_gate(name: str, kind: str, key: str, title: str) -> Gate:
    """The gate of a paired drop in percentage points, which a row of configs/gates.yaml may bound."""
    field, allowed = f"{name}_margin_points", Field(default=None, gt=0)
    return Gate(name, kind, key, title, points, field, allowed, points)


@dataclass(frozen=True)
class Pairing:
    """How a variant's section is known to be paired with the reference's own.

    Attributes:
        what: was measured in both: "text", "items".
        same: metrics that are equal.
        key, mirrored: a metric of the reference, and where the variant's section repeats it.
        moved: a metric that is 0 only if the reference was measured in the variant's place; "" for none.
    """

    what: str
    same: Sequence[str]
    key: str
    mirrored: str
    moved: str = ""


def items_of(key: str) -> Pairing:
    """The pairing of an accuracy `key`, item by item."""
    return Pairing("items", ("n", "mode", "prompt", "samples", "temperature"), key, f"reference_{key}")


@dataclass(frozen=True)
class Column:
    """A column of the report's table: both lines of its heading, and of a cell."""

    heading: tuple[str, str]
    cells: Callable[[Metrics], tuple[str, str]]


def interval_column(heading: str, key: str, format_: Format, ends: Format, n: bool = False) -> Column:
    """An estimate over its 90 % interval; with `n`, how many items it is of stands beside it."""

    def cells(section: Metrics) -> tuple[str, str]:
        count = f" ({section.get('n', 0):.0f})" if n else ""
        value = number(section, key)
        return maybe(value, lambda known: f"{format_(known)}{count}"), bounds(section, key, ends)

    return Column((f"{heading} (n)" if n else heading, "(90 %)"), cells)


@dataclass(frozen=True)
class Note:
    """A sentence of the report: `heading` of the reference's section, and for each row `part` of its own ("": none)."""

    heading: Callable[[Metrics], str]
    part: Callable[[Metrics], str]


@dataclass(frozen=True)
class Measure:
    """A row of the model card and the bill of materials. `hub`: its metric on the Hub; "": in the table only."""

    key: str
    title: str
    unit: str
    hub: str = ""


@dataclass(frozen=True)
class Figure:
    """One measurement. `value` and its two-sided 90 % interval are in `unit`; `detail` says on what it was measured."""

    key: str
    title: str
    unit: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    dataset: str
    detail: str
    hub_dataset: str | None = None
    hub: str = ""


@dataclass(frozen=True)
class Cost:
    """What a task takes in tokens, at most; `pipeline.preflight.needs` makes bytes and seconds of it.

    Attributes:
        read: tokens that the model reads.
        written: tokens that it decodes one by one.
        texts: that these are of, where they may be written side by side.
        window: tokens whose logits are held at once.
        cached: tokens whose keys and values are held beside them.
        kept: tokens whose log-probabilities the reference keeps.
    """

    read: int = 0
    written: int = 0
    texts: int = 0
    window: int = 0
    cached: int = 0
    kept: int = 0


# --- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One thing that is measured. `part` stands for its part of the suite.

    Attributes:
        name: of the task, its part of the suite and its section of the metrics.
        title: for people.
        place: in the order of measuring and of showing; what it reads has an earlier one.
        measure: (subject, folder of items) → metrics. Every item that lies in the folder is taken as it is.
        config: the type of its part; None where it reads another's.
        counted: fields of its part that say how many items there are, each of which is the same whatever their number,
            or what is said over all of them. The first is the number.
        stops: part → the numbers of items at which a variant's verdict may be known, the first of them asked in any
            case; one where nothing is judged at looks. The reference is asked the last.
        runs_graph: whether it asks the graph for logits (`Subject.decoder`).
        writes: whether it lets the model write (`Subject.writer`).
        whole: whether it needs the model in memory, whatever that takes: it gates nothing.
        against_reference: whether each of a variant's items is a comparison with the reference's.
        reads: another task, whose part of the suite decides this one too, and whose items of the reference it is made
            from.
        unit: what its items are.
        machine: part → what of this machine decides its results. Raises EvaluationError, before anything is measured,
            where it cannot be measured here.
        datasets: part → names in configs/datasets.yaml that it reads.
        texts: (part, store) → what it judges by, by dataset: quantization must not be tuned on it.
        cost: (part, the model's entry) → tokens.
        asks: part → what is asked, in words; "" for nothing worth saying.
        pairing: of a variant's section with the reference's.
        legend: how to read what is shown of it; "" where nothing needs it.
        conditions: the reference's section → how it was run, in words.
        detail: (section, names of the held-out text) → what its figures were measured on, in words.
        dataset: what its figures are of, and its name on the Hub (the test split); "": the held-out text.
    """

    name: str
    title: str
    place: int
    measure: Callable[[Subject, Path], dict[str, Any]]
    config: type[Frozen] | None = None
    counted: tuple[str, ...] = ()
    stops: Callable[[Any], tuple[int, ...]] | None = None
    runs_graph: bool = False
    writes: bool = False
    whole: bool = False
    against_reference: bool = False
    reads: str | None = None
    unit: str = "items"
    machine: Callable[[Any], Any] = lambda part: None
    datasets: Callable[[Any], Iterable[str]] = lambda part: ()
    texts: Callable[[Any, Store], Iterable[tuple[str, list[str]]]] = lambda part, store: ()
    cost: Callable[[Any, ModelConfig], Cost] = lambda part, entry: Cost()
    asks: Callable[[Any], str] = lambda part: ""
    pairing: Pairing | None = None
    gates: tuple[Gate, ...] = ()
    columns: tuple[Column, ...] = ()
    notes: tuple[Note, ...] = ()
    legend: str = ""
    conditions: Callable[[Metrics], str] | None = None
    measures: tuple[Measure, ...] = ()
    detail: Callable[[Metrics, Sequence[str]], str] = lambda section, texts: ""
    dataset: tuple[str, str | None] = ("", None)

    @property
    def part(self) -> str:
        """The part of the suite that decides it."""
        return self.reads or self.name
