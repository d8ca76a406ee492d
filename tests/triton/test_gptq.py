"""GPTQ's sweep against the plain one in float64, and the plain one against the definition."""

import pytest
import torch

from pressd.runtime.kernels.gptq import reference
from pressd.runtime.kernels.gptq import triton as kernels


def problem(num_rows: int, width: int, groups: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights, the factor of a Hessian of correlated inputs, and scales, in float64."""
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ (torch.eye(width) + mixing)
    hessian = inputs.T @ inputs + 0.01 * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    parts = weight.view(num_rows, groups, width // groups).abs().amax(-1)
    return weight, factor.contiguous(), parts / (2 ** (bits - 1) - 0.5)


@pytest.mark.parametrize(
    ("num_rows", "width", "groups"), [(0, 32, 1), (1, 1, 1), (17, 64, 2), (5, 128, 4), (3, 100, 1)]
)
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_the_reference(
    device: torch.device, num_rows: int, width: int, groups: int, bits: int
) -> None:
    weight, factor, scale = problem(num_rows, width, groups, bits)
    exact, exact_errors = reference.sweep(weight, factor, scale, bits)
    codes, errors = kernels.sweep(*(part.float().to(device) for part in (weight, factor, scale)), bits)
    # In float32 a column is off by some 128 roundings of numbers up to 10 scales; a code is another one only where the
    # rounded number lies that near the middle between two, and from there on a row goes its own way.
    left = exact * scale.repeat_interleave(width // groups, 1) + exact_errors * factor.diagonal()
    steps = left / scale.repeat_interleave(width // groups, 1)
    distance = (steps - steps.floor() - 0.5).abs()
    safe = (distance > 1e-4).all(1)
    assert num_rows < 3 or safe.sum() > num_rows // 2
    assert torch.equal(codes.cpu()[safe], exact[safe])
    torch.testing.assert_close(errors.cpu()[safe].double(), exact_errors[safe], rtol=1e-3, atol=1e-4)


def test_the_sweep_loses_less_than_rounding() -> None:
    """What it is for: the error of outputs, which the Hessian measures, over several blocks."""
    weight, factor, scale = problem(8, 300, 1, 3)
    hessian = torch.linalg.inv(factor.T @ factor)
    codes = reference.quantize(weight, factor, scale, 3, None)
    nearest = (weight / scale).round().clamp(-4, 3)
    lost, lost_by_rounding = (weight - part * scale for part in (codes.double(), nearest))

    def size(error: torch.Tensor) -> float:
        return float(torch.einsum("nk,kl,nl->", error, hessian, error))

    assert size(lost) < 0.7 * size(lost_by_rounding)


@pytest.mark.parametrize("group_size", [None, 32, 256])
def test_blocks_make_no_difference(device: torch.device, group_size: int | None) -> None:
    """Several blocks, with the kernel and without, are one sweep over all columns, which is the definition."""
    weight, factor, _ = problem(6, 512, 1, 4)
    groups = 1 if group_size is None else 512 // group_size
    scale = weight.view(6, groups, -1).abs().amax(-1) / 7.5
    whole, _ = reference.sweep(weight, factor, scale, 4)
    assert torch.equal(reference.quantize(weight, factor, scale, 4, group_size), whole)
    there = [part.float().to(device) for part in (weight, factor, scale)]
    codes = reference.quantize(*there, 4, group_size, kernels.sweep).cpu()
    # Near ties fall otherwise in float32: few, and each moves what follows in its row by a step at most.
    assert (codes != whole).double().mean() < 0.02
    assert (codes.int() - whole.int()).abs().max() <= 2
