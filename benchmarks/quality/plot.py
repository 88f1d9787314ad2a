"""Size against divergence of one subject's files: by download or by memory, every file and each side's frontier.

Sides differ by mark, fill and line as well as by colour, so the plot reads in grey. It brings its own white ground, so
it reads on a dark page.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

Row = Mapping[str, Any]


class Style(NamedTuple):
    """How the files of a tool are drawn."""

    colour: str
    marker: str
    filled: bool
    line: str  # of its frontier; none where it is empty


_INCHES, _DPI = (11.0, 6.6), 150
INK, FAINT, LINE = "#1f2328", "#57606a", "#d8dee4"
_STYLES = {
    "ours": Style("#0b5d1e", "o", True, "-"),
    "llama.cpp": Style("#0969da", "s", False, "--"),
    "onnxruntime": Style("#a40e26", "^", False, ""),
    "onnxruntime-genai builder": Style("#9a6700", "D", False, ""),
}
_TITLES = {"bytes": "download", "memory": "memory"}
_AXES = {
    "bytes": "bytes on disk of weights and graph, MB",
    "memory": "bytes of memory of the weights: packed for ONNX Runtime, mapped for llama.cpp, MB",
}
_SHOWN = 1.3  # times the largest mixture of llama.cpp: what is larger is told in words
_STEP = 4  # pixels between the boxes along a line
_OFFSETS = [
    (dx, dy, side)
    for reach in (7, 14, 22, 32, 44)
    for dx, dy, side in (
        (reach, 3, "left"), (-reach, 3, "right"), (reach, reach, "left"), (-reach, -reach - 4, "right"),
        (reach, -reach, "left"), (-reach, reach, "right"), (0, reach + 2, "center"), (0, -reach - 8, "center"),
    )
]  # fmt: skip


def render(result: Mapping[str, Any], by: str) -> bytes:
    """The plot of the subject that all files are compared on, by `bytes` on disk or in `memory`, as PNG bytes.

    Equal results give equal bytes.
    """
    subject = next((subject for subject in result["subjects"] if not subject["brief"]), result["subjects"][-1])
    rows, left = _shown([row for row in subject["rows"] if _belongs(row, by)], by)
    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{subject['title']}: {_TITLES[by]} and divergence", loc="left", color=INK, fontweight="bold")
    for tool in (tool for tool in _STYLES if any(row["tool"] == tool for row in rows)):
        _draw(axes, [row for row in rows if row["tool"] == tool], tool, by)
    _axes_style(axes, by)
    legend = axes.legend(loc="lower left", frameon=True, framealpha=1, edgecolor=LINE, fontsize=9, labelcolor=INK)
    if left:
        figure.supxlabel(textwrap.fill(f"Larger, not shown: {left}", 150), fontsize=7.5, color=FAINT)
    figure.canvas.draw()  # constrained layout moves the axes: labels are placed when they stand still
    figure.set_layout_engine("none")
    _label(axes, rows, by, legend.get_window_extent())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _belongs(row: Row, by: str) -> bool:
    """Quantized files, but for budgets that were solved for the other size: tables have them."""
    kind, _, size = row["name"].partition("_")
    return row["name"] != "F16" and not (kind in _TITLES and kind != by and size.isdigit())


def _shown(rows: Sequence[Row], by: str) -> tuple[list[Row], str]:
    """The rows in reach of llama.cpp's, and what is told of the others."""
    most = _SHOWN * max((row[by] for row in rows if row["tool"] == "llama.cpp"), default=max(row[by] for row in rows))
    far = [f"{row['name']} {row[by] / 1e6:.0f} MB, KL {row['kl_mean']:.3f}" for row in rows if row[by] > most]
    return [row for row in rows if row[by] <= most], "; ".join(far)


