"""Statistics of inputs against numpy's float64, however the tokens came: in batches, on lanes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pressd.compress.histogram import Histogram
from pressd.compress.statistics import Collector, SourceInputs, Statistics, Wanted, gather

ALL = Wanted(gram=True, channels=True, histogram=True)
TOKENS, COLUMNS = 301, 37
# Sums of 301 float32 products of which few cancel: each addition rounds to 2^-24, and so did the product.
ROUNDING = (TOKENS + 1) * 2.0**-24


def inputs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, COLUMNS, generator=generator) * torch.exp(torch.randn(COLUMNS, generator=generator))


def beside(y: torch.Tensor, lag: torch.Tensor | None = None) -> SourceInputs:
    return SourceInputs(inputs_TC=y, lag_TR=lag)


def check(found: Statistics, x: torch.Tensor, y: torch.Tensor | None = None, lag: torch.Tensor | None = None) -> None:
    wide = x.double().numpy()
    sizes = np.abs(wide)
    assert found.tokens == TOKENS
    assert found.gram is not None
    assert found.largest is not None
    assert found.mean is not None
    assert found.histogram is not None
    # Products are bounded by the sums of their absolute values.
    bound = ROUNDING * sizes.T @ sizes / TOKENS
    assert np.all(np.abs(found.gram.double().numpy() - wide.T @ wide / TOKENS) <= bound)
    assert found.largest.double().numpy().tolist() == sizes.max(0).tolist()
    np.testing.assert_allclose(found.mean.double().numpy(), sizes.mean(0), rtol=ROUNDING)
    whole = Histogram.of(x)
    assert torch.equal(found.histogram.counts, whole.counts)
    assert float(found.histogram.top) == sizes.max()
    if y is None:
        assert found.cross is None
    else:
        assert found.cross is not None
        theirs = y.double().numpy()
        bound = ROUNDING * np.abs(theirs).T @ sizes / TOKENS
        assert np.all(np.abs(found.cross.double().numpy() - theirs.T @ wide / TOKENS) <= bound)
    if lag is None:
        assert found.lag is None
    else:
        assert found.lag is not None
        theirs = lag.double().numpy()
        bound = ROUNDING * np.abs(theirs).T @ sizes / TOKENS
        assert np.all(np.abs(found.lag.double().numpy() - theirs.T @ wide / TOKENS) <= bound)


@pytest.mark.parametrize("sizes", [[301], [1, 300], [128, 128, 45], [7] * 43, [300, 1]], ids=str)
@pytest.mark.parametrize("num_lanes", [1, 2, 3, 50])
def test_batches_and_lanes_make_no_difference(sizes: Sequence[int], num_lanes: int) -> None:
    x, y, lag = inputs(1), inputs(2), inputs(5)[:, :11]
    parts, theirs, lags = (torch.split(one, list(sizes)) for one in (x, y, lag))
    lanes = [index % num_lanes for index in range(len(parts))]  # with more lanes than batches, some see nothing
    check(gather(zip(lanes, parts, strict=True), num_lanes, ALL, "g", map(beside, theirs, lags)), x, y, lag)
    check(gather(zip(lanes, parts, strict=True), num_lanes, ALL, "g", map(beside, theirs)), x, y)
    check(gather(zip(lanes, parts, strict=True), num_lanes, ALL, "g"), x)


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    x = inputs(3).bfloat16()
    check(gather([(0, x)], 1, ALL, "g", [beside(inputs(4).bfloat16())]), x, inputs(4).bfloat16())


def test_only_what_is_wanted_is_collected() -> None:
    x = inputs(1)
    collector = Collector(Wanted(gram=True, channels=True))
    collector.add(x)
    found = collector.statistics()
    assert found.histogram is found.cross is None
    assert found.gram is not None
    assert found.mean is not None
    assert Wanted().nothing
    assert not Wanted(histogram=True).nothing


def test_asking_twice_gives_the_same() -> None:
    """Sums are copied, not handed out: more tokens do not change what was returned."""
    x = inputs(1)
    first, second = Collector(ALL), Collector(ALL)
    first.add(x[:200])
    second.add(x[200:])
    found = first.statistics(second)
    check(found, x)
    check(first.statistics(second), x)
    first.add(x)
    check(found, x)


@pytest.mark.parametrize("wanted", [Wanted(gram=True), Wanted(channels=True), Wanted(histogram=True)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [0, 2])
def test_inputs_that_are_no_numbers_are_refused_by_name(wanted: Wanted, bad: float, batch: int) -> None:
    parts = list(torch.split(inputs(1).clone(), 120))
    parts[batch][3, 5] = bad
    with pytest.raises(ValueError, match=r"^layers\.7\.down: its inputs are not finite on the calibration text"):
        gather([(index % 2, part) for index, part in enumerate(parts)], 2, wanted, "layers.7.down")


def test_a_source_that_overflows_is_refused_by_name() -> None:
    y = inputs(2)
    y[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.o: its inputs are not finite"):
        gather([(0, inputs(1))], 1, Wanted(gram=True), "layers.1.o", [beside(y)])
