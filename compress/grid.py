"""The levels that weights may take: a scale, and for asymmetric integers a zero point, per row and group of columns.

R rows, C columns, G groups of columns. Everything a pass decides about rounding is decided on such a grid; what is
stored follows from it (encoding.py). Scales are rounded to the artifact's precision when the grid is made, so that a
pass sees the levels that a reader will see.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8

# Parts of the largest value that a search tries as the end of the grid, and how errors count in it: 2.4 is between the
# mean of squares and the largest (Frantar et al. 2023, the reference implementation of GPTQ).
_SHRINK_FROM, _SHRINK_STEPS = 0.4, 61
SEARCH_NORM = 2.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Levels for rows [R, C]: scale float32 [R, G]; zero_point float32 [R, G], whole numbers, or None (symmetric).

    Scales are numbers of `dtype`, in which they are stored.
    """

    spec: Packed
    dtype: torch.dtype
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def stacked(cls, grids: "Sequence[Grid]") -> "Grid":
        """Return the grid of all rows of several, one under the other."""
        zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
        return dataclasses.replace(
            grids[0],
            scale=torch.cat([grid.scale for grid in grids]),
            zero_point=torch.cat(zeros) if zeros else None,
        )

    def with_scale(self, scale: Tensor) -> "Grid":
        """Return the same grid with other scales [R, G]."""
        return dataclasses.replace(self, scale=scale)

    def to(self, device: torch.device) -> "Grid":
        """Return it on another device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return dataclasses.replace(self, scale=self.scale.to(device), zero_point=zero)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.spec.in_features // self.scale.size(1)

    def by_column(self) -> "Columns":
        """Return the same levels with an entry per column."""
        zero = None if self.zero_point is None else self.zero_point.repeat_interleave(self.group_size, dim=1)
        return Columns(spec=self.spec, scale=self.scale.repeat_interleave(self.group_size, dim=1), zero_point=zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Levels per weight: scale and zero_point [R, C], or of any shape that weights may have."""

    spec: Packed
    scale: Tensor
    zero_point: Tensor | None

    def __getitem__(self, index: object) -> "Columns":
        """Return the levels of a part of the weights, or of them in another order."""
        zero = None if self.zero_point is None else self.zero_point[index]  # type: ignore[index]
        return dataclasses.replace(self, scale=self.scale[index], zero_point=zero)  # type: ignore[index]

    def transposed(self) -> "Columns":
        """Return the levels for weights [C, R], each column in one piece."""
        zero = None if self.zero_point is None else self.zero_point.T.contiguous()
        return dataclasses.replace(self, scale=self.scale.T.contiguous(), zero_point=zero)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the nearest codes of weights, as float."""
        codes = weight / self.scale
        if self.spec.storage == fp8.NAME:
            return codes.clamp_(-fp8.LARGEST, fp8.LARGEST).to(fp8.CODES).to(weight.dtype)
        if self.zero_point is not None:
            codes += self.zero_point
        low, high = code_range(self.spec)
        return codes.round_().clamp_(low, high)

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that codes stand for."""
        return (codes if self.zero_point is None else codes - self.zero_point) * self.scale

    def nearest(self, weight: Tensor) -> Tensor:
        """Return weights rounded to the nearest level."""
        return self.values(self.codes(weight))


def code_range(spec: Packed) -> tuple[int, int]:
    """Return the smallest and largest code of integers."""
    return -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1


def fit(weight: Tensor, spec: Packed, dtype: torch.dtype) -> Grid:
    """Return the grid that spans weight [R, C] of float32; `dtype` is that of stored scales.

    For weights that are numbers of `dtype` it is the grid of round-to-nearest (integer_codes.py, fp8/format.py) to the
    bit: like there, it is computed in `dtype`.
    """
    low, high = _ends(_groups(weight, spec))
    return _spanning(low.to(dtype), high.to(dtype), spec, dtype)


def search(weight: Tensor, spec: Packed, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """Return the grid whose rounding to nearest loses least of weight [R, C], of those drawn in by up to 60 %.

    Errors count by `importance`, float32: of columns [C], or, errors of one group together, of their products
    [G, C / G, C / G]; without one all alike with the exponent SEARCH_NORM.
    """
    assert spec.block_size is None, "rows of a block have no grid of their own to search"
    groups = _groups(weight, spec)
    low, high = _ends(groups)
    counts = importance
    if importance is not None and importance.dim() == 1:
        counts = importance.reshape(groups.size(1), -1)
    best = fit(weight, spec, dtype)
    least = _loss(groups, best, counts)
    for shrink in torch.linspace(1.0, _SHRINK_FROM, _SHRINK_STEPS).tolist():
        tried = _spanning(low * shrink, high * shrink, spec, dtype)
        loss = _loss(groups, tried, counts)
        better = loss < least
        least = torch.where(better, loss, least)
        best = _choose(better, tried, best)
    return best


def of_members(weight: Tensor, specs: Sequence[Packed], fitted: Callable[[Tensor, Packed], Grid]) -> Grid:
    """Return the grid of rows [R, C] of members with `specs`, each fitted by itself: blocks end where it ends."""
    parts = torch.split(weight, [spec.out_features for spec in specs])
    return Grid.stacked([fitted(part, spec) for part, spec in zip(parts, specs, strict=True)])


def _spanning(low: Tensor, high: Tensor, spec: Packed, dtype: torch.dtype) -> Grid:
    """The grid from `low` to `high`, both [R, G], computed in their type; symmetric ones take the larger of the two."""
    if spec.block_size is not None:
        high = _block_largest(torch.maximum(high, -low), spec.block_size)
        low = -high
    if spec.symmetric:
        half_range = fp8.LARGEST if spec.storage == fp8.NAME else (2**spec.bits - 1) / 2
        scale = (torch.maximum(high, -low) / half_range).to(dtype)
    else:
        scale = ((high - low) / (2**spec.bits - 1)).to(dtype)
    is_zero = scale == 0
    scale = torch.where(is_zero, torch.finfo(dtype).eps, scale)
    zero_point = None
    if not spec.symmetric:
        least, most = code_range(spec)
        zero_point = (least - low / scale.to(low.dtype)).clamp_(least, most).round_().masked_fill_(is_zero, 0).float()
    return Grid(spec=spec, dtype=dtype, scale=scale.float(), zero_point=zero_point)


def _block_largest(largest: Tensor, block: int) -> Tensor:
    """The largest of each `block` rows of [R, G], for each of them."""
    pieces = [piece.amax(0, keepdim=True).expand_as(piece) for piece in torch.split(largest, block)]
    return torch.cat(pieces)


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group of [R, G, C / G], zero included."""
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)


def _groups(weight: Tensor, spec: Packed) -> Tensor:
    """[R, C] as [R, G, C / G]."""
    size = spec.block_size or spec.group_size or spec.in_features
    return weight.reshape(weight.size(0), spec.in_features // size, size)


def _loss(groups: Tensor, grid: Grid, counts: Tensor | None) -> Tensor:
    zero = None if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
    levels = Columns(spec=grid.spec, scale=grid.scale.unsqueeze(-1), zero_point=zero)
    lost = levels.nearest(groups).sub_(groups)
    if counts is None:
        return lost.abs_().pow_(SEARCH_NORM).sum(-1)
    if counts.dim() == 2:
        return lost.square_().mul_(counts).sum(-1)
    return torch.einsum("rgi,gij->rgj", lost, counts).mul_(lost).sum(-1)


def _choose(where: Tensor, one: Grid, other: Grid) -> Grid:
    zero = None
    if one.zero_point is not None and other.zero_point is not None:
        zero = torch.where(where, one.zero_point, other.zero_point)
    return dataclasses.replace(one, scale=torch.where(where, one.scale, other.scale), zero_point=zero)
