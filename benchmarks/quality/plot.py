"""Size against divergence, a panel for each subject: every file, and the curve of our budgets under the peers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

Row = Mapping[str, Any]

_INCHES = (11.0, 6.2)  # of one panel
_DPI = 150
_INK, _FAINT, _LINE = "#1f2328", "#6e7781", "#d8dee4"
# Colour and marker by tool; the order of the legend.
_STYLES = {
    "ours": ("#1a7f37", "o"),
    "llama.cpp": ("#0969da", "s"),
    "onnxruntime": ("#cf222e", "^"),
    "onnxruntime-genai builder": ("#9a6700", "D"),
    "simulated": ("#6e7781", "P"),
}
_TICKS = (40, 50, 60, 70, 80, 90, 100, 110, 120, 140, 160, 180, 200, 250, 300, 400, 600, 800)  # megabytes
_OFFSETS = [
    (dx, dy, side)
    for reach in (7, 16, 28, 42)
    for dx, dy, side in (
        (reach, 3, "left"), (-reach, 3, "right"), (reach, -reach, "left"), (-reach, -reach, "right"),
        (reach, reach, "left"), (-reach, reach, "right"), (0, reach, "center"), (0, -reach - 6, "center"),
    )
]  # fmt: skip


def render(result: Mapping[str, Any]) -> bytes:
    """The plot as PNG bytes; equal results give equal bytes."""
    subjects = result["subjects"]
    size = (_INCHES[0], _INCHES[1] * len(subjects) + 0.4)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = []
    for index, subject in enumerate(subjects):
        axes = figure.add_subplot(len(subjects), 1, index + 1)
        rows = [row for row in subject["rows"] if row["name"] != "F16"]
        _panel(axes, subject["title"], rows)
        panels.append((axes, rows))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9, labelcolor=_INK)
    figure.canvas.draw()  # constrained layout moves the axes: labels are placed when they stand still
    figure.set_layout_engine("none")
    for axes, rows in panels:
        _label(axes, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    axes.set_title(f"{title}: size and divergence of the written files", loc="left", color=_INK, fontweight="bold")
    axes.set_ylabel("mean KL divergence from full precision\n(nats per token, 90 % interval, log scale)", color=_INK)
    axes.set_xlabel("bytes of weights and graph (log scale)", color=_INK)
    for tool, (colour, marker) in _STYLES.items():
        own = [row for row in rows if row["tool"] == tool]
        for row in own:
            axes.plot([row["bytes"]] * 2, [row["kl_mean_low"], row["kl_mean_high"]], color=colour, lw=1.6, alpha=0.5)
        places = [row["bytes"] for row in own], [row["kl_mean"] for row in own]
        axes.plot(*places, marker, color=colour, markersize=7, markeredgecolor="white", label=tool, zorder=3)
    curve = sorted((row["bytes"], row["kl_mean"]) for row in rows if "beside" in row)
    axes.plot(*zip(*curve, strict=True), "--", color=_STYLES["ours"][0], lw=1.2, label="our budgets", zorder=1)
    _axes_style(axes, rows)


def _axes_style(axes: Axes, rows: Sequence[Row]) -> None:
    sizes = [row["bytes"] for row in rows]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(sizes) / 1.07, max(sizes) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator([megabytes * 10**6 for megabytes in _TICKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:.0f} MB"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color=_LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, which="both", labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _label(axes: Axes, rows: Sequence[Row]) -> None:
    """Write each file's name where it covers no point and no earlier name. Budgets are named by the curve."""
    points = [axes.transData.transform((row["bytes"], row["kl_mean"])) for row in rows]
    taken = [Bbox([[x - 10, y - 10], [x + 10, y + 10]]) for x, y in points]
    for row in rows:
        if row["name"].startswith("budget"):
            continue
        frame = axes.get_window_extent()
        tries = [(note, note.get_window_extent()) for note in _tries(axes, row)]
        chosen, box = min(tries, key=lambda pair: _covered(pair[1], taken, frame))
        taken.append(box)
        for note, _ in tries:
            if note is not chosen:
                note.remove()


def _tries(axes: Axes, row: Row) -> Iterator[Annotation]:
    colour = _STYLES[row["tool"]][0]
    for dx, dy, side in _OFFSETS:
        yield axes.annotate(
            row["name"], (row["bytes"], row["kl_mean"]), (dx, dy), textcoords="offset points", ha=side, fontsize=7.5,
            color=colour, zorder=4,
        )  # fmt: skip


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Pixels of `box` that are covered by others or outside the frame."""
    overlaps = [overlap for other in taken if (overlap := Bbox.intersection(box, other))]
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    return sum(overlap.width * overlap.height for overlap in overlaps) + max(0.0, outside)
