"""The rules by which channels are rescaled, against a loop in numpy's float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pressd.compress.grid import fit
from pressd.compress.passes.equalize import search_scales, smooth_scales
from pressd.compress.passes.loss import output_error
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed


def rounding(scheme: str, shape: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    spec = parse_scheme(scheme).spec(shape)
    assert isinstance(spec, Packed)
    return lambda weight: fit(weight, spec, torch.bfloat16).by_column().nearest(weight)


def problem(seed: int, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs of which few channels are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, columns, generator=generator)
    x[:, ::9] *= 30
    return torch.randn(24, columns, generator=generator) / 8, x


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smooth_is_the_papers_equation(alpha: float) -> None:
    weight, x = problem(1)
    found = smooth_scales(x.abs().amax(0), weight, alpha)
    expected = np.abs(x.double().numpy()).max(0) ** alpha / np.abs(weight.double().numpy()).max(0) ** (1 - alpha)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)  # two powers and a division of float32


def test_channels_without_inputs_or_weights_stay() -> None:
    weight, x = problem(2)
    weight[:, 3] = 0
    x[:, 5] = 0
    found = smooth_scales(x.abs().amax(0), weight, 0.5)
    assert found[[3, 5]].tolist() == [1.0, 1.0]
    assert bool((found > 0).all())


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a16", "w4a16g32-asym", "w8a8"])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_search_finds_what_a_loop_in_float64_finds(scheme: str, steps: int) -> None:
    weight, x = problem(3)
    nearest, gram = rounding(scheme, (24, 64)), x.T @ x / 500
    mean = x.abs().mean(0)
    scales, without, with_it = search_scales(mean, gram, weight, nearest, steps=steps)
    wide = x.double().numpy()
    expected = {}
    for step in range(steps + 1):
        tried = mean.pow(step / steps)
        tried = tried / (tried.max() * tried.min()).sqrt()
        lost = (nearest(weight * tried) / tried - weight).double().numpy()
        expected[step / steps] = float(np.square(wide @ lost.T).sum(1).mean())
    # A loss is a sum of 24 x 64 x 64 float32 terms; relative error 2^-24 for each of their three roundings, and no more
    # than the square root of their number for the sums, leaves five digits.
    assert without == pytest.approx(expected[0.0], rel=1e-4)
    assert with_it == pytest.approx(min(expected.values()), rel=1e-4)
    assert with_it == pytest.approx(output_error(nearest(weight * scales) / scales - weight, gram), rel=1e-6)
    assert with_it < without or steps == 1


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_worse_than_doing_nothing(seed: int) -> None:
    """Inputs whose size says nothing about what matters: their weights are smaller by as much."""
    weight, x = problem(seed)
    weight[:, ::9] /= 900
    gram = x.T @ x / 500
    scales, without, with_it = search_scales(x.abs().mean(0), gram, weight, rounding("w4a16", (24, 64)), steps=10)
    assert with_it <= without
    if with_it == without:
        assert torch.equal(scales, torch.ones(64))


def test_weights_without_loss_are_left_alone() -> None:
    x = problem(7)[1]
    weight = torch.randint(-7, 8, (24, 64), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0] = 7.5  # the end of a range of steps of one; 7.5 itself is not one
    found = search_scales(
        x.abs().mean(0),
        (x.T @ x / 500).index_fill(0, torch.tensor(0), 0.0).index_fill(1, torch.tensor(0), 0.0),
        weight,
        rounding("w4a16", (24, 64)),
        steps=10,
    )
    assert torch.equal(found[0], torch.ones(64))
    assert found[1:] == (0.0, 0.0)


def test_dead_and_tiny_inputs_get_usable_scales() -> None:
    weight, x = problem(8)
    x[:, 4] = 0
    x[:, 10] *= 1e-12
    scales, without, with_it = search_scales(
        x.abs().mean(0), x.T @ x / 500, weight, rounding("w3a16g32", (24, 64)), steps=20
    )
    assert scales[4] == 1
    assert bool((torch.isfinite(scales) & (scales > 0)).all())
    assert with_it < without
