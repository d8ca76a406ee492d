"""GPTQ's sweep over columns, plain torch (Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1).

Columns are rounded one after the other, and what each loses is made up for by those that follow, as the inverse of the
Hessian says. A block of columns is swept by itself; the columns behind it are updated once it is done.
"""

from typing import Protocol

import torch
from torch import Tensor

# Columns of a block.
BLOCK = 128


class Sweep(Protocol):
    """Rounds a block of columns.

    `weight` float32 [N, B], B at most BLOCK, is not modified; `factor` float32 [B, B] is the block's part of the upper
    Cholesky factor of the inverse Hessian; `scale` float32 [N, G] has one column for each B / G columns. Returns codes
    int8 [N, B] in [-2^(bits-1), 2^(bits-1)) and errors float32 [N, B]: what each column lost, over its diagonal entry.
    """

    def __call__(self, weight: Tensor, factor: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]: ...


def sweep(weight: Tensor, factor: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `Sweep` says; in float64 as well."""
    left, half = weight.clone(), 1 << (bits - 1)
    width = weight.size(1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.empty_like(weight)
    for column in range(width):
        own = scale[:, column * scale.size(1) // width]
        rounded = (left[:, column] / own).round_().clamp_(-half, half - 1)
        codes[:, column] = rounded.to(torch.int8)
        errors[:, column] = (left[:, column] - rounded * own) / factor[column, column]
        left[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return codes, errors


def quantize(
    weight: Tensor, factor: Tensor, scale: Tensor, bits: int, group_size: int | None, block_sweep: Sweep = sweep
) -> Tensor:
    """Return codes int8 [N, K] of `weight` [N, K], given the upper Cholesky factor [K, K] of the inverse Hessian.

    `scale` is [N, K / group_size], or [N, 1] without groups; groups divide blocks or are divided by them.
    """
    left = weight.clone()
    num_columns = weight.size(1)
    group = group_size or num_columns
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, num_columns, BLOCK):
        block = slice(start, min(start + BLOCK, num_columns))
        own = scale[:, start // group : -(-block.stop // group)].contiguous()
        codes[:, block], errors = block_sweep(left[:, block].contiguous(), factor[block, block].contiguous(), own, bits)
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes
