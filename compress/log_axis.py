"""Logarithmic axes: where they end, and which round numbers they show. No torch."""

import math

# Each finer than the one before; the last still leaves room for names on the shortest axis.
_MANTISSAS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 9.5),
)


def log_limits(values: list[float], margin: float = 0.12) -> tuple[float, float]:
    """Ends of a logarithmic axis that leave room for names: a part of what is spanned, at least a tenth of a decade."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(margin * (high - low), 0.1)
    return 10 ** (low - room), 10 ** (high + room)


def log_ticks(low: float, high: float, fewest: int = 3) -> list[float]:
    """Return round numbers between the ends of a logarithmic axis: at least `fewest`, if there are."""
    found: list[float] = []
    for mantissas in _MANTISSAS:
        found = [
            mantissa * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for mantissa in mantissas
            if low <= mantissa * 10.0**power <= high
        ]
        if len(found) >= fewest:
            break
    return found
