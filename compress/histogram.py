"""How often absolute values occur, in bins of equal width, without knowing beforehand how large they get."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1 << 14
# So many values are counted at once: float32, in which torch counts, has every whole number up to here.
_EXACT = 1 << 24
# Of a histogram without values: less than that of any which has some.
_NO_LIMIT = 2.0**-100


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """`counts` float64 [BINS] of |x| in bins from 0 to `limit`; `top`, a number in a tensor, is the largest |x|.

    `limit` is a power of two, so that histograms of two ranges merge without splitting a bin. Exact zeros are counted
    apart, in `zeros`: they stay zero at any scale, and would drown everything else.
    """

    counts: Tensor
    zeros: int
    limit: float
    top: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Histogram":
        """Count the values of x, of any shape; where one is not finite, `top` says so and nothing is counted."""
        sizes = x.detach().abs().flatten().float()
        top = sizes.max()
        counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        if not bool(torch.isfinite(top)):
            return cls(counts=counts, zeros=0, limit=_NO_LIMIT, top=top)
        limit = _power_above(float(top))
        zeros = int((sizes == 0).sum())
        for part in torch.split(sizes, _EXACT):
            counts += torch.histc(part, bins=BINS, min=0.0, max=limit)
        counts[0] -= zeros
        return cls(counts=counts, zeros=zeros, limit=limit, top=top)

    def merged(self, other: "Histogram") -> "Histogram":
        """Return the histogram of both."""
        limit = max(self.limit, other.limit)
        return Histogram(
            counts=self._up_to(limit) + other._up_to(limit),
            zeros=self.zeros + other.zeros,
            limit=limit,
            top=torch.maximum(self.top, other.top),
        )

    def to(self, device: torch.device) -> "Histogram":
        """Return it on another device."""
        return Histogram(counts=self.counts.to(device), zeros=self.zeros, limit=self.limit, top=self.top.to(device))

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.limit / BINS

    def _up_to(self, limit: float) -> Tensor:
        """The counts in bins of a range that is a power of two times as wide."""
        together = round(limit / self.limit)
        if together >= BINS:
            counts = torch.zeros_like(self.counts)
            counts[0] = self.counts.sum()
            return counts
        counts = torch.zeros_like(self.counts)
        counts[: BINS // together] = self.counts.view(-1, together).sum(1)
        return counts


def _power_above(value: float) -> float:
    """The smallest power of two that is larger."""
    if value == 0:
        return _NO_LIMIT
    _, exponent = math.frexp(value)
    return max(2.0**exponent, _NO_LIMIT)
