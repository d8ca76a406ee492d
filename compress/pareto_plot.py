"""Draws a comparison: size against divergence, both logarithmic, the front as a line. Needs matplotlib, no torch."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.compress.compare import Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_INCHES, _DPI = (8.0, 5.5), 150
_MARGIN = 0.12
# Half the room, in pixels, that a point and a line take; squares that cover one stretch of line.
_POINT, _LINE, _STEPS = 8.0, 3.0, 40
_FRONT, _OTHER = "#0b6e4f", "#8a8f98"
# Where a name may stand, from its point, in points of type: right, left, above, below, then the corners, then further.
_PLACES = tuple(
    (dx * reach, dy * reach)
    for reach in (8, 16, 26, 38)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
)


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

    rows = [row for row in comparison.rows if row.comparable and row.kl_mean is not None and math.isfinite(row.kl_mean)]
    if not rows:
        raise ValueError("nothing that was measured can be drawn; run `pressd eval DIR` first")
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = _points(rows)
    _set_axes(axes, points, comparison.data)
    front = sorted(point for point, row in zip(points, rows, strict=True) if row.front)
    axes.plot(*zip(*front, strict=True), color=_FRONT, linewidth=1.2, zorder=1, label="front")
    for (x, y), row in zip(points, rows, strict=True):
        axes.scatter([x], [y], s=34, marker="v" if _is_exact(row) else "o", color=_color(row), zorder=3)
    figure.draw_without_rendering()  # lays the axes out: only then do places on them have coordinates
    _name_points(axes, points, rows, front)
    return figure


def _points(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """MiB and KL of each row; zero becomes a third of the smallest that is not."""
    divergences = [float(row.kl_mean or 0.0) for row in rows]
    floor = min((value for value in divergences if value > 0), default=3e-6) / 3
    return [(row.bytes / 2**20, max(value, floor)) for row, value in zip(rows, divergences, strict=True)]


def _is_exact(row: Row) -> bool:
    return row.kl_mean is not None and row.kl_mean <= 0


def _color(row: Row) -> str:
    return _FRONT if row.front else _OTHER


def _set_axes(axes: "Axes", points: Sequence[tuple[float, float]], data: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*_limits([x for x, _ in points]))
    axes.set_ylim(*_limits([y for _, y in points]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("mean KL divergence from the source, nats per token")
    axes.set_title(data, fontsize=8, color=_OTHER, wrap=True)
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that leave room for names: a part of what is spanned, at least a tenth of a decade."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(_MARGIN * (high - low), 0.1)
    return 10 ** (low - room), 10 ** (high + room)


def _name_points(
    axes: "Axes",
    points: Sequence[tuple[float, float]],
    rows: Sequence[Row],
    front: Sequence[tuple[float, float]],
) -> None:
    """Write each name where it covers no point, line, other name or edge; the front's names choose first."""
    taken = [*(_around(axes, point, _POINT) for point in points), *_along(axes, front)]
    order = sorted(range(len(rows)), key=lambda index: (not rows[index].front, points[index]))
    inside = axes.get_window_extent()
    for index in order:
        name = f"{rows[index].name} (KL 0)" if _is_exact(rows[index]) else rows[index].name
        candidates = list(_candidates(axes, name, points[index], _color(rows[index])))
        boxes = [label.get_window_extent() for label in candidates]
        costs = [_cost(box, taken, inside) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        for label in candidates[:best] + candidates[best + 1 :]:
            label.remove()


def _candidates(axes: "Axes", name: str, point: tuple[float, float], color: str) -> "Iterator[Annotation]":
    for dx, dy in _PLACES:
        yield axes.annotate(
            name,
            point,
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="bottom" if dy > 0 else "top" if dy < 0 else "center",
            fontsize=9,
            color=color,
        )


def _around(axes: "Axes", point: tuple[float, float], half: float) -> "Bbox":
    """A square of twice `half` pixels around a point of the data."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(point)
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _along(axes: "Axes", line: Sequence[tuple[float, float]]) -> "Iterator[Bbox]":
    """Small squares that cover a line: straight on paper, so straight in the logarithms."""
    for (x0, y0), (x1, y1) in pairwise(line):
        for step in range(1, _STEPS):
            part = step / _STEPS
            yield _around(axes, (x0 * (x1 / x0) ** part, y0 * (y1 / y0) ** part), _LINE)


def _cost(box: "Bbox", taken: "Sequence[Bbox]", inside: "Bbox") -> float:
    """Area that is covered already or lies outside, in pixels; the first place without any is taken."""
    from matplotlib.transforms import Bbox

    overlaps = (Bbox.intersection(box, other) for other in taken)
    covered = sum(both.width * both.height for both in overlaps if both is not None)
    seen = Bbox.intersection(box, inside)
    return float(covered + box.width * box.height - (0.0 if seen is None else seen.width * seen.height))
