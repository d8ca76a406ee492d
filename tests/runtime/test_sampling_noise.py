"""The noise: against its hash in Python integers, and as exponentials that no two of seed, position, token share."""

import math

import numpy as np
import pytest
import sampling_oracle as oracle
import torch

from pressd.runtime.sampling import noise
from pressd.runtime.sampling.scratch import Scratch

CPU = torch.device("cpu")
MASK64, MASK32 = 2**64 - 1, 2**32 - 1
BINS = 16


def splitmix(value: int) -> int:
    value = (((value & MASK64) ^ ((value & MASK64) >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def hashed(token: int, first: int, second: int) -> int:
    value = (token * 0x9E3779B1 + first) & MASK32
    value = ((value ^ value >> 16) * 0x7FEB352D & MASK32) ^ second
    value = (value ^ value >> 15) * 0x846CA68B & MASK32
    value = ~value & MASK32 if value >> 31 else value
    return value ^ value >> 16


def times_of(seeds: list[int], indices: list[int], positions: list[int], tokens: torch.Tensor) -> torch.Tensor:
    keys = torch.tensor([noise.sequence_key(seed, index) for seed, index in zip(seeds, indices, strict=True)])
    return noise.exact_times(noise.position_keys(keys, torch.tensor(positions)), tokens.expand(len(seeds), -1))


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(("index", "position"), [(0, 0), (0, 1), (5, 7), (63, 131071), (1, 2**31)])
def test_noise_is_the_hash_in_python_integers(seed: int, index: int, position: int) -> None:
    golden = 0x9E3779B97F4A7C15
    sequence = splitmix(splitmix(seed + golden) + (index + 1) * golden)
    key = splitmix(sequence + (position + 1) * golden)
    tokens = [0, 1, 2, 31, 4098, 151935, 2**20]
    times = times_of([seed], [index], [position], torch.tensor(tokens))[0]
    for token, time in zip(tokens, times.tolist(), strict=True):
        leading, following = hashed(token, key & MASK32, key >> 32), hashed(token, key >> 32, key & MASK32) >> 11
        uniform = (leading + (following + 0.5) / 2**20) / 2**31
        # Two ulps of the logarithm: the uniform number itself is exact.
        assert time == pytest.approx(-math.log1p(-uniform), rel=5e-16)


def test_extreme_hashes_give_finite_positive_times(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, tokens = torch.zeros(1, 2, dtype=torch.int32), torch.arange(3).view(1, 3)
    for extreme in (0, 2**31 - 1):
        monkeypatch.setattr(noise, "_hash", lambda state, *_, extreme=extreme: torch.full_like(state, extreme))
        times = noise.exact_times(keys, tokens)
        rough = noise.rough_times(keys, noise.spread_tokens(3, CPU), Scratch(CPU))
        assert times.isfinite().all()
        assert (times > 0).all()
        assert rough.isfinite().all()
        assert (-rough.double() <= times * (1 + 1e-6)).all()
        assert (rough < 0).all()


@pytest.mark.parametrize("vocab_size", [1, 31, 97, 4099, 32000])
def test_rough_times_are_the_exact_ones_or_earlier(vocab_size: int) -> None:
    keys = noise.position_keys(torch.arange(50) * 12345, torch.arange(50))
    rough = -noise.rough_times(keys, noise.spread_tokens(vocab_size, CPU), Scratch(CPU)).double()
    exact = noise.exact_times(keys, torch.arange(vocab_size).expand(50, -1))
    uniform = -torch.expm1(-exact)
    # Two roundings of the uniform number, one of the logarithm and two ulps of its own, 2^-24 each; the last bits left
    # out are one unit of 2^-31; shrinking takes 2^-20. An error of the uniform number is one of the time divided by
    # 1 - u, and a relative one of it is u / (1 - u) / time of the time.
    slack = 5 * 2.0**-24 * (1 + uniform / (1 - uniform) / exact)
    assert (rough <= exact * (1 + slack)).all()
    early = slack + (2.0**-31 + 2.0**-20 * uniform) / (1 - uniform) / exact
    assert (rough >= exact * (1 - early)).all()


AXES = {
    "tokens": lambda n, step: (times_of([3], [0], [9], torch.arange(n + step))[0], step),
    "positions": lambda n, step: (times_of([3] * (n + step), [0] * (n + step), list(range(n + step)), ONE)[:, 0], step),
    "seeds": lambda n, step: (times_of(list(range(n + step)), [0] * (n + step), [4] * (n + step), ONE)[:, 0], step),
    "indices": lambda n, step: (times_of([8] * (n + step), list(range(n + step)), [4] * (n + step), ONE)[:, 0], step),
}
ONE = torch.tensor([17])
NUM = 40000


def pairs_p_value(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of the hypothesis that pairs of times fill the square of the exponential distribution evenly."""
    cells = [(-torch.expm1(-times) * BINS).long().clamp(max=BINS - 1).numpy() for times in (first, second)]
    counts = np.bincount(cells[0] * BINS + cells[1], minlength=BINS * BINS)
    return oracle.p_value(counts, np.full(BINS * BINS, BINS**-2.0))


@pytest.mark.parametrize("step", [1, 2, 3, 32, 64, 256, 1024])
@pytest.mark.parametrize("axis", AXES)
def test_neighbours_along_every_axis_are_independent(axis: str, step: int) -> None:
    times, step = AXES[axis](NUM, step)
    assert pairs_p_value(times[:-step], times[step:]) > oracle.SIGNIFICANCE


@pytest.mark.parametrize("bit", [*range(0, 64, 7), 31, 32, 63])
def test_one_bit_of_a_seed_changes_everything(bit: int) -> None:
    tokens = torch.arange(NUM)
    first, second = times_of([77, 77 ^ 1 << bit], [0, 0], [5, 5], tokens)
    assert pairs_p_value(first, second) > oracle.SIGNIFICANCE


def test_seed_index_and_position_are_not_interchangeable() -> None:
    """Their sums and products are equal here; the noise is not."""
    tokens = torch.arange(NUM)
    rows = times_of([1, 2, 3, 1, 2], [2, 1, 0, 3, 3], [3, 3, 3, 2, 1], tokens)
    for i in range(5):
        for j in range(i):
            assert pairs_p_value(rows[i], rows[j]) > oracle.SIGNIFICANCE


def test_rows_whose_first_keys_differ_by_tokens_do_not_share_noise() -> None:
    keys = torch.tensor([[7, 0x3C6EF372], [7, 0x1F83D9AB], [7, 0x3C6EF372]], dtype=torch.int32)
    keys[1:, 0] += 5 * torch.tensor(0x9E3779B1 - 2**32, dtype=torch.int32)
    times = noise.exact_times(keys, torch.arange(NUM).expand(3, -1))
    assert pairs_p_value(times[0, 5:], times[1, :-5]) > oracle.SIGNIFICANCE
    # With the second key in common the leading bits are the same: this test would see it.
    assert pairs_p_value(times[0, 5:], times[2, :-5]) < oracle.SIGNIFICANCE


def test_small_times_are_as_frequent_as_they_should_be() -> None:
    """They decide who wins: ten million times, in cells from 2^-20 up to 1 by factors of two."""
    scratch, spread = Scratch(CPU), noise.spread_tokens(100_000, CPU)
    edges = np.array([0.0, *(2.0**power for power in range(-20, 1))])
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for block in range(5):
        keys = noise.position_keys(torch.arange(20), torch.full((20,), block))
        rough = -noise.rough_times(keys, spread, scratch).double()
        counts += np.histogram(-torch.expm1(-rough).numpy(), edges)[0]
    assert counts.sum() == 10_000_000
    assert oracle.p_value(counts, np.diff(edges)) > oracle.SIGNIFICANCE


def broken(what: str) -> torch.Tensor:
    """Pairs of times [2, NUM] of a noise with a known fault."""
    if what == "a token repeats its neighbour's":
        times = times_of([3], [0], [9], torch.arange(NUM + 1) // 2)[0]
    elif what == "the position is left out":
        return times_of([3, 3], [0, 0], [9, 9], torch.arange(NUM))
    elif what == "one round":
        state = torch.arange(NUM + 1, dtype=torch.int64) * 0x9E3779B1
        times = -torch.log1p(-(((state ^ state >> 16) * 5 & MASK32).double() + 0.5) / 2**32)
    else:
        times = times_of([3], [0], [9], torch.arange(NUM + 1))[0]
        times = torch.maximum(times, times.roll(1)) * 0.7
    return torch.stack((times[:-1], times[1:]))


@pytest.mark.parametrize(
    "what", ["a token repeats its neighbour's", "the position is left out", "one round", "it is a running maximum"]
)
def test_a_faulty_noise_is_seen(what: str) -> None:
    first, second = broken(what)
    assert pairs_p_value(first, second) < oracle.SIGNIFICANCE
