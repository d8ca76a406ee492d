"""Two of four: the mask's bits against numpy, values against where they came from."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pressd.runtime.kernels.mask import format as mask


def random_mask(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Return bool [rows, columns] with two of every four set."""
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < 2).view(rows, columns)


@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_bits_are_numpys(rows: int, columns: int, seed: int) -> None:
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = mask.pack(kept)
    assert np.array_equal(bits.numpy(), np.packbits(kept.numpy(), axis=1, bitorder="little"))
    assert torch.equal(mask.unpack(bits, columns), kept)
    assert mask.layout(rows, columns) == {"mask": (bits.dtype, tuple(bits.shape))}


@given(rows=st.integers(1, 5), quads=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_what_is_kept_comes_back_and_the_rest_is_zero(rows: int, quads: int, seed: int) -> None:
    kept = random_mask(rows, 4 * quads, seed)
    weight = torch.randn(rows, 4 * quads, generator=torch.Generator().manual_seed(seed))
    values = mask.compact(weight, kept)
    assert values.shape == (rows, 2 * quads)
    assert np.array_equal(mask.expand(values, kept).numpy(), np.where(kept.numpy(), weight.numpy(), 0))


@pytest.mark.parametrize("columns", [4, 12, 64])
def test_a_mask_that_keeps_too_much_or_too_little_is_seen(columns: int) -> None:
    bits = mask.pack(random_mask(3, columns, 0))
    assert mask.is_two_of_four(bits, columns)
    for position in (0, columns - 1):
        wrong = bits.clone()
        wrong[1, position // 8] ^= 1 << position % 8
        assert not mask.is_two_of_four(wrong, columns)
    if columns % 8:
        wrong = bits.clone()
        wrong[2, -1] |= 1 << 7  # a bit of no column
        assert not mask.is_two_of_four(wrong, columns)
