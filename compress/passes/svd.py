"""Truncated singular value decomposition: the closest matrix of a given rank (Eckart and Young 1936)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def factorise(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [out, rank] and B [rank, in] in float32 or wider, with A B the closest to `weight` [out, in].

    Both factors carry the square roots of the singular values, so that rounding meets them on equal terms. On a CPU one
    thread computes them: with more, the last digits depend on how many there are, and an artifact's bytes with them.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with one_thread():
        u, singular, vh = torch.linalg.svd(wide, full_matrices=False)
    roots = singular[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * vh[:rank]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside, for sums whose last digits must not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
