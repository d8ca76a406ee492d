"""The sampler: noise against SplitMix64 in Python integers, draws against float64 probabilities by chi-square."""

import math

import numpy as np
import pytest
import torch

from pressd.runtime.request import SamplingParams
from pressd.runtime.sampling import gumbel, mask_below_top_p, sample

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
CPU = torch.device("cpu")


def splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 7, 131071])
def test_noise_is_splitmix64_of_seed_position_and_token(seed: int, position: int) -> None:
    key = splitmix((splitmix((seed + GOLDEN) & MASK) + position * GOLDEN) & MASK)
    noise = gumbel([seed], [position], 50, CPU)[0]
    for token in range(50):
        bits = splitmix((key + (token + 1) * GOLDEN) & MASK) >> 11
        uniform = (bits + 0.5) / 2**53
        assert noise[token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Return the statistic over cells expected 5 times or more, and a bound five standard deviations out."""
    expected = probabilities * counts.sum()
    usual = expected >= 5
    rest = ~usual
    cells = [(counts[i], expected[i]) for i in np.flatnonzero(usual)]
    if expected[rest].sum() > 0:
        cells.append((counts[rest].sum(), expected[rest].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    return statistic, freedom + 5 * math.sqrt(2 * freedom)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Keep tokens from the likeliest on until their mass reaches top_p, and renormalise."""
    kept = np.zeros_like(probabilities)
    mass = 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token)):
        if mass >= top_p:
            break
        kept[token] = probabilities[token]
        mass += probabilities[token]
    return kept / kept.sum()


def draw(logits: torch.Tensor, params: SamplingParams, draws: int) -> np.ndarray:
    """Count draws at `draws` positions of one request."""
    tokens: list[int] = []
    for start in range(0, draws, 1000):
        rows = range(start, min(start + 1000, draws))
        tokens += sample(logits.expand(len(rows), -1), [params] * len(rows), list(rows))
    return np.bincount(tokens, minlength=logits.numel())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.7])
def test_draws_follow_the_softmax(temperature: float, top_p: float) -> None:
    logits = torch.randn(41, generator=torch.Generator().manual_seed(5))
    probabilities = nucleus(softmax(logits.double().numpy() / temperature), top_p)
    counts = draw(logits, SamplingParams(temperature=temperature, top_p=top_p, seed=12345), 20000)
    assert counts[probabilities == 0].sum() == 0, "a token outside the nucleus was drawn"
    statistic, bound = chi_square(counts, probabilities)
    assert statistic < bound
    wrong, wrong_bound = chi_square(counts, softmax(logits.double().numpy() / (temperature * 1.15)))
    assert wrong > wrong_bound, "the test would not notice a temperature 15 % off"


def test_draws_of_different_seeds_are_independent() -> None:
    """Pairs of draws under neighbouring seeds fill the square of the distribution."""
    logits = torch.tensor([0.0, 0.5, 1.0, -0.5])
    positions = list(range(4000))
    rows = logits.expand(len(positions), -1)
    first = sample(rows, [SamplingParams(seed=7)] * len(positions), positions)
    second = sample(rows, [SamplingParams(seed=8)] * len(positions), positions)
    counts = np.bincount(np.array(first) * 4 + np.array(second), minlength=16)
    p = softmax(logits.double().numpy())
    statistic, bound = chi_square(counts, np.outer(p, p).ravel())
    assert statistic < bound


def test_a_draw_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 33, generator=generator)
    temperatures = [0.0, 1.0, 0.7, 0.0, 2.0, 1.0, 1.0, 0.3, 1.0]
    top_ps = [1.0, 0.5, 1.0, 0.2, 0.9, 1.0, 0.99, 0.8, 0.1]
    params = [
        SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
        for seed, (temperature, top_p) in enumerate(zip(temperatures, top_ps, strict=True))
    ]
    positions = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    together = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], [params[i]], [positions[i]])[0] for i in range(9)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


def test_top_p_keeps_at_least_the_likeliest() -> None:
    scaled = torch.tensor([[0.0, 3.0, 1.0]]).double()
    assert torch.isinf(mask_below_top_p(scaled, [1e-9])).tolist() == [[True, False, True]]
    assert not torch.isinf(mask_below_top_p(scaled, [1.0])).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_bad_parameters_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
