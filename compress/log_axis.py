"""Logarithmic axes: where they end, and which round numbers they show. No torch."""

import math

# Each finer than the one before; on an axis too short for the last, round numbers are equally far apart.
_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))


def log_limits(values: list[float], margin: float = 0.12) -> tuple[float, float]:
    """Ends of a logarithmic axis that leave room for names: a part of what is spanned, at least a tenth of a decade."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(margin * (high - low), 0.1)
    return 10 ** (low - room), 10 ** (high + room)


def log_ticks(low: float, high: float, fewest: int = 3) -> list[float]:
    """Return round numbers between the ends of a logarithmic axis, at least `fewest`, and few more if they can be."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        found = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
        found = [value for value in found if low <= value <= high]
        if len(found) >= fewest:
            return found
    power = powers[-1]
    while True:
        for step in (5 * 10.0**power, 2 * 10.0**power, 10.0**power):
            found = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
            if len(found) >= fewest:
                return found
        power -= 1
