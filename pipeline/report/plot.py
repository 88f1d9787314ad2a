"""Size against divergence: one panel per model, the Pareto front drawn, the reference's size in a strip at the right.

The reference is three to eight times as large as any variant: on one axis it would push the variants into a corner, so
the size axis is cut between them.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from pipeline.judge.verdicts import ERROR, FAIL, INCONCLUSIVE, PASS
from pipeline.report.rows import ModelReport, Report, front, pareto_points
from pipeline.tasks.task import memory, nats, number

WIDE, NARROW = (8.6, 4.4), (4.4, 4.2)  # inches of one panel: on a desk, on a phone
_DPI = 160
_MARKERS = {PASS: "o", FAIL: "X", INCONCLUSIVE: "D", ERROR: "s"}
_FLOOR = 1e-6  # nats; a log axis has no zero


@dataclass(frozen=True)
class Theme:
    """Colours of one background; `verdicts` has those of the markers, in their order."""

    background: str
    ink: str
    faint: str
    line: str
    verdicts: tuple[str, ...]

    def of(self, verdict: str) -> str:
        """A verdict's colour."""
        return dict(zip(_MARKERS, self.verdicts, strict=True))[verdict]


LIGHT = Theme("#ffffff", "#1f2328", "#6e7781", "#d8dee4", ("#1a7f37", "#cf222e", "#9a6700", "#8250df"))
DARK = Theme("#0d1117", "#e6edf3", "#8b949e", "#30363d", ("#3fb950", "#f85149", "#d29922", "#a371f7"))

Point = Mapping[str, Any]


def render(report: Report, theme: Theme = LIGHT, inches: tuple[float, float] = WIDE) -> bytes:
    """The plot as PNG bytes; equal reports give equal bytes."""
    points = pareto_points(report)
    size = inches[0], inches[1] * len(report.models) + 0.3
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14)  # inches around each panel
    figure = Figure(size, dpi=_DPI, facecolor=theme.background, layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(report.models), 2, width_ratios=(7, 1), wspace=0.03)
    panels = []
    for index, model in enumerate(report.models):
        main = figure.add_subplot(grid[index, 0])
        panels.append((main, [point for point in points if point["model"] == model.model]))
        _panel(*panels[-1], model, theme)
        _strip(figure.add_subplot(grid[index, 1], sharey=main), model, theme)
    _legend(figure, {point["verdict"] for point in points}, theme, 3 if inches == NARROW else 6)
    figure.canvas.draw()  # constrained layout moves the axes: labels are placed when they stand still
    figure.set_layout_engine("none")
    for main, own in panels:
        _place_labels(main, own, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, points: Sequence[Point], model: ModelReport, theme: Theme) -> None:
    _style(axes, theme)
    axes.set_title(model.model, loc="left", color=theme.ink, fontsize=12, fontweight="bold")
    axes.set_ylabel("mean KL divergence from full precision\n(nats per token, log scale)", color=theme.ink)
    axes.set_xlabel("bytes on disk", color=theme.ink)
    if not points:
        axes.text(0.5, 0.5, "no variant was measured", transform=axes.transAxes, ha="center", color=theme.faint)
        axes.set(xticks=[], yticks=[])
        return
    limits = [
        (size, line.limit)
        for row in model.variants
        if row.verdict and (size := number(row.section("size"), "bytes_on_disk")) is not None
        for line in row.verdict.lines
        if line.name == "kl_mean" and line.limit is not None
    ]
    _scales(axes, [limit for _, limit in limits], points, theme)
    line = [(point["bytes"], _height(point)) for point in front(points)]
    if line:
        axes.plot(*zip(*line, strict=True), "--", color=theme.faint, lw=1.2, zorder=1)
    for point in points:
        _draw_point(axes, point, theme)
    for size, limit in limits:
        axes.plot([size], [limit], marker="_", markersize=26, markeredgewidth=1.6, color=theme.faint, zorder=2)


def _height(point: Point) -> float:
    return max(point["kl_mean"], _FLOOR)


def _draw_point(axes: Axes, point: Point, theme: Theme) -> None:
    colour, mark = theme.of(point["verdict"]), _MARKERS[point["verdict"]]
    low, high = point["kl_low"], point["kl_high"]
    if low is not None and high is not None:
        axes.plot([point["bytes"]] * 2, [max(low, _FLOOR), max(high, _FLOOR)], color=colour, lw=2, alpha=0.6, zorder=3)
    axes.plot([point["bytes"]], [_height(point)], mark, color=colour, ms=9, mec=theme.background, zorder=4)


