"""Which graph serves a step."""

import pytest

from pressd.runtime.graphs import batch_buckets, bucket_of, kv_bounds


@pytest.mark.parametrize("most", [1, 2, 3, 16, 20, 128, 500])
def test_every_batch_has_a_bucket_that_holds_it(most: int) -> None:
    buckets = batch_buckets(most)
    assert buckets[-1] == most
    assert list(buckets) == sorted(set(buckets))
    for size in range(1, most + 1):
        bucket = bucket_of(size, buckets)
        assert bucket is not None
        assert size <= bucket <= max(2 * size, 1)
    assert bucket_of(most + 1, buckets) is None


@pytest.mark.parametrize("longest", [1, 2048, 2049, 20000, 200000])
def test_every_length_has_a_bound(longest: int) -> None:
    bounds = kv_bounds(longest)
    assert bounds[-1] == longest
    assert list(bounds) == sorted(set(bounds))
    assert bucket_of(longest, bounds) == longest
    assert bucket_of(1, bounds) == bounds[0]
