"""What can be read of a measurement, which is a free object in a manifest: numbers, and gates kept. No torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Metrics of which more is better, so that a gate bounds them from below.
_HIGHER_IS_BETTER = frozenset({"top1_agreement"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A bound of the recipe, what was measured (None: nothing, or nothing finite), and whether it was kept.

    `kept` is None before anything is measured.
    """

    metric: str
    bound: float
    at_least: bool
    value: float | None
    kept: bool | None


def finite(value: object) -> float | None:
    """Return a number of a measurement, None for what is no number, or not a finite one."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON has integers that no float holds
        return None
    return number if math.isfinite(number) else None


def standard_error(quality: Mapping[str, object], metric: str) -> float | None:
    """Return the standard error of a metric, if it was measured."""
    errors = quality.get("stderr")
    return finite(errors.get(metric)) if isinstance(errors, dict) else None


def keeps(metric: str, value: float, bound: float) -> bool:
    """Whether a value keeps a gate; NaN keeps none."""
    return value >= bound if metric in _HIGHER_IS_BETTER else value <= bound


def check_gates(gates: Mapping[str, float], quality: Mapping[str, object]) -> Iterator[Gate]:
    """Yield each gate, by name."""
    for metric, bound in sorted(gates.items()):
        value = finite(quality.get(metric))
        yield Gate(
            metric=metric,
            bound=bound,
            at_least=metric in _HIGHER_IS_BETTER,
            value=value,
            kept=None if not quality else value is not None and keeps(metric, value, bound),
        )
