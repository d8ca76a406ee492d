"""The sensitivity map: one field per fused group, layers from left to right as data flows, darker where more is lost.

No torch. A field says its number where there is room, and always to whoever points at it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pressd.compress.markup import Html, element
from pressd.compress.page_style import NUM_SHADES
from pressd.compress.svg import SMALL, drawing, shortened, stride, width_of, words
from pressd.runtime.artifact.manifest import PlannedGroup

_LAYER = re.compile(r"layers\.([0-9]{1,6})\.(.+)")
_TOP, _BELOW, _GAP, _END = 8.0, 26.0, 2.0, 58.0
_NARROWEST, _WIDEST, _LOW, _HIGH = 9.0, 76.0, 22.0, 32.0
# The narrowest field that a number such as 12.3 is written into.
_ROOMY = 34.0
_NAME = 130.0
# Errors that span less than the first factor are shaded as if they did (so that chance looks pale), those that span
# more than the second by their logarithms.
_LEAST_SPAN, _LINEAR_SPAN = 2.0, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """Groups by where they stand: `layers` by kind and number, and those outside, before and behind them."""

    before: tuple[PlannedGroup, ...]
    kinds: tuple[str, ...]
    numbers: tuple[int, ...]
    layers: dict[tuple[str, int], PlannedGroup]
    behind: tuple[PlannedGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shades:
    """A scale from the least to the largest error in layers that is not zero."""

    low: float
    high: float
    is_log: bool

    def shade(self, error: float) -> int:
        """The number of a shade, from 0, for an error above zero; the nearest where the scale does not reach."""
        part = (self._scaled(error) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return min(max(int(part * NUM_SHADES), 0), NUM_SHADES - 1)

    def bound(self, shade: int) -> float:
        """The least error of a shade."""
        start, end = self._scaled(self.low), self._scaled(self.high)
        bound = start + (end - start) * (shade / NUM_SHADES)
        return math.exp(bound) if self.is_log else bound

    def _scaled(self, error: float) -> float:
        return math.log(error) if self.is_log else error


def arrange(plan: Sequence[PlannedGroup]) -> LayerErrors:
    """Sort a plan's groups into a map; a group whose name is no layer's stands outside."""
    before: list[PlannedGroup] = []
    behind: list[PlannedGroup] = []
    layers: dict[tuple[str, int], PlannedGroup] = {}
    for group in plan:
        match = _LAYER.fullmatch(group.name)
        if match is not None:
            layers[match[2], int(match[1])] = group
        else:
            (behind if layers else before).append(group)
    return LayerErrors(
        before=tuple(before),
        kinds=tuple(dict.fromkeys(kind for kind, _ in layers)),
        numbers=tuple(sorted({number for _, number in layers})),
        layers=layers,
        behind=tuple(behind),
    )


def shades_of(errors: LayerErrors) -> Shades | None:
    """Return a scale, None if nothing was lost.

    Layers are what is compared: embed and head, few and often kept in more bits, stretch it only where no layer lost
    anything.
    """
    layers = _lossy(errors.layers.values())
    found = layers or _lossy([*errors.before, *errors.behind])
    return _scale(found) if found else None


def _lossy(groups: Iterable[PlannedGroup]) -> list[float]:
    return [group.error for group in groups if math.isfinite(group.error) and group.error > 0]


def _scale(errors: Sequence[float]) -> Shades:
    high = max(errors)
    low = min(*errors, high / _LEAST_SPAN)
    return Shades(low=low, high=high, is_log=high > _LINEAR_SPAN * low > 0)


def heat_map(name: str, errors: LayerErrors, shades: Shades | None, *, title: str, width: float = 912.0) -> Html:
    """Return the map of at least one group; `width` is exceeded where layers are too many for it."""
    left = max((width_of(shortened(kind, _NAME)) for kind in errors.kinds), default=0.0) + 12
    ends = (_END + 2 * _GAP) * (len(errors.before) + len(errors.behind))
    step = min(max((width - left - ends) / max(len(errors.numbers), 1), _NARROWEST), _WIDEST)
    high = _HIGH if step >= _ROOMY else _LOW
    bottom = _TOP + max(len(errors.kinds), 1) * high

    def outside(groups: Sequence[PlannedGroup], start: float) -> Iterator[Html]:
        for index, group in enumerate(groups):
            x = start + index * (_END + 2 * _GAP)
            yield _field(group, shades, x, _TOP, _END, bottom - _TOP - _GAP, roomy=True)
            label = shortened(group.name, _END, SMALL)
            yield words(x + _END / 2, bottom + 16, label, anchor="middle", class_="quiet", size=SMALL)

    def parts() -> Iterator[Html]:
        start = left + (_END + 2 * _GAP) * len(errors.before)
        yield from outside(errors.before, left)
        for row, kind in enumerate(errors.kinds):
            y = _TOP + row * high
            yield words(left - 10, y + high / 2 + 3, shortened(kind, _NAME), anchor="end")
            for column, number in enumerate(errors.numbers):
                if (group := errors.layers.get((kind, number))) is not None:
                    x = start + column * step
                    yield _field(group, shades, x, y, step - _GAP, high - _GAP, roomy=step >= _ROOMY)
        yield from _numbers(errors.numbers, start, step, bottom)
        yield from outside(errors.behind, start + step * len(errors.numbers) + _GAP)

    told = f"{len(errors.numbers)} layers by {', '.join(errors.kinds) or 'none'}; the numbers are in the table below"
    full = left + ends + step * len(errors.numbers) + 4
    return drawing(name, full, bottom + _BELOW, parts(), title=title, told=told)


def legend(name: str, shades: Shades, *, title: str) -> Html:
    """Return the scale: what each shade means, in percent."""
    box = 58.0

    def parts() -> Iterator[Html]:
        for shade in range(NUM_SHADES):
            x = 16 + shade * box
            yield element("rect", x=x, y=2, width=box - _GAP, height=12, rx=1.5, class_=f"h{shade}")
        for shade in range(NUM_SHADES + 1):
            x = 16 + shade * box - (_GAP / 2)
            yield words(x, 28, percent(shades.bound(shade)), anchor="middle", class_="quiet", size=SMALL)

    told = (
        f"from {percent(shades.low)} to {percent(shades.high)} percent, {'logarithmic' if shades.is_log else 'linear'}"
    )
    return drawing(name, 32 + NUM_SHADES * box, 34, parts(), title=title, told=told)


def percent(error: float) -> str:
    """An error in percent, to three digits, without the sign."""
    if not math.isfinite(100 * error):
        return "not finite"
    return f"{100 * error:#.3g}".removesuffix(".")


def _field(
    group: PlannedGroup, shades: Shades | None, x: float, y: float, width: float, height: float, *, roomy: bool
) -> Html:
    """One group: shaded if it lost something, outlined if not, crossed out if its error is no number."""
    is_number, is_lossy = math.isfinite(group.error), group.error > 0
    shade = shades.shade(group.error) if shades is not None and is_number and is_lossy else None
    class_ = "kept" if shade is None else f"h{shade}"
    label = (percent(group.error) if is_lossy else "–") if is_number else "✕"
    shown = roomy or not is_number
    return element(
        "g",
        element("title", f"{group.name}, {group.scheme}: {percent(group.error)}{' %' if is_number else ''}"),
        element("rect", x=x, y=y, width=width, height=height, rx=1.5, class_=class_),
        *(
            [
                words(
                    x + width / 2,
                    y + height / 2 + 4,
                    label,
                    anchor="middle",
                    class_="quiet" if shade is None else f"t{shade}",
                    size=SMALL,
                )
            ]
            if shown
            else []
        ),
    )


def _numbers(numbers: Sequence[int], start: float, step: float, bottom: float) -> Iterator[Html]:
    """Numbers of layers, as many as there is room for."""
    every = stride(step, 28.0)
    for column in (column for column, number in enumerate(numbers) if number % every == 0):
        x = start + column * step + (step - _GAP) / 2
        yield words(x, bottom + 16, str(numbers[column]), anchor="middle", class_="quiet", size=SMALL)
