"""Where static scales end: each observer against a search in numpy that is written another way, and outliers."""

import numpy as np
import pytest
import torch

from pressd.compress.histogram import BINS, Histogram
from pressd.compress.observers import ENDS, LEVELS, OBSERVERS
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.integer_codes import quantize_activations_by

KINDS = ["int8", "fp8"]
# Every value that e4m3 has, from 0 up, from its definition: four bits of exponent, three of significand.
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]


def data(kind: str, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5_000, generator=generator)
    match kind:
        case "heavy tail":
            x = x * torch.exp(1.5 * torch.randn(5_000, generator=generator))
        case "one huge":
            x[77] = -300.0
        case "few large":
            x[::500] *= 20
        case "mostly zero":
            x[torch.rand(5_000, generator=generator) < 0.9] = 0
        case "equal":
            x = torch.full((5_000,), 0.75)
    return x


DATA = ["normal", "heavy tail", "one huge", "few large", "mostly zero", "equal"]


def thresholds(top: float) -> list[float]:
    """What is tried: the end of the largest value's bin, and each time 98 % of it, in whole bins, at least 128."""
    limit = 2.0 ** (np.floor(np.log2(top)) + 1)
    bins = int(np.floor(top / limit * BINS)) + 1
    tried = []
    while bins >= 128:
        tried.append(bins * limit / BINS)
        bins = int(np.floor(bins * 0.98))
    return tried


def rounded(sizes: np.ndarray, threshold: float, kind: str) -> np.ndarray:
    scale = threshold / {"int8": 127.5, "fp8": 448.0}[kind]
    values = np.arange(128.0) if kind == "int8" else E4M3
    middles = (values[1:] + values[:-1]) / 2
    result: np.ndarray = values[np.searchsorted(middles, sizes / scale)] * scale
    return result


def bins_of(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Centres and counts of all bins that values other than 0 fall into, and a bin's width."""
    sizes = x.abs().double().numpy()
    width = 2.0 ** (np.floor(np.log2(sizes.max())) + 1) / BINS
    numbers, counts = np.unique(np.floor(sizes[sizes > 0] / width).astype(int), return_counts=True)
    return (numbers + 0.5) * width, counts.astype(float), width


def squared_error(x: torch.Tensor, threshold: float, kind: str) -> float:
    centres, counts, _ = bins_of(x)
    return float((counts * (centres - rounded(centres, threshold, kind)) ** 2).sum())


def divergence(x: torch.Tensor, threshold: float, kind: str) -> float:
    """Bin by bin: what is in it, and what it would get if each level's count were spread over its bins."""
    centres, counts, width = bins_of(x)
    inside = centres < threshold
    centres, p, cut = centres[inside], counts[inside].copy(), counts[~inside].sum()
    if len(centres) == 0:
        return float("inf")
    _, level, shared_by = np.unique(rounded(centres, threshold, kind), return_inverse=True, return_counts=True)
    q = (np.bincount(level, weights=p) / shared_by)[level]
    if cut and abs(centres[-1] - (threshold - width / 2)) > width / 4:  # nothing else was in the last bin
        p, q = np.append(p, 0.0), np.append(q, 0.0)
    p[-1] += cut
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA)
def test_min_max_ends_at_the_largest(name: str, kind: str) -> None:
    x = data(name)
    assert OBSERVERS["minmax"](Histogram.of(x), kind, 99.0) == float(x.abs().max())


@pytest.mark.parametrize("percentage", [75.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("name", DATA)
def test_a_percentile_is_numpys_to_a_bin(name: str, percentage: float) -> None:
    x = data(name)
    histogram = Histogram.of(x)
    found = OBSERVERS["percentile"](histogram, "int8", percentage)
    exact = float(np.quantile(x.abs().double().numpy(), percentage / 100, method="inverted_cdf"))
    assert exact <= found <= exact + histogram.width * (1 + 1e-9)
    if percentage == 100:
        assert found == float(x.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("observer", "cost"), [("mse", squared_error), ("kl", divergence)], ids=["mse", "kl"])
def test_searches_find_the_best_threshold(observer: str, cost: object, name: str, kind: str) -> None:
    assert callable(cost)
    x = data(name)
    top = float(x.abs().max())
    costs = {min(threshold, top): cost(x, threshold, kind) for threshold in thresholds(top)}
    found = OBSERVERS[observer](Histogram.of(x), kind, 99.99)
    assert found in costs
    assert costs[found] <= min(costs.values()) * (1 + 1e-9) + 1e-12  # float64 on both sides


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_but_zeros_ends_at_zero(observer: str, kind: str) -> None:
    histogram = Histogram.of(torch.zeros(50))
    assert OBSERVERS[observer](histogram, kind, 99.99) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_zeros_beside_others_do_not_count(observer: str, kind: str) -> None:
    x = data("few large")
    both = Histogram.of(torch.cat([x, torch.zeros(500)]))
    if observer == "percentile":  # they do, in a percentile
        assert OBSERVERS[observer](both, kind, 99.0) < OBSERVERS[observer](Histogram.of(x), kind, 99.0)
    else:
        assert OBSERVERS[observer](both, kind, 99.0) == OBSERVERS[observer](Histogram.of(x), kind, 99.0)


def test_ends_are_those_of_the_codes() -> None:
    assert {"int8": 127.5, "fp8": float(torch.finfo(torch.float8_e4m3fn).max)} == ENDS
    assert len(E4M3) == 127 < LEVELS
    assert torch.from_numpy(E4M3).float().to(fp8.CODES).double().tolist() == E4M3.tolist()


@pytest.mark.parametrize("observer", ["mse", "kl"])
@pytest.mark.parametrize("size", [20.0, 300.0])
def test_rare_outliers_do_not_take_the_codes_of_all_others(observer: str, size: float) -> None:
    """Ten of a million, planted: the bulk is rounded far finer, and its distribution is nearer to what it was."""
    generator = torch.Generator().manual_seed(3)
    bulk = torch.randn(1_000_000, generator=generator)
    x = bulk.clone()
    x[::100_000] = size
    histogram = Histogram.of(x)
    errors, apart = {}, {}
    for name in ("minmax", observer):
        scale = torch.tensor([OBSERVERS[name](histogram, "int8", 99.99) / 127.5])
        codes, _ = quantize_activations_by(bulk[None], scale)
        back = codes[0] * scale
        errors[name] = float((back - bulk).square().mean())
        apart[name] = divergence(x, float(scale) * 127.5, "int8")
    # Steps of size / 127.5 cost their square over 12; those that end at the bulk's own largest, 5, far less.
    assert errors["minmax"] == pytest.approx((size / 127.5) ** 2 / 12, rel=0.3) or size > 127.5
    # What is cut off counts as well for one of the two: with 300, it stops half way.
    assert errors[observer] < errors["minmax"] / (4 if observer == "kl" else 2)
    if observer == "kl":
        assert apart["kl"] < 0.6 * apart["minmax"]
