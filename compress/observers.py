"""Where a static scale should end, from a histogram of absolute values: four answers, each a threshold.

Values above the threshold are cut off; those below it are rounded to what 8 bits have of one sign: `kind` "int8" means
levels of equal distance, "fp8" those of e4m3, whose distance grows with the value.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pressd.compress.histogram import Histogram
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.integer_codes import HALF_RANGE_8

# Where the threshold goes, as a multiple of the scale, by the type of the codes.
ENDS = {"int8": HALF_RANGE_8, fp8.NAME: fp8.LARGEST}
# Codes of one sign; a threshold of fewer bins than that would say nothing about rounding.
LEVELS = 128
# Each threshold that is tried is this part of the one before, the first being the largest value.
_SHRINK = 0.98
# Stands for no probability at all where one is divided by.
_NONE = 1e-12


def min_max(histogram: Histogram, kind: str, percentage: float) -> float:
    """Return the largest value there was: nothing is cut off."""
    return float(histogram.top)


def percentile(histogram: Histogram, kind: str, percentage: float) -> float:
    """Return the end of the bin that `percentage` per cent of the values do not exceed, zeros included."""
    total = float(histogram.counts.sum()) + histogram.zeros
    below = histogram.counts.cumsum(0) + histogram.zeros
    index = int((below < total * percentage / 100).sum())
    return min((index + 1) * histogram.width, float(histogram.top))


def squared_error(histogram: Histogram, kind: str, percentage: float) -> float:
    """Return the threshold of the least mean squared error: of rounding below it, and of cutting off above."""
    centres = _centres(histogram)

    def lost(edge: int) -> float:
        _, rounded = _round(centres, edge * histogram.width, kind)
        return float(((centres - rounded).square() * histogram.counts).sum())

    return _best(histogram, lost)


def divergence(histogram: Histogram, kind: str, percentage: float) -> float:
    """Return the threshold whose quantised distribution is closest to the true one by KL divergence.

    For each threshold: P is the histogram up to it, with all that is cut off in its last bin; Q is the histogram up to
    it gathered into the codes that its bins are rounded to, each code's count spread evenly over those of its bins that
    hold anything (Migacz 2017, "8-bit inference with TensorRT", GPU Technology Conference). How far off a value ends
    that is cut off does not count: with outliers that matter, the squared error is the better judge.
    """
    centres = _centres(histogram)

    def apart(edge: int) -> float:
        level, _ = _round(centres[:edge], edge * histogram.width, kind)
        return _divergence(histogram.counts, level)

    return _best(histogram, apart)


OBSERVERS: dict[str, Callable[[Histogram, str, float], float]] = {
    "minmax": min_max,
    "percentile": percentile,
    "mse": squared_error,
    "kl": divergence,
}


def _best(histogram: Histogram, cost: Callable[[int], float]) -> float:
    """The threshold of the least cost, which is told the number of bins below; of equals the largest."""
    best, least = float(histogram.top), float("inf")
    for edge in _edges(histogram):
        found = cost(edge)
        if found < least:
            best, least = edge * histogram.width, found
    return min(best, float(histogram.top))


def _edges(histogram: Histogram) -> Iterator[int]:
    """Numbers of bins to end at, from the one that holds the largest value down to as many as there are levels."""
    edge = int(float(histogram.top) / histogram.width) + 1
    while edge >= LEVELS:
        yield edge
        edge = int(edge * _SHRINK)


def _divergence(counts: Tensor, level: Tensor) -> float:
    """KL divergence of P from Q, both over the first bins, which are rounded to the codes `level`."""
    kept = counts[: len(level)]
    p = kept.clone()
    p[-1] += counts[len(level) :].sum()
    filled = kept > 0
    sums = torch.zeros(LEVELS, dtype=counts.dtype, device=counts.device).index_add_(0, level, kept)
    bins = torch.zeros_like(sums).index_add_(0, level, filled.to(counts.dtype))
    q = torch.where(filled, (sums / bins.clamp_min(1))[level], 0.0)
    if float(q.sum()) == 0:
        return float("inf")
    # Where P has something and Q nothing (the last bin, filled by what was cut off), a small probability stands for it.
    p, q = p / p.sum(), (q / q.sum()).clamp_min(_NONE)
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())


def _round(sizes: Tensor, threshold: float, kind: str) -> tuple[Tensor, Tensor]:
    """The codes (int64, below LEVELS) that sizes are rounded to, and the values that these stand for."""
    scale = threshold / ENDS[kind]
    if kind == fp8.NAME:
        codes = (sizes / scale).clamp_max_(fp8.LARGEST).float().to(fp8.CODES)
        return codes.view(torch.uint8).long(), codes.double() * scale  # bits of positive floats are in order
    whole = (sizes / scale).round_().clamp_max_(LEVELS - 1)
    return whole.long(), whole * scale


def _centres(histogram: Histogram) -> Tensor:
    bins = len(histogram.counts)
    return (torch.arange(bins, dtype=torch.float64, device=histogram.counts.device) + 0.5) * histogram.width
