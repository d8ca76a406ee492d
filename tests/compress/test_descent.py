"""Coordinate descent: the loss cannot grow, and what it stops at is the best of what could be done alone."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.compress.grid import Columns, Grid, code_range, fit
from pressd.compress.passes.descent import descend, refine, rescale
from pressd.compress.passes.gptq import gptq
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8

SCHEMES = ["w2a16", "w3a16g32", "w4a16g32-asym", "w8a8", "fp8"]


def problem(
    scheme: str, rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, Grid, torch.Tensor]:
    """Weight, gram, grid, and codes of which some are far off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.exp(torch.randn(columns, generator=generator))
    x[:, columns // 3] = 0  # a dead input
    weight = torch.randn(rows, columns, generator=generator) / 8
    spec = parse_scheme(scheme).spec((rows, columns))
    assert isinstance(spec, Packed)
    grid = fit(weight, spec, dtype)
    codes = grid.by_column().codes(weight + torch.randn(rows, columns, generator=generator) / 16)
    return weight, x.T @ x / tokens, grid, codes


def loss(weight: torch.Tensor, gram: torch.Tensor, levels: Columns, codes: torch.Tensor) -> np.ndarray:
    """Mean squared change of each output [R], in float64."""
    zero = 0.0 if levels.zero_point is None else levels.zero_point.double()
    lost = ((codes.double() - zero) * levels.scale.double() - weight.double()).numpy()
    result: np.ndarray = np.einsum("rc,cd,rd->r", lost, gram.double().numpy(), lost)
    return result


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 5),
    columns=st.sampled_from([32, 96, 160]),
    tokens=st.sampled_from([5, 400]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_loss_never_grows(scheme: str, rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    weight, gram, grid, codes = problem(scheme, rows, columns, tokens, dtype, seed)
    # `pull` [R, C] is kept up to date in float32 over a sweep's C changes: of terms that add up to at most
    # |lost| |gram|, each rounds to 2^-24. A code or scale may move where it gains less than that and lose as much.
    lost = (grid.by_column().values(codes) - weight).abs()
    noise = 4 * columns * 2.0**-24 * float((lost @ gram.abs() * lost).sum(1).max())
    last = loss(weight, gram, grid.by_column(), codes)
    for _ in range(3):
        for step in ("scales", "codes"):
            if step == "scales":
                grid = rescale(weight, gram, grid, codes)
            else:
                codes = descend(weight, gram, grid.by_column(), codes)
            now = loss(weight, gram, grid.by_column(), codes)
            assert np.all(now <= last + noise), step
            last = now
        assert bool((grid.scale > 0).all())
        assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
        if grid.spec.storage == fp8.NAME:
            assert torch.equal(codes.to(fp8.CODES).float(), codes)
        else:
            low, high = code_range(grid.spec)
            assert torch.equal(codes.round().clamp(low, high), codes)


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a16g32-asym"])
def test_a_sweep_helps_even_after_gptq(scheme: str) -> None:
    weight, gram, grid, _ = problem(scheme, 16, 192, 600, torch.bfloat16, 1)
    codes = gptq(weight, gram, grid.by_column(), damp=0.01, act_order=True).codes
    before = loss(weight, gram, grid.by_column(), codes).sum()
    better, moved = refine(weight, gram, grid, codes, sweeps=4)
    assert loss(weight, gram, better.by_column(), moved).sum() < 0.9 * before


@pytest.mark.parametrize("scheme", ["w2a16", "w3a16g32-asym"])
def test_it_ends_where_no_code_alone_can_be_better(scheme: str) -> None:
    """Every other code of every weight is tried; and where none helps, another sweep changes nothing."""
    weight, gram, grid, codes = problem(scheme, 3, 32, 200, torch.bfloat16, 7)
    weight, gram = weight.double(), gram.double()  # no ties within rounding
    for _ in range(50):
        moved = descend(weight, gram, grid.by_column(), codes.double())
        if torch.equal(moved, codes):
            break
        codes = moved
    else:
        pytest.fail("50 sweeps were not enough")
    best = loss(weight, gram, grid.by_column(), codes)
    low, high = code_range(grid.spec)
    for column in range(32):
        for code in range(low, high + 1):
            other = codes.clone()
            other[:, column] = code
            assert np.all(loss(weight, gram, grid.by_column(), other) >= best * (1 - 1e-12))


def test_codes_of_dead_inputs_stay() -> None:
    weight, gram, grid, codes = problem("w4a16g32-asym", 4, 96, 100, torch.bfloat16, 3)
    moved = descend(weight, gram, grid.by_column(), codes)
    assert torch.equal(moved[:, 32], codes[:, 32])
    assert not torch.equal(moved, codes)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-asym", "w8a8", "fp8"])
def test_a_rows_scale_is_that_of_least_squares(scheme: str) -> None:
    """Against numpy's lstsq on the inputs themselves: |(scale x steps - w) x| for each row."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(6, 64, generator=generator) / 8
    spec = parse_scheme(scheme).spec((6, 64))
    assert isinstance(spec, Packed)
    grid = fit(weight, spec, torch.float32)
    codes = grid.by_column().codes(weight)
    found = rescale(weight, x.T @ x / 300, dataclasses.replace(grid, scale=grid.scale * 1.1), codes)
    zero = 0.0 if grid.zero_point is None else grid.zero_point
    for row in range(6):
        inputs = (x @ (codes - zero)[row]).double().numpy()[:, None]
        expected = np.linalg.lstsq(inputs, (x @ weight[row]).double().numpy(), rcond=None)[0]
        # Slope and curvature are sums of 64 x 64 float32 products with relative errors of 2^-24 each; few cancel.
        assert float(found.scale[row, 0]) == pytest.approx(float(expected[0]), rel=64 * 2.0**-24)


def test_groups_come_one_after_the_other() -> None:
    """Each group's scale is the best given those before it as they are now, and those behind as they were."""
    weight, gram, grid, codes = problem("w4a16g32", 2, 96, 300, torch.float32, 9)
    found = rescale(weight, gram, grid, codes)
    steps = codes.double().view(2, 3, 32)
    wide, scale = gram.double(), grid.scale.double().clone()
    for group in range(3):
        own = torch.zeros(2, 3, 32, dtype=torch.float64)
        own[:, group] = steps[:, group]
        own = own.flatten(1)
        rest = scale.clone()
        rest[:, group] = 0
        target = weight.double() - (steps * rest.unsqueeze(-1)).flatten(1)
        scale[:, group] = ((own @ wide) * target).sum(1) / ((own @ wide) * own).sum(1)
    # Sums of 96 x 32 terms in float32; where they cancel by a factor of ten, 1e-4 is left of 2^-24 and sqrt(3072).
    assert torch.allclose(found.scale.double(), scale, rtol=1e-4)


def test_a_scale_that_would_be_negative_stays() -> None:
    weight, gram, grid, codes = problem("w4a16", 3, 32, 300, torch.bfloat16, 4)
    codes = codes.clamp(-7, 7)
    found = rescale(weight, gram, grid, torch.stack([-codes[0], codes[1], torch.zeros(32)]))
    assert torch.equal(found.scale[[0, 2]], grid.scale[[0, 2]])
    assert not torch.equal(found.scale[1], grid.scale[1])
