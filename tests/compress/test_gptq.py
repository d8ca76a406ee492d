"""GPTQ against the paper's algorithm in numpy's float64, written column by column, and against what it must beat."""

import numpy as np
import pytest
import torch

from pressd.compress.encoding import decode
from pressd.compress.grid import Columns, Grid, code_range, fit
from pressd.compress.pass_options import Gptq
from pressd.compress.passes.gptq import SingularError, gptq, match_source
from pressd.compress.passes.loss import output_error
from pressd.compress.quantise_group import encode_members, quantise
from pressd.compress.statistics import Statistics
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import Packed

ROWS = 11


def packed(scheme: str, shape: tuple[int, int]) -> Packed:
    spec = parse_scheme(scheme).spec(shape)
    assert isinstance(spec, Packed)
    return spec


def problem(columns: int, seed: int, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [ROWS, columns], and the gram of inputs that depend on one another and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 3 * columns
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = (torch.randn(tokens, columns, generator=generator) + mixed / columns**0.5) * torch.exp(
        torch.randn(columns, generator=generator)
    )
    return torch.randn(ROWS, columns, generator=generator) / 8, x.T @ x / tokens


def gptq64(
    weight: torch.Tensor, gram: torch.Tensor, levels: Columns, damp: float, act_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [R, C] by equations 2 and 3 of the paper, and how far each was from the next tie, in codes.

    The inverse Hessian of the columns that are left is not read off a Cholesky factor: each step eliminates a row and a
    column of it, as the paper derives it.
    """
    weights, hessian = weight.double().numpy().copy(), gram.double().numpy().copy()
    scale = levels.scale.double().numpy()
    zero = np.zeros_like(scale) if levels.zero_point is None else levels.zero_point.double().numpy()
    low, high = code_range(levels.spec)
    hessian += damp * hessian.diagonal().mean() * np.eye(len(hessian))
    inverse = np.linalg.inv(hessian)
    order = np.argsort(-gram.diagonal().numpy(), kind="stable") if act_order else np.arange(len(hessian))
    codes, distances = np.zeros_like(weights), np.zeros_like(weights)
    for number, column in enumerate(order):
        exact = weights[:, column] / scale[:, column] + zero[:, column]
        codes[:, column] = np.clip(np.round(exact), low, high)
        inside = (exact > low - 0.5) & (exact < high + 0.5)
        distances[:, column] = np.where(inside, 0.5 - np.abs(exact - np.round(exact)), np.inf)
        error = (weights[:, column] - (codes[:, column] - zero[:, column]) * scale[:, column]) / inverse[column, column]
        rest = order[number + 1 :]
        weights[:, rest] -= np.outer(error, inverse[column, rest])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, distances


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("scheme", "columns"),
    [("w4a16", 300), ("w3a16", 129), ("w2a16", 7), ("w8a8", 200), ("w4a16g32", 160), ("w3a16g64-asym", 192)],
)
def test_codes_are_those_of_the_algorithm_in_float64(
    scheme: str, columns: int, dtype: torch.dtype, act_order: bool
) -> None:
    weight, gram = problem(columns, seed=columns)
    levels = fit(weight, packed(scheme, (ROWS, columns)), torch.bfloat16).by_column()
    found = gptq(weight.to(dtype), gram.to(dtype), levels, damp=0.01, act_order=act_order)
    assert found.damp == 0.01
    expected, distances = gptq64(weight, gram, levels, 0.01, act_order)
    # A column's value in codes, of size at most 2^bits, rounds to eps of that size; the factor U that moves errors into
    # it has relative errors of about eps times the condition number, which damping by 1 % bounds by 100 times the
    # largest eigenvalue over the mean.
    condition = 100 * float(torch.linalg.eigvalsh(gram)[-1] / gram.diagonal().mean())
    noise = torch.finfo(dtype).eps * condition * 2**levels.spec.bits
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    # A value within noise of a tie may go the other way, and all that follow in its row may differ with it.
    decided = np.logical_and.accumulate(distances[:, order] > noise, axis=1)
    assert decided.any()
    if dtype == torch.float64:
        assert decided.all()
    assert np.array_equal(found.codes.numpy()[:, order][decided], expected[:, order][decided])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", ["w2a16g32", "w4a16", "w4a16g32-asym", "w8a8", "fp8", "fp8-block"])
def test_outputs_change_less_than_by_rounding_to_nearest(scheme: str, act_order: bool) -> None:
    weight, gram = problem(256, seed=1)
    levels = fit(weight, packed(scheme, (ROWS, 256)), torch.bfloat16).by_column()
    found = gptq(weight, gram, levels, damp=0.01, act_order=act_order)
    assert torch.equal(found.codes, levels.codes(levels.values(found.codes)))  # they are codes
    nearest = output_error(levels.nearest(weight) - weight, gram)
    # Correlated inputs leave much to make up for: a fifth here, and half where the large come first.
    assert output_error(levels.values(found.codes) - weight, gram) < (0.67 if act_order else 0.9) * nearest


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = problem(200, seed=4)
    gram = torch.diag(torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.1)
    levels = fit(weight, packed("w3a16", (ROWS, 200)), torch.bfloat16).by_column()
    for act_order in (False, True):
        found = gptq(weight, gram, levels, damp=0.01, act_order=act_order)
        assert torch.equal(found.codes, levels.codes(weight))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_dead_inputs_take_no_part(act_order: bool, size: float) -> None:
    """The others are rounded as if the dead were not there, however small the inputs are."""
    weight, gram = problem(160, seed=2)
    gram = gram * size
    dead = torch.zeros(160, dtype=torch.bool)
    dead[[0, 17, 128, 159]] = True
    levels = fit(weight, packed("w4a16-asym", (ROWS, 160)), torch.bfloat16).by_column()
    alone = gptq(weight[:, ~dead], gram[~dead][:, ~dead], levels[:, ~dead], damp=0.01, act_order=act_order)
    gram[dead] = 0
    gram[:, dead] = 0
    found = gptq(weight, gram, levels, damp=0.01, act_order=act_order)
    assert torch.equal(levels.values(found.codes)[:, dead], torch.zeros(ROWS, 4))
    assert torch.isfinite(found.codes).all()
    # Blocks of 128 columns begin elsewhere, so float32 rounds otherwise: a value near a tie may differ, no more.
    assert (found.codes[:, ~dead] != alone.codes).float().mean() < 0.01


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("how", ["few tokens", "duplicated"])
def test_damping_makes_a_singular_hessian_regular(how: str, act_order: bool) -> None:
    weight, gram = problem(96, seed=3, tokens=10 if how == "few tokens" else None)
    if how == "duplicated":
        twice = torch.arange(96) // 2
        gram = gram[twice][:, twice]
    levels = fit(weight, packed("w3a16g32", (ROWS, 96)), torch.bfloat16).by_column()
    found = gptq(weight, gram, levels, damp=0.01, act_order=act_order)
    assert torch.isfinite(found.codes).all()
    nearest = output_error(levels.nearest(weight) - weight, gram)
    assert output_error(levels.values(found.codes) - weight, gram) < 0.5 * nearest


def test_more_damping_where_little_is_not_enough() -> None:
    """A gram with a negative eigenvalue of 1/2 % of its mean: damping of 0.1 % does not suffice, 1 % does."""
    weight, gram = problem(64, seed=5)
    values, vectors = torch.linalg.eigh(gram.double())
    values[0] = -0.005 * gram.diagonal().mean()
    gram = ((vectors * values) @ vectors.T).float()
    levels = fit(weight, packed("w4a16", (ROWS, 64)), torch.bfloat16).by_column()
    assert gptq(weight, gram, levels, damp=0.001, act_order=True).damp == pytest.approx(0.01)


BAD = {
    "negative definite": lambda gram: -gram,
    "NaN": lambda gram: gram.index_fill(0, torch.tensor([3]), torch.nan),
    "indefinite": lambda gram: gram - 30 * gram.diagonal().mean() * torch.eye(len(gram)),
    "nothing alive": lambda gram: 0 * gram,
}


@pytest.mark.parametrize("how", BAD)
def test_what_no_damping_saves_is_refused(how: str) -> None:
    weight, gram = problem(48, seed=6)
    levels = fit(weight, packed("w4a16", (ROWS, 48)), torch.bfloat16).by_column()
    with pytest.raises(SingularError):
        gptq(weight, BAD[how](gram), levels, damp=0.01, act_order=True)
    with pytest.raises(SingularError):
        match_source(weight, BAD[how](gram), gram, None, damp=0.01)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("how", ["negative definite", "indefinite", "nothing alive"])
def test_a_group_falls_back_to_rounding_to_nearest_and_says_so(how: str, correct: bool) -> None:
    weight, gram = problem(64, seed=6)
    specs = [packed("w4a16g32-asym", (rows, 64)) for rows in (4, 7)]
    statistics = Statistics(tokens=100, gram=BAD[how](gram), cross=gram if correct else None)
    found = quantise(weight, specs, statistics, Gptq(use="gptq"), clip=False, dtype=torch.bfloat16)
    assert found.fallback == "rtn: the Hessian is singular"
    grids = [fit(part, spec, torch.bfloat16) for part, spec in zip(weight.split([4, 7]), specs, strict=True)]
    assert torch.equal(found.values, Grid.stacked(grids).by_column().nearest(weight))
    for part, tensors, spec in zip(found.values.split([4, 7]), encode_members(found, specs, None), specs, strict=True):
        assert torch.equal(decode(tensors, spec, torch.float32), part)


@pytest.mark.parametrize("scheme", ["w3a16g32-asym", "w8a8", "fp8", "fp8-block"])
def test_members_are_stored_as_they_were_rounded(scheme: str) -> None:
    """Members of a group with rows of their own: 130 and 7 rows, where blocks end with each."""
    generator = torch.Generator().manual_seed(8)
    weight, (_, gram) = torch.randn(137, 128, generator=generator), problem(128, seed=8)
    specs = [packed(scheme, (rows, 128)) for rows in (130, 7)]
    found = quantise(weight, specs, Statistics(tokens=9, gram=gram), Gptq(use="gptq"), clip=True, dtype=torch.bfloat16)
    assert found.fallback is None
    stored = encode_members(found, specs, None)
    decoded = torch.cat([decode(t, spec, torch.float32) for t, spec in zip(stored, specs, strict=True)])
    assert torch.equal(decoded, found.values)
    lost, total = output_error(found.values - weight, gram), output_error(weight, gram)
    assert found.output_error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    nearest = quantise(weight, specs, Statistics(tokens=9, gram=gram), None, clip=True, dtype=torch.bfloat16)
    assert found.output_error < nearest.output_error


@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize("tokens", [500, 20])
def test_matching_the_source_is_least_squares(tokens: int, lags: bool) -> None:
    """min |W' x - W y - d|^2 + ridge |W' - W|^2, by numpy's lstsq on the tokens; also where they are few."""
    generator = torch.Generator().manual_seed(tokens)
    y = torch.randn(tokens, 48, generator=generator, dtype=torch.float64)
    x = y + 0.3 * torch.randn(tokens, 48, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, 48, generator=generator, dtype=torch.float64)
    lacking = 0.5 * torch.randn(tokens, ROWS, generator=generator, dtype=torch.float64)
    gram, cross, lag = x.T @ x / tokens, y.T @ x / tokens, lacking.T @ x / tokens
    ridge = 0.01 * float(gram.diagonal().mean())
    rows = np.concatenate([x.numpy(), np.sqrt(tokens * ridge) * np.eye(48)])
    outputs = y @ weight.T + lacking if lags else y @ weight.T
    wanted = np.concatenate([outputs.numpy(), np.sqrt(tokens * ridge) * weight.numpy().T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = match_source(weight, gram, cross, lag if lags else None, damp=0.01)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)  # condition 1e3, float64 throughout
    single = match_source(weight.float(), gram.float(), cross.float(), lag.float() if lags else None, damp=0.01)
    # Float32: 2^-24 times the condition number of what is solved, at most trace / ridge = 48 / 0.01, times |W|'s size.
    assert float((single - found).abs().max()) < 2.0**-24 * 48 / 0.01 * float(weight.abs().max())


def test_nothing_changes_where_inputs_are_the_sources() -> None:
    weight, gram = problem(40, seed=9)
    assert torch.equal(match_source(weight, gram, gram, None, damp=0.01), weight)
