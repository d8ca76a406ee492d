"""Points with names on two logarithmic axes, some of them joined. No torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pressd.compress.label_places import PLACES, Box, along, around, best_place
from pressd.compress.log_axis import log_limits, log_ticks
from pressd.compress.markup import Html, element, escape
from pressd.compress.svg import NORMAL, SMALL, drawing, shortened, width_of, words

_LEFT, _RIGHT, _TOP, _BOTTOM = 80.0, 16.0, 14.0, 52.0
# Half the room that a point and a line take; the longest name, as a part of the width.
_POINT, _LINE, _NAME = 7.0, 3.0, 0.4
# A line of type stands this far above and below its baseline, of its size.
_ASCENT, _DESCENT = 0.78, 0.24


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point, in units of the axes, both above zero; `told` is what it says to whoever points at it.

    `joined` dots are filled and connected in order of x; `exact` ones, which the axis has no place for, are triangles.
    """

    name: str
    told: str
    x: float
    y: float
    joined: bool
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Where a value lies in the drawing: straight in the logarithms."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float
    height: float

    @property
    def inside(self) -> Box:
        """The rectangle between the axes."""
        return Box(x0=_LEFT, y0=_TOP, x1=self.width - _RIGHT, y1=self.height - _BOTTOM)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels from the upper left corner."""
        inside = self.inside
        across, up = (math.log(at / low) / math.log(high / low) for at, (low, high) in ((x, self.x), (y, self.y)))
        return inside.x0 + across * (inside.x1 - inside.x0), inside.y1 - up * (inside.y1 - inside.y0)


def scatter(
    name: str,
    dots: Sequence[Dot],
    *,
    labels: tuple[str, str],
    title: str,
    told: str,
    size: tuple[float, float] = (720.0, 430.0),
) -> Html:
    """Return a drawing of at least one dot; `labels` are those of the axes, across and up."""
    limits = (log_limits([dot.x for dot in dots]), log_limits([dot.y for dot in dots]))
    axes = Axes(x=limits[0], y=limits[1], width=size[0], height=size[1])
    front = sorted((dot for dot in dots if dot.joined), key=lambda dot: (dot.x, dot.y))
    line = [axes.place(dot.x, dot.y) for dot in front]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    parts = [
        *_scales(axes, labels),
        *([element("polyline", points=path, class_="front")] if len(line) > 1 else []),
        *(_mark(dot, axes) for dot in dots),
        *_names(dots, axes, line),
    ]
    return drawing(name, *size, parts, title=title, told=told)


def _scales(axes: Axes, labels: tuple[str, str]) -> Iterator[Html]:
    inside = axes.inside
    middle = (inside.y0 + inside.y1) / 2
    for value in log_ticks(*axes.x):
        x, _ = axes.place(value, axes.y[0])
        yield element("line", x1=x, x2=x, y1=inside.y0, y2=inside.y1, class_="grid")
        yield words(x, inside.y1 + 17, f"{value:g}", anchor="middle", class_="quiet", size=SMALL)
    for value in log_ticks(*axes.y):
        _, y = axes.place(axes.x[0], value)
        yield element("line", x1=inside.x0, x2=inside.x1, y1=y, y2=y, class_="grid")
        yield words(inside.x0 - 8, y + 4, f"{value:g}", anchor="end", class_="quiet", size=SMALL)
    yield element("line", x1=inside.x0, x2=inside.x1, y1=inside.y1, y2=inside.y1, class_="axis")
    yield element("line", x1=inside.x0, x2=inside.x0, y1=inside.y0, y2=inside.y1, class_="axis")
    yield words((inside.x0 + inside.x1) / 2, axes.height - 10, labels[0], anchor="middle", class_="quiet")
    yield element(
        "text",
        labels[1],
        transform=f"translate(14 {middle:.1f}) rotate(-90)",
        text_anchor="middle",
        font_size=NORMAL,
        class_="quiet",
    )


def _mark(dot: Dot, axes: Axes) -> Html:
    x, y = axes.place(dot.x, dot.y)
    class_ = "dot on" if dot.joined else "dot off"
    shape = (
        element("path", d=f"M{x - 5.5:.1f} {y - 4.5:.1f}h11l-5.5 10z", class_=class_)
        if dot.exact
        else element("circle", cx=x, cy=y, r=5, class_=class_)
    )
    return element("g", element("title", dot.told), shape)


def _names(dots: Sequence[Dot], axes: Axes, line: Sequence[tuple[float, float]]) -> Iterator[Html]:
    """Write each name where it covers no point, line, other name or edge; the front's names choose first."""
    taken = [around(*axes.place(dot.x, dot.y), _POINT) for dot in dots]
    for start, end in pairwise(line):
        taken += along(start, end, _LINE)
    for dot in sorted(dots, key=lambda dot: (not dot.joined, dot.x, dot.y)):
        name = shortened(dot.name, _NAME * axes.width)
        places = [_written(name, axes.place(dot.x, dot.y), place) for place in PLACES]
        best = best_place([box for box, _ in places], taken, axes.inside)
        box, anchor = places[best]
        taken.append(box)
        x = {"start": box.x0, "middle": (box.x0 + box.x1) / 2, "end": box.x1}[anchor]
        class_ = "ink strong" if dot.joined else "quiet"
        yield words(x, box.y1 - _DESCENT * NORMAL, escape(name), anchor=anchor, class_=class_)


def _written(name: str, point: tuple[float, float], place: tuple[float, float]) -> tuple[Box, str]:
    """The box of a name in this place beside its point, and how it is anchored there."""
    width, height = width_of(name), (_ASCENT + _DESCENT) * NORMAL
    # A point of type is a third more than a pixel; the names of places count upwards.
    x, y = point[0] + 4 / 3 * place[0], point[1] - 4 / 3 * place[1]
    anchor = "start" if place[0] > 0 else "end" if place[0] < 0 else "middle"
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    top = y - (height if place[1] > 0 else 0.0 if place[1] < 0 else height / 2)
    return Box(x0=left, y0=top, x1=left + width, y1=top + height), anchor
