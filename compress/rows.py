"""Large matrices in pieces of rows, so that temporaries in a wider type stay small however large the matrix is."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PIECE_NUMBERS = 1 << 20


def row_slices(weight: Tensor, *, multiple: int = 1) -> Iterator[slice]:
    """Yield slices that together are all rows of `weight` [rows, columns], each of about a million numbers.

    All but the last have a multiple of `multiple` rows.
    """
    step = max(1, PIECE_NUMBERS // weight.size(1) // multiple) * multiple
    for start in range(0, weight.size(0), step):
        yield slice(start, start + step)


def squared_norms(weight: Tensor, stored: Callable[[slice, torch.dtype], Tensor]) -> tuple[float, float]:
    """Return ||W - W'||^2 and ||W||^2 (Frobenius), where `stored` decodes rows of W' into a type."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    lost = total = 0.0
    for rows in row_slices(weight):
        reference = weight[rows].to(wide)
        lost += float(torch.linalg.vector_norm(stored(rows, wide) - reference)) ** 2
        total += float(torch.linalg.vector_norm(reference)) ** 2
    return lost, total
