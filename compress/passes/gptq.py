"""GPTQ: rounds column by column and lets the columns that follow make up for it.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323, section 3. R rows, C columns. Rows that read the same inputs
share one Hessian and are swept together: q, k and v, gate and up. With `act_order` columns go in falling order of
their inputs' energy while groups keep their natural columns, so nothing is permuted when the weight is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.grid import Columns

BLOCK = 128
_TRIES = 4
_MORE_DAMP = 10.0


class SingularError(Exception):
    """The Hessian has no Cholesky factor, however much it was damped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Codes [R, C] as float, and the part of the mean diagonal that had to be added to the Hessian."""

    codes: Tensor
    damp: float


def gptq(weight: Tensor, gram: Tensor, levels: Columns, *, damp: float, act_order: bool) -> Rounded:
    """Round weight [R, C] to `levels` so that outputs for inputs of this gram [C, C] change least.

    Dead inputs (zero on the diagonal) take no part, not in the mean that damping is measured by either: their weights
    go to the nearest level of zero. Where the Hessian turns out to be singular, damping grows tenfold up to three
    times. Raises SingularError after that, and where no input is alive.
    """
    energy = gram.diagonal()
    dead = energy == 0
    order = energy.argsort(descending=True, stable=True) if act_order else torch.arange(len(energy), device=gram.device)
    weight = weight.masked_fill(dead, 0)[:, order]
    hessian = gram[order][:, order]
    living = energy.sum() / (~dead).sum().clamp_min(1)
    hessian.diagonal().copy_(torch.where(dead, living, energy)[order])
    upper, damp = _inverse_factor(hessian, damp)
    codes = _sweep(weight, upper, levels[:, order])
    return Rounded(codes=torch.empty_like(codes).index_copy_(1, order, codes), damp=damp)


def match_source(weight: Tensor, gram: Tensor, cross: Tensor, lag: Tensor | None, *, damp: float) -> Tensor:
    """Return the weight [R, C] whose outputs for the pressed model's inputs x are closest to the source's own outputs.

    `cross` [C, C] is the mean of y^T x, with y what the source's inputs would be, `gram` the mean of x^T x: so errors
    of the layers before are made up for as well (Li et al. 2025, "GPTAQ", https://arxiv.org/abs/2504.02692). With `lag`
    [R, C], the mean of d^T x, outputs are to make up for d too: what the stream that they are added to lacks. What is
    asked for is the least-squares solution (W C + L) (G + damping)^-1, written as a change of W. Raises SingularError.
    """
    damped = gram.clone()
    damped.diagonal().add_(damp * gram.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise SingularError
    wanted = weight @ (cross - gram)
    if lag is not None:
        wanted += lag
    return weight + torch.cholesky_solve(wanted.T.contiguous(), lower).T


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return U, upper, with U^T U the inverse of the damped Hessian; and the damping that it took."""
    mean = hessian.diagonal().mean()
    for attempt in range(_TRIES):
        part = damp * _MORE_DAMP**attempt
        damped = hessian.clone()
        damped.diagonal().add_(part * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper, part
    raise SingularError


def _sweep(weight: Tensor, upper: Tensor, levels: Columns) -> Tensor:
    """Round the columns from left to right; what is not exact moves on into those to the right.

    Transposed, so that a column is one piece of memory.
    """
    columns, levels = weight.T.contiguous(), levels.transposed()
    num_columns = columns.size(0)
    codes = torch.empty_like(columns)
    for start in range(0, num_columns, BLOCK):
        end = min(start + BLOCK, num_columns)
        errors = torch.empty_like(columns[start:end])
        for column in range(start, end):
            part, own = levels[column], columns[column]
            codes[column] = part.codes(own)
            errors[column - start] = (own - part.values(codes[column])) / upper[column, column]
            columns[column + 1 : end].addr_(upper[column, column + 1 : end], errors[column - start], alpha=-1)
        columns[end:] -= upper[start:end, end:].T @ errors
    return codes.T
