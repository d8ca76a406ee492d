"""The points of a comparison that can be drawn: size against divergence, both on logarithmic axes. No torch."""

import math
from dataclasses import dataclass

from pressd.compress.compare import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One artifact: MiB of weights, and nats of KL per token, or where it is drawn if it does not diverge at all."""

    name: str
    mebibytes: float
    kl: float
    exact: bool
    front: bool

    @property
    def label(self) -> str:
        """Its name, and that it is not where it is drawn."""
        return f"{self.name} (KL 0)" if self.exact else self.name


def pareto_points(comparison: Comparison) -> list[ParetoPoint]:
    """Return the comparable rows that were measured; zero has no place on the axis and becomes a third of the rest."""
    rows = [
        (row, row.kl_mean)
        for row in comparison.rows
        if row.comparable and row.kl_mean is not None and math.isfinite(row.kl_mean)
    ]
    floor = min((kl for _, kl in rows if kl > 0), default=3e-6) / 3
    return [
        ParetoPoint(name=row.name, mebibytes=row.bytes / 2**20, kl=max(kl, floor), exact=kl <= 0, front=row.front)
        for row, kl in rows
    ]
