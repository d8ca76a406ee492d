"""Bars: a few with names, lying, or many in order, standing. No torch."""

from collections.abc import Iterator, Mapping, Sequence

from pressd.compress.markup import Html, element
from pressd.compress.svg import SMALL, drawing, shortened, stride, ticks, width_of, words

_ROW, _BAR = 26.0, 14.0
_WIDEST_NAME = 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM, _NARROWEST, _WIDEST = 52.0, 20.0, 12.0, 24.0, 5.0, 44.0


def lying_bars(name: str, values: Mapping[str, float], unit: str, *, title: str, width: float = 430.0) -> Html:
    """Return one bar below the other, each with its name before and its number behind it."""
    names = {key: shortened(key, _WIDEST_NAME) for key in values}
    most = max(values.values())
    digits = 3 if most < 10 else 1
    numbers = {key: f"{value:.{digits}f} {unit}" for key, value in values.items()}
    left = max(width_of(text) for text in names.values()) + 12
    room = width - left - max(width_of(text) for text in numbers.values()) - 12

    def rows() -> Iterator[Html]:
        for index, (key, value) in enumerate(values.items()):
            y = index * _ROW
            length = room * value / most if most > 0 else 0.0
            yield element(
                "g",
                element("title", f"{key}: {numbers[key]}"),
                words(left - 10, y + 17, names[key], anchor="end"),
                element("rect", x=left, y=y + 6, width=length, height=_BAR, rx=1.5, class_="bar"),
                words(left + length + 8, y + 17, numbers[key], class_="quiet"),
            )

    told = "; ".join(f"{key} {numbers[key]}" for key in values)
    return drawing(name, width, len(values) * _ROW + 6, rows(), title=title, told=told)


def standing_bars(
    name: str,
    values: Sequence[tuple[str, str, float]],
    unit: str,
    *,
    title: str,
    width: float = 430.0,
    height: float = 170.0,
) -> Html:
    """Return bars side by side from (name, mark below the axis, value); marks are left out where they would touch."""
    step = min(max((width - _LEFT - _RIGHT) / len(values), _NARROWEST), _WIDEST)
    width = max(width, _LEFT + _RIGHT + step * len(values))
    bottom = height - _BOTTOM
    # Where nothing took a measurable time there is still an axis.
    scale = ticks(max(value for *_, value in values) or 1.0, 4)
    up = (bottom - _TOP) / scale[-1]

    def parts() -> Iterator[Html]:
        for value in scale:
            y = bottom - value * up
            yield element("line", x1=_LEFT, x2=width - _RIGHT + 8, y1=y, y2=y, class_="grid" if value else "axis")
            yield words(_LEFT - 8, y + 4, f"{value:g}", anchor="end", class_="quiet", size=SMALL)
        for index, (key, _, value) in enumerate(values):
            x = _LEFT + 4 + index * step
            yield element(
                "rect",
                element("title", f"{key}: {value:.3f} {unit}"),
                x=x,
                y=bottom - value * up,
                width=step - min(3.0, step / 4),
                height=value * up,
                class_="bar",
            )
        for index, mark in _marks([mark for _, mark, _ in values], step):
            x = _LEFT + 4 + (index + 0.5) * step - 1.5
            yield words(x, bottom + 16, mark, anchor="middle", class_="quiet", size=SMALL)

    slowest = max(values, key=lambda value: value[2])
    told = f"{len(values)} blocks; the longest is {slowest[0]} with {slowest[2]:.3f} {unit}"
    return drawing(name, width, height, parts(), title=title, told=told)


def _marks(marks: Sequence[str], step: float) -> Iterator[tuple[int, str]]:
    """Yield (column, mark) of those that do not touch: words first, then round numbers."""
    taken: list[tuple[float, float]] = []
    every = stride(step, 28.0)
    for index, mark in sorted(enumerate(marks), key=lambda pair: pair[1].isdecimal()):
        half = width_of(mark, SMALL) / 2 + 2
        start, end = index * step - half, index * step + half
        is_round = not mark.isdecimal() or int(mark[-12:]) % every == 0
        if is_round and all(end <= other or start >= ending for other, ending in taken):
            taken.append((start, end))
            yield index, mark
