"""What drawings are made of: a frame that is read aloud, text, ticks, and how wide words are. No torch.

Colours are classes of the page's style, so that a drawing follows its light and dark.
"""

import math
import unicodedata
from collections.abc import Iterable

from pressd.compress.markup import Html, element, join

# Of the type's size: what a letter of the widest usual typeface without serifs takes on average, rounded up.
_EM = 0.66
SMALL, NORMAL = 11.0, 12.0


def drawing(name: str, width: float, height: float, parts: Iterable[str], *, title: str, told: str) -> Html:
    """Return an SVG of this size in pixels, in a box that scrolls where the page is narrower.

    `name` is its own in the page; `title` and `told` are what a reader hears who does not see it.
    """
    size = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "width": f"{width:.0f}", "height": f"{height:.0f}"}
    return element(
        "div",
        element(
            "svg",
            element("title", title, id=f"{name}-title"),
            element("desc", told, id=f"{name}-told"),
            join(parts),
            role="img",
            aria_labelledby=f"{name}-title {name}-told",
            xmlns="http://www.w3.org/2000/svg",
            **size,
        ),
        class_="drawing",
    )


def words(x: float, y: float, text: str, *, anchor: str = "start", class_: str = "", size: float = NORMAL) -> Html:
    """Return one line of text whose baseline is at y; `anchor` is start, middle or end."""
    return element("text", text, x=x, y=y, text_anchor=anchor, font_size=size, class_=class_ or "ink")


def width_of(text: str, size: float = NORMAL) -> float:
    """Return about how many pixels a line of text takes, rather more than less."""
    cells = sum(1.75 if unicodedata.east_asian_width(letter) in "WF" else 1.0 for letter in text)
    return cells * size * _EM


def shortened(text: str, room: float, size: float = NORMAL) -> str:
    """Return text that takes at most `room` pixels: its beginning, if it has to be cut."""
    if width_of(text, size) <= room:
        return text
    kept = text
    while kept and width_of(f"{kept}…", size) > room:
        kept = kept[:-1]
    return f"{kept}…"


def ticks(top: float, most: int) -> list[float]:
    """Return round numbers from 0 that reach at least `top`, at most `most` + 1 of them; `top` is more than 0."""
    step = next(
        step
        for power in range(math.floor(math.log10(top / most)), 400)
        for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if step * most >= top
    )
    return [index * step for index in range(math.ceil(top / step) + 1)]


def stride(step: float, room: float) -> int:
    """Return how many columns of `step` pixels a mark below them stands for, if it takes `room`: 1, 2, 5, 10, ..."""
    unit = 1
    while True:
        for count in (unit, 2 * unit, 5 * unit):
            if count * step >= room:
                return count
        unit *= 10
