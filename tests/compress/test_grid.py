"""Grids against round-to-nearest, which makes them another way, and against a search in numpy's float64."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pressd.compress.grid import SEARCH_NORM, Columns, Grid, code_range, fit, search
from pressd.compress.passes.rtn import round_to_nearest
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCHEMES = [
    *(f"w{bits}a16{group}{zero}" for bits in range(2, 9) for group in ("", "g32", "g128") for zero in ("", "-asym")),
    *("w8a8", "w4a8g64", "w8a8-static", "fp8", "fp8a16", "fp8-static", "fp8-block"),
]
KINDS = ["normal", "zero row", "zeros", "constant", "positive", "negative", "outlier", "tiny"]


def packed(scheme: str, shape: tuple[int, int]) -> Packed:
    spec = parse_scheme(scheme).spec(shape)
    assert isinstance(spec, Packed)
    return spec


def weights(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8
    match kind:
        case "zero row":
            weight[len(weight) // 2] = 0
        case "zeros":
            weight.zero_()
        case "constant":
            weight[:] = weight[:, :1]
        case "positive":
            weight.abs_()
        case "negative":
            weight.abs_().neg_()
        case "outlier":
            weight[:, -1] *= 100
        case "tiny":  # scales that are subnormal in fp16, or nothing at all
            weight *= 2.0**-20
    return weight


def codes_of(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    codes = grid.by_column().codes(weight)
    return codes.to(fp8.CODES if grid.spec.storage == fp8.NAME else torch.int8)


@settings(max_examples=400, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 3, 128, 130, 300]),
    columns=st.sampled_from([1, 33, 64, 128, 256]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_fitted_grid_is_that_of_round_to_nearest(
    scheme: str, dtype: torch.dtype, kind: str, rows: int, columns: int, seed: int
) -> None:
    try:
        spec = packed(scheme, (rows, columns))
    except ValueError:
        assume(False)
    weight = weights(kind, (rows, columns), seed).to(dtype)
    expected = round_to_nearest(weight, spec)
    grid = fit(weight.float(), spec, dtype)
    scale = grid.scale[:: spec.block_size or 1].to(dtype)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    if expected.zero_point is None:
        assert grid.zero_point is None
    else:
        assert grid.zero_point is not None
        assert torch.equal(grid.zero_point, expected.zero_point.float())
    assert torch.equal(codes_of(grid, weight.float()).view(torch.uint8), expected.codes.view(torch.uint8))
    # Decoded alike, too: to the value that a reader computes in float32.
    assert torch.equal(grid.by_column().nearest(weight.float()), expected.decoded(slice(None), spec, torch.float32))


SEARCHED = [scheme for scheme in SCHEMES if scheme != "fp8-block"]


@settings(max_examples=200, deadline=None)
@given(
    scheme=st.sampled_from(SEARCHED),
    kind=st.sampled_from(KINDS),
    columns=st.sampled_from([33, 64, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_stay_in_their_range(scheme: str, kind: str, columns: int, seed: int) -> None:
    try:
        spec = packed(scheme, (4, columns))
    except ValueError:
        assume(False)
    weight = weights(kind, (4, columns), seed)
    for grid in (fit(weight, spec, torch.bfloat16), search(weight, spec, torch.bfloat16)):
        codes = grid.by_column().codes(100 * weight)  # far beyond what the grid was made for
        low, high = (-448, 448) if spec.storage == fp8.NAME else code_range(spec)
        assert bool(((codes >= low) & (codes <= high)).all())
        assert torch.equal(grid.by_column().values(grid.by_column().codes(0 * weight)), 0 * weight)
        assert bool((grid.scale > 0).all())
        if grid.zero_point is not None:
            assert bool(((grid.zero_point >= low) & (grid.zero_point <= high)).all())


def test_all_of_a_row_on_one_side_uses_all_codes() -> None:
    """Asymmetric: zero is one end of the range, and the largest weight the other."""
    for sign in (1.0, -1.0):
        weight = sign * torch.linspace(0.25, 4.0, 64)[None]
        codes = codes_of(fit(weight, packed("w4a16-asym", (1, 64)), torch.float32), weight)
        assert sorted({*codes.flatten().tolist()} | {-8 if sign > 0 else 7}) == list(range(-8, 8))


def loss64(weight: np.ndarray, levels: Columns, importance: np.ndarray | None, group: int) -> np.ndarray:
    """What rounding loses of each group of [R, C], in float64: [R, G]."""
    scale = levels.scale.double().numpy()
    zero = 0.0 if levels.zero_point is None else levels.zero_point.double().numpy()
    if levels.spec.storage == fp8.NAME:
        codes = torch.from_numpy(np.clip(weight / scale, -448, 448)).to(torch.float32).to(fp8.CODES).double().numpy()
    else:
        low, high = code_range(levels.spec)
        codes = np.clip(np.round(weight / scale + zero), low, high)
    lost = np.abs((codes - zero) * scale - weight)
    powers = lost**SEARCH_NORM if importance is None else lost**2 * importance
    return powers.reshape(len(weight), -1, group).sum(-1)


def brute_force(weight: np.ndarray, spec: Packed, importance: np.ndarray | None, group: int) -> np.ndarray:
    """The least loss [R, G] of 62 grids: of round-to-nearest, and by the formulas with ends from 1 down to 0.4."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    codes = round_to_nearest(torch.from_numpy(weight).bfloat16(), spec)
    lost = np.abs(codes.decoded(slice(None), spec, torch.float64).numpy() - weight)
    powers = lost**SEARCH_NORM if importance is None else lost**2 * importance
    best = powers.reshape(groups.shape).sum(-1)
    for shrink in np.linspace(1.0, 0.4, 61):
        if spec.symmetric:
            end = 448 if spec.storage == fp8.NAME else (2**spec.bits - 1) / 2
            scale = np.maximum(high, -low) * shrink / end
        else:
            scale = (high - low) * shrink / (2**spec.bits - 1)
        stored = torch.from_numpy(scale).float().bfloat16()
        zero = None
        if not spec.symmetric:
            least, most = code_range(spec)
            zero = torch.from_numpy(np.clip(np.round(least - low * shrink / stored.double().numpy()), least, most))
        grid = Grid(spec=spec, dtype=torch.bfloat16, scale=stored.float(), zero_point=zero)
        best = np.minimum(best, loss64(weight, grid.by_column(), importance, group))
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", ["w2a16g32", "w3a16", "w4a16g128-asym", "w8a8", "w5a16-asym", "fp8"])
@pytest.mark.parametrize("kind", ["normal", "outlier", "positive"])
def test_the_search_finds_what_a_search_in_float64_finds(scheme: str, kind: str, weighted: bool) -> None:
    spec = packed(scheme, (7, 128))
    weight = weights(kind, (7, 128), 5).bfloat16().float()
    importance = torch.rand(128, generator=torch.Generator().manual_seed(6)).square() if weighted else None
    found = search(weight, spec, torch.bfloat16, importance)
    counts = None if importance is None else importance.double().numpy()
    group = found.group_size
    lost = loss64(weight.double().numpy(), found.by_column(), counts, group)
    best = brute_force(weight.double().numpy(), spec, counts, group)
    # The search compares sums of at most 128 float32 terms, each with a relative error of a few 2^-24: it may take a
    # grid that is worse by as much (and one whose scale or zero point rounded to the other side of a tie: none here).
    assert np.all(lost <= best * (1 + 1e-4))
    at_ends = loss64(weight.double().numpy(), fit(weight, spec, torch.bfloat16).by_column(), counts, group)
    assert np.all(lost <= at_ends * (1 + 1e-4))
    if spec.bits < 8:
        assert lost.sum() < at_ends.sum()  # it did look


def test_grids_of_members_lie_under_one_another() -> None:
    parts = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (3, 5)]
    grids = [fit(part, packed("w4a16g32-asym", (len(part), 64)), torch.bfloat16) for part in parts]
    stacked = Grid.stacked(grids).by_column()
    expected = torch.cat([grid.by_column().nearest(part) for grid, part in zip(grids, parts, strict=True)])
    assert torch.equal(stacked.nearest(torch.cat(parts)), expected)
    assert torch.equal(stacked[2:6].nearest(torch.cat(parts)[2:6]), expected[2:6])
