"""Where a name can stand beside its point without covering anything. Pure geometry in any unit of length. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

# Where a name may stand, from its point, in points of type: right, left, above, below, then the corners, then further.
PLACES = tuple(
    (dx * reach, dy * reach)
    for reach in (8, 16, 26, 38)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
)
# Squares that cover one stretch of line.
_STEPS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """An upright rectangle; which way y grows does not matter."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def shared(self, other: "Box") -> float:
        """Area that two boxes have in common."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)


def around(x: float, y: float, half: float) -> Box:
    """Return a square of twice `half` around a point."""
    return Box(x0=x - half, y0=y - half, x1=x + half, y1=y + half)


def along(start: tuple[float, float], end: tuple[float, float], half: float) -> list[Box]:
    """Return small squares that cover a straight line but for its ends."""
    (x0, y0), (x1, y1) = start, end
    return [around(x0 + (x1 - x0) * step / _STEPS, y0 + (y1 - y0) * step / _STEPS, half) for step in range(1, _STEPS)]


def best_place(boxes: Sequence[Box], taken: Sequence[Box], inside: Box) -> int:
    """Return which of `boxes` covers least of what is taken and leaves least of `inside`; the first among equals."""
    costs = [sum(box.shared(other) for other in taken) + box.area - box.shared(inside) for box in boxes]
    return costs.index(min(costs))