def _draw(axes: Axes, rows: Sequence[Row], tool: str, by: str) -> None:
    style = _STYLES[tool]
    for row in rows:
        ends = [row["kl_mean_low"], row["kl_mean_high"]]
        axes.plot([row[by] / 1e6] * 2, ends, color=style.colour, lw=1.2, alpha=0.45, zorder=1)
    if style.line and rows:
        axes.plot(*zip(*_frontier(rows, by), strict=True), style.line, color=style.colour, lw=1.4, zorder=2)
    axes.plot(
        [row[by] / 1e6 for row in rows], [row["kl_mean"] for row in rows], style.marker, color=style.colour, ms=7,
        mew=1.5, markerfacecolor=style.colour if style.filled else "white", label=tool, zorder=3,
    )  # fmt: skip


def _frontier(rows: Sequence[Row], by: str) -> Iterator[tuple[float, float]]:
    """Files that no smaller one of the same tool beats: megabytes and KL."""
    least = float("inf")
    for row in sorted(rows, key=lambda row: (row[by], row["kl_mean"])):
        if row["kl_mean"] < least:
            least = row["kl_mean"]
            yield row[by] / 1e6, least


def _axes_style(axes: Axes, by: str) -> None:
    axes.set_ylabel("mean KL divergence from full precision\n(nats per token, log scale)", color=INK)
    axes.set_xlabel(_AXES[by], color=INK)
    axes.set_yscale("log")
    axes.margins(x=0.07, y=0.06)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    framed(axes)


def framed(axes: Axes) -> None:
    """Plain numbers up a log scale, a faint grid, and lines on two sides."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, which="both", labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _label(axes: Axes, rows: Sequence[Row], by: str, legend: Bbox) -> None:
    """Write each file's name where it covers no mark, no line and no earlier name. Budgets are named by their curve."""
    taken, frame = [legend.extents, *_drawn(axes)], axes.get_window_extent().extents
    for row in (row for row in rows if not row["name"].startswith(f"{by}_")):
        tries = [(note, note.get_window_extent().extents) for note in _tries(axes, row, by)]
        earlier = np.array(taken)
        chosen, box = min(tries, key=lambda pair: _covered(pair[1], earlier, frame))
        taken.append(box)
        for note, _ in tries:
            if note is not chosen:
                note.remove()


def _drawn(axes: Axes) -> Iterator[np.ndarray]:
    """Boxes (left, bottom, right, top, in pixels) over every mark, and along every line and interval."""
    for line in axes.get_lines():
        points = axes.transData.transform(np.column_stack(line.get_data()))
        if line.get_marker() != "None":
            yield from (_around(point, 9) for point in points)
        for start, end in pairwise(points) if line.get_linestyle() != "None" else ():
            count = 2 + int(np.abs(end - start).max() / _STEP)
            yield from (_around(point, 2) for point in np.linspace(start, end, count))


def _around(point: np.ndarray, reach: float) -> np.ndarray:
    return np.concatenate([point - reach, point + reach])


def _tries(axes: Axes, row: Row, by: str) -> Iterator[Annotation]:
    for dx, dy, side in _OFFSETS:
        yield axes.annotate(
            _name(row), (row[by] / 1e6, row["kl_mean"]), (dx, dy), textcoords="offset points", ha=side, fontsize=7.5,
            color=_STYLES[row["tool"]].colour, zorder=4,
        )  # fmt: skip


def _name(row: Row) -> str:
    """As in the table, but what is usual is left out."""
    plain = row["name"].removesuffix(", imatrix")
    return f"{plain}, no imatrix" if row["tool"] == "llama.cpp" and plain == row["name"] else plain


def _covered(box: np.ndarray, taken: np.ndarray, frame: np.ndarray) -> float:
    """Pixels of `box` that `taken` [boxes, 4] covers, and those outside the frame."""
    (inside,) = _overlap(box, frame[None])
    return float(_overlap(box, taken).sum() + np.prod(box[2:] - box[:2]) - inside)


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return sides.clip(0).prod(axis=1)
