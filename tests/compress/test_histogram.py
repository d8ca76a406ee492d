"""Histograms of absolute values against numpy's, however the values came in pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.compress.histogram import BINS, Histogram


def equal(found: Histogram, expected: Histogram) -> bool:
    return (
        torch.equal(found.counts, expected.counts)
        and (found.zeros, found.limit) == (expected.zeros, expected.limit)
        and torch.equal(found.top, expected.top)
    )


@pytest.mark.parametrize("size", [1.0, 3e-7, 512.0, 1e30, 1e-20])
def test_counts_are_numpys(size: float) -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * size
    x[3:7] = 0
    found = Histogram.of(x)
    absolute = x.abs().double().numpy()
    assert float(found.top) == absolute.max()
    assert found.limit / 2 <= absolute.max() < found.limit
    assert np.log2(found.limit) % 1 == 0
    expected, _ = np.histogram(absolute[absolute > 0], bins=BINS, range=(0, found.limit))
    assert found.counts.tolist() == expected.tolist()
    assert found.zeros == 4 * 50


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0.0, 1e-30, 2e-3, 0.5, 1.0, 2.0, 3.0, 1e3, 1e12]), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_from_pieces_it_is_that_of_everything(sizes: list[float], seed: int) -> None:
    """Whatever their order: ranges that grow or shrink, pieces of zeros before and behind."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(1 + index * 7, 5, generator=generator) * size for index, size in enumerate(sizes)]
    merged = Histogram.of(pieces[0])
    for piece in pieces[1:]:
        merged = merged.merged(Histogram.of(piece))
    assert equal(merged, Histogram.of(torch.cat(pieces)))
    assert merged.counts.sum() + merged.zeros == sum(piece.numel() for piece in pieces)


def test_zeros_do_not_coarsen_what_is_small() -> None:
    small = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-4
    with_zeros = Histogram.of(torch.zeros(30)).merged(Histogram.of(small))
    assert torch.equal(with_zeros.counts, Histogram.of(small).counts)
    assert with_zeros.limit < 1e-3
    assert with_zeros.zeros == 30


def test_more_values_in_a_bin_than_float32_can_count() -> None:
    torch.set_num_threads(1)  # each counts apart; set again before every test
    x = torch.full((2**24 + 5,), 0.25)
    x[-1] = 1000.0
    found = Histogram.of(x)
    assert float(found.counts[0] + found.counts[1:].sum()) == 2**24 + 5
    assert found.counts[int(0.25 / found.width)] == 2**24 + 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_also_after_merging(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    found = Histogram.of(x)
    good = Histogram.of(torch.ones(5))
    assert found.counts.sum() == 0
    for histogram in (found, found.merged(good), good.merged(found), good.merged(found).merged(good)):
        assert not torch.isfinite(histogram.top)
