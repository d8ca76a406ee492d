"""Draws a comparison: size against divergence, both logarithmic, the front as a line. Needs matplotlib, no torch."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.compress.compare import Comparison
from pressd.compress.label_places import PLACES, Box, along, around, best_place
from pressd.compress.log_axis import log_limits
from pressd.compress.pareto_points import ParetoPoint, pareto_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_INCHES, _DPI = (8.0, 5.5), 150
# Half the room, in pixels, that a point and a line take.
_POINT, _LINE = 8.0, 3.0
_FRONT, _OTHER = "#0b6e4f", "#8a8f98"


def require_matplotlib() -> None:
    """Raise ValueError with the way out if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("--png needs matplotlib; run: pip install 'pressd[plots]'") from None


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG of the comparable rows to `path`: the same bytes for the same rows.

    A row that does not diverge at all has no place on a logarithmic axis and is drawn at the bottom, and named so.
    Raises ValueError if there is no such row, or no matplotlib.
    """
    # Without a version of matplotlib inside.
    figure_of(comparison).savefig(path, format="png", metadata={"Software": None})


def figure_of(comparison: Comparison) -> "Figure":
    """Return what `draw` writes; raises as it does."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = pareto_points(comparison)
    if not points:
        raise ValueError("nothing that was measured can be drawn; run `pressd eval DIR` first")
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _set_axes(axes, points, comparison.data)
    front = sorted((point.mebibytes, point.kl) for point in points if point.front)
    axes.plot(*zip(*front, strict=True), color=_FRONT, linewidth=1.2, zorder=1, label="front")
    for point in points:
        marker = "v" if point.exact else "o"
        axes.scatter([point.mebibytes], [point.kl], s=34, marker=marker, color=_color(point), zorder=3)
    figure.draw_without_rendering()  # lays the axes out: only then do places on them have coordinates
    _name_points(axes, points, front)
    return figure


def _color(point: ParetoPoint) -> str:
    return _FRONT if point.front else _OTHER


def _set_axes(axes: "Axes", points: Sequence[ParetoPoint], data: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*log_limits([point.mebibytes for point in points]))
    axes.set_ylim(*log_limits([point.kl for point in points]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("mean KL divergence from the source, nats per token")
    axes.set_title(data, fontsize=8, color=_OTHER, wrap=True)
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)


def _name_points(axes: "Axes", points: Sequence[ParetoPoint], front: Sequence[tuple[float, float]]) -> None:
    """Write each name where it covers no point, line, other name or edge; the front's names choose first."""
    places = [_place(axes, point.mebibytes, point.kl) for point in points]
    taken = [around(*place, _POINT) for place in places]
    for start, end in pairwise(_place(axes, *corner) for corner in front):  # straight on paper
        taken += along(start, end, _LINE)
    inside = _box(axes.get_window_extent())
    for point in sorted(points, key=lambda point: (not point.front, point.mebibytes, point.kl)):
        candidates = list(_candidates(axes, point))
        boxes = [_box(label.get_window_extent()) for label in candidates]
        best = best_place(boxes, taken, inside)
        taken.append(boxes[best])
        for label in candidates[:best] + candidates[best + 1 :]:
            label.remove()


def _candidates(axes: "Axes", point: ParetoPoint) -> "Iterator[Annotation]":
    for dx, dy in PLACES:
        yield axes.annotate(
            point.label,
            (point.mebibytes, point.kl),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="bottom" if dy > 0 else "top" if dy < 0 else "center",
            fontsize=9,
            color=_color(point),
        )


def _place(axes: "Axes", mebibytes: float, kl: float) -> tuple[float, float]:
    x, y = axes.transData.transform((mebibytes, kl))
    return float(x), float(y)


def _box(extent: "Bbox") -> Box:
    return Box(x0=extent.x0, y0=extent.y0, x1=extent.x1, y1=extent.y1)
