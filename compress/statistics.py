"""What passes may know of the inputs of a fused group: sums over the calibration tokens, collected in one go.

T tokens, C columns. Sums are over float32 products; a chunk of tokens at a time keeps them as exact as that allows.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.histogram import Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which statistics somebody will ask for; what nobody wants is not collected."""

    gram: bool = False
    channels: bool = False
    histogram: bool = False

    @property
    def nothing(self) -> bool:
        """Whether nobody wants anything."""
        return not (self.gram or self.channels or self.histogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of inputs x [T, C]: `gram` is the mean of x^T x [C, C], `largest` and `mean` are of |x| by column [C].

    `cross` [C, C] is the mean of y^T x, where y are the inputs that the source has in the same place, and `lag` [R, C]
    of d^T x, where d is what the residual stream that the outputs are added to lacks of the source's. Each is None
    unless it was wanted. `histogram` is of |x| over all columns.
    """

    tokens: int
    gram: Tensor | None = None
    cross: Tensor | None = None
    lag: Tensor | None = None
    largest: Tensor | None = None
    mean: Tensor | None = None
    histogram: Histogram | None = None

    def is_finite(self) -> bool:
        """Whether every input was a number, as far as what was collected tells."""
        seen = [tensor for tensor in (self.gram, self.cross, self.lag, self.largest, self.mean) if tensor is not None]
        if self.histogram is not None:
            seen.append(self.histogram.top)
        return all(bool(torch.isfinite(tensor).all()) for tensor in seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInputs:
    """What the source has where a group has its inputs: its own [T, C], and what a group's outputs are to be added to.

    `lag_TR` is the source's residual stream less ours [T, R], for groups that write to it.
    """

    inputs_TC: Tensor
    lag_TR: Tensor | None = None


class Collector:
    """Adds up statistics of one group's inputs, batch by batch, where the batches are."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._tokens = 0
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._lag: Tensor | None = None
        self._sum: Tensor | None = None
        self._largest: Tensor | None = None
        self._histogram: Histogram | None = None

    def add(self, x_TC: Tensor, source: "SourceInputs | None" = None) -> None:
        """Take inputs [T, C] in, and what the source has in the same place if they are to be compared."""
        x_TC = x_TC.float()
        self._tokens += x_TC.size(0)
        if self._wanted.gram:
            product = x_TC.T @ x_TC
            self._gram = product if self._gram is None else self._gram.add_(product)
        if source is not None:
            product = source.inputs_TC.float().T @ x_TC
            self._cross = product if self._cross is None else self._cross.add_(product)
            if source.lag_TR is not None:
                product = source.lag_TR.float().T @ x_TC
                self._lag = product if self._lag is None else self._lag.add_(product)
        if self._wanted.channels:
            sizes = x_TC.abs()
            total, largest = sizes.sum(0), sizes.amax(0)
            self._sum = total if self._sum is None else self._sum.add_(total)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        if self._wanted.histogram:
            counted = Histogram.of(x_TC)
            self._histogram = counted if self._histogram is None else self._histogram.merged(counted)

    def statistics(self, *others: "Collector") -> Statistics:
        """Return what was collected here and, in this order, by others on their devices."""
        assert self._tokens, "no inputs were seen"
        parts = (self, *others)
        tokens = sum(part._tokens for part in parts)
        gram, total = _sum([part._gram for part in parts]), _sum([part._sum for part in parts])
        cross, lag = _sum([part._cross for part in parts]), _sum([part._lag for part in parts])
        largest = [part._largest for part in parts if part._largest is not None]
        histogram = self._histogram
        for part in others:
            if histogram is not None and part._histogram is not None:
                histogram = histogram.merged(part._histogram.to(histogram.counts.device))
        return Statistics(
            tokens=tokens,
            gram=None if gram is None else gram / tokens,
            cross=None if cross is None else cross / tokens,
            lag=None if lag is None else lag / tokens,
            mean=None if total is None else total / tokens,
            largest=torch.stack([one.to(largest[0].device) for one in largest]).amax(0) if largest else None,
            histogram=histogram,
        )


def gather(
    inputs: Iterable[tuple[int, Tensor]],
    num_lanes: int,
    wanted: Wanted,
    where: str,
    source: Iterable[SourceInputs] | None = None,
) -> Statistics:
    """Return statistics of inputs that come as (number of the lane, [T, C]), compared with the source's if given.

    Raises ValueError for NaN and infinity, naming `where`.
    """
    collectors = [Collector(wanted) for _ in range(num_lanes)]
    theirs: Iterator[SourceInputs | None] = itertools.repeat(None) if source is None else iter(source)
    for lane, x in inputs:
        collectors[lane].add(x, next(theirs))
    first, *others = collectors
    statistics = first.statistics(*others)
    if not statistics.is_finite():
        raise ValueError(
            f"{where}: its inputs are not finite on the calibration text; the source overflows: check it, or give "
            f"other text"
        )
    return statistics


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    """The sum where the first part is; parts without tokens are None."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    total = there[0].clone()
    for part in there[1:]:
        total += part.to(total.device)
    return total