def _scales(axes: Axes, limits: Sequence[float], points: Sequence[Point], theme: Theme) -> None:
    """Log KL, linear bytes, both with room for labels."""
    sizes = [point["bytes"] for point in points]
    room = 0.22 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    axes.set_xlim(min(sizes) - room, max(sizes) + room)
    heights = [*map(_height, points), *limits]
    heights += [value for point in points for value in (point["kl_low"], point["kl_high"]) if value and value > _FLOOR]
    axes.set_yscale("log")
    axes.set_ylim(min(heights) / 1.5, max(heights) * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6 if axes.bbox.width > 5 * _DPI else 3))
    # Decimals that tell ticks apart, in GB; three fewer in MB.
    digits = max(0, 1 - math.floor(math.log10((max(sizes) - min(sizes) + 2 * room) / 1e9)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, digits)))
    axes.grid(True, color=theme.line, lw=0.6)


def _tick(value: float, digits: int) -> str:
    return f"{value / 1e9:.{digits}f} GB" if value >= 1e9 else f"{value / 1e6:.{max(0, digits - 3)}f} MB"


def _strip(axes: Axes, model: ModelReport, theme: Theme) -> None:
    """The reference's size as a vertical line behind a cut axis; its divergence is zero, below any log axis."""
    _style(axes, theme)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes.set(xlim=(-1, 1), xticks=[])
    marks: dict[str, Any] = {"marker": [(-0.6, -1), (0.6, 1)], "markersize": 9, "ls": "none", "clip_on": False}
    axes.plot([-0.02], [0], transform=axes.transAxes, color=theme.faint, mew=1.2, **marks)
    if (size := number(model.reference.section("size"), "bytes_on_disk")) is not None:
        axes.axvline(0, color=theme.ink, lw=1.4)
        label = f"reference, {memory(size)}, KL 0"
        axes.text(0.42, 0.5, label, transform=axes.transAxes, rotation=90, va="center", ha="right", color=theme.ink)


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    axes.tick_params(colors=theme.faint, which="both", labelsize=9)
    axes.set_axisbelow(True)


def _legend(figure: Figure, verdicts: set[str], theme: Theme, columns: int) -> None:
    seen = [verdict for verdict in _MARKERS if verdict in verdicts]
    handles = [Line2D([], [], marker=_MARKERS[name], color=theme.of(name), ls="none", label=name) for name in seen]
    handles.append(Line2D([], [], color=theme.faint, ls="--", label="Pareto front of those that passed"))
    handles.append(Line2D([], [], color=theme.faint, marker="_", markersize=14, mew=1.6, ls="none", label="limit"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=theme.ink
    )


# --- labels ----------------------------------------------------------------------------------------------------------

_OFFSETS = [
    # points from the marker, horizontal alignment, in order of preference
    (12, 8, "left"), (12, -18, "left"), (-12, 8, "right"), (-12, -18, "right"),
    (0, 22, "center"), (0, -34, "center"), (12, 30, "left"), (-12, 30, "right"), (12, -42, "left"), (-12, -42, "right"),
]  # fmt: skip


def _place_labels(axes: Axes, points: Sequence[Point], theme: Theme) -> None:
    """Write each variant's name and figures where they cover no marker, no line and no earlier label."""
    taken = [box for line in axes.lines for box in _line_boxes(line)]
    for point in sorted(points, key=lambda p: p["bytes"]):
        candidates = []
        for dx, dy, align in _OFFSETS:
            label = axes.annotate(
                f"{point['variant']}\n{memory(point['bytes'])}, {nats(point['kl_mean'])}",
                (point["bytes"], _height(point)), (dx, dy), textcoords="offset points", ha=align, va="baseline",
                fontsize=9, color=theme.ink, linespacing=1.25, zorder=5,
            )  # fmt: skip
            candidates.append((label, label.get_window_extent()))
        chosen, box = min(candidates, key=lambda c: _cost(c[1], taken, axes.get_window_extent()))
        taken.append(box)
        for label, _ in candidates:
            if label is not chosen:
                label.remove()


def _line_boxes(line: Line2D) -> list[Bbox]:
    """Small boxes, in pixels, that together cover a line and its markers."""
    pixels = np.asarray(line.get_transform().transform(line.get_xydata()))
    marker, pixel = line.get_marker(), _DPI / 72
    width = pixel * (2 if marker in ("None", None, "") else line.get_markersize() / 2)
    height = pixel * 2 if marker == "_" else width
    steps = np.linspace(0, 1, 60)[:, None]
    dots = [start + steps * (end - start) for start, end in itertools.pairwise(pixels)] or [pixels]
    return [Bbox([[x - width, y - height], [x + width, y + height]]) for x, y in np.concatenate(dots)]


def _cost(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Pixels of `box` that are covered by others or outside the frame."""
    overlaps = [Bbox.intersection(box, other) for other in taken]
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    return sum(overlap.width * overlap.height for overlap in overlaps if overlap) + max(0.0, outside)
