"""Where a static scale should end, from a histogram of absolute values: four answers, each a threshold.

Values above the threshold are cut off; below it, they are rounded to so many levels of equal distance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pressd.compress.histogram import BINS, Histogram

# Levels of one sign, as 8 bits with a sign have them.
LEVELS = 128
_PERCENTILE = 99.99
# Thresholds that are tried, as steps of bins: fine enough that the best of them is within a hundredth of the range.
_STEP = 8


def min_max(histogram: Histogram, percentile: float = _PERCENTILE) -> float:
    """Return the largest value there was: nothing is cut off."""
    return float(histogram.top)


def percentile(histogram: Histogram, percentile: float = _PERCENTILE) -> float:
    """Return the value that `percentile` per cent of the others do not exceed, zeros included."""
    total = float(histogram.counts.sum()) + histogram.zeros
    below = histogram.counts.cumsum(0) + histogram.zeros
    index = int((below < total * percentile / 100).sum())
    return min((index + 1) * histogram.width, float(histogram.top))


def squared_error(histogram: Histogram, percentile: float = _PERCENTILE) -> float:
    """Return the threshold of the least mean squared error: of rounding below it, and of cutting off above."""
    centres = _centres(histogram)
    best, least = float(histogram.top), float("inf")
    for edge in _edges(histogram):
        threshold = edge * histogram.width
        step = threshold / LEVELS
        # What rounding costs on average where many values share a step, but never more than rounding exactly.
        rounded = (centres / step).round_().clamp_(max=LEVELS - 1) * step
        error = float(((centres - rounded).square() * histogram.counts).sum())
        if error < least:
            best, least = threshold, error
    return min(best, float(histogram.top))


def divergence(histogram: Histogram, percentile: float = _PERCENTILE) -> float:
    """Return the threshold whose quantised distribution is closest to the true one by KL divergence.

    For each threshold: P is the histogram up to it, with all that is cut off in its last bin; Q is the histogram up to
    it gathered into LEVELS levels, each spread evenly over those of its bins that hold anything. (Migacz 2017, "8-bit
    inference with TensorRT", GPU Technology Conference.)
    """
    counts = histogram.counts
    best, least = float(histogram.top), float("inf")
    for edge in _edges(histogram):
        found = _divergence_at(counts, edge)
        if found < least:
            best, least = edge * histogram.width, found
    return min(best, float(histogram.top))


OBSERVERS: dict[str, Callable[[Histogram, float], float]] = {
    "minmax": min_max,
    "percentile": percentile,
    "mse": squared_error,
    "kl": divergence,
}


def _divergence_at(counts: Tensor, edge: int) -> float:
    kept = counts[:edge]
    p = kept.clone()
    p[-1] += counts[edge:].sum()
    filled = kept > 0
    level = torch.arange(edge, device=counts.device) * LEVELS // edge
    sums = torch.zeros(LEVELS, dtype=counts.dtype, device=counts.device).index_add_(0, level, kept)
    bins = torch.zeros_like(sums).index_add_(0, level, filled.to(counts.dtype))
    q = torch.where(filled, (sums / bins.clamp_min(1))[level], 0.0)
    if float(p.sum()) == 0 or float(q.sum()) == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    # Where P has something and Q nothing (the last bin, filled by what was cut off), a small probability stands for it.
    q = torch.where((p > 0) & (q == 0), 1e-12, q)
    return float(torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0.0).sum())


def _edges(histogram: Histogram) -> range:
    """Numbers of bins to end at: from as many as there are levels to the one that holds the largest value."""
    last = min(BINS, int(float(histogram.top) / histogram.width) + 1)
    return range(min(LEVELS, last), last + 1, _STEP) if (last - LEVELS) % _STEP == 0 else _with_end(last)


def _with_end(last: int) -> range:
    """The same steps, counted back from the end, so that cutting nothing off is among the choices."""
    first = last - (last - min(LEVELS, last)) // _STEP * _STEP
    return range(first, last + 1, _STEP)


def _centres(histogram: Histogram) -> Tensor:
    return (torch.arange(BINS, dtype=torch.float64, device=histogram.counts.device) + 0.5) * histogram.width
