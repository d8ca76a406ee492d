"""One weight through every kind of spec: what is stored decodes to what its definition says, over odd shapes."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pressd.compress import rows
from pressd.compress.encoding import decode
from pressd.compress.passes.magnitude import keep_two_of_four
from pressd.compress.passes.svd import factorise
from pressd.compress.press_linear import press_linear
from pressd.runtime.artifact.schemes import parse_scheme
from pressd.runtime.artifact.specs import child_tensors
from pressd.runtime.kernels.integer_codes import dequantize, quantize

GROUPS = st.sampled_from(["", "g32", "g64", "g128"])
BASES = st.one_of(
    st.sampled_from(["bf16", "w8a8", "fp8", "fp8-block", "fp8-static", "w8a8-static"]),
    st.builds("w{}a16{}".format, st.integers(2, 8), GROUPS),
    st.builds("w{}a16{}-asym".format, st.integers(2, 8), GROUPS),
    st.builds("w{}a8{}".format, st.integers(2, 8), GROUPS),
)


@st.composite
def schemes(draw: st.DrawFn) -> str:
    base = draw(BASES)
    before = draw(st.sampled_from(["", "sparse24:", "lowrank"]))
    if before == "lowrank":
        before = f"lowrank{draw(st.sampled_from([1, 3, 32, 64]))}:"
    after = draw(st.sampled_from(["", "+residual1", "+residual5"]))
    return f"{before}{base}{after}"


@settings(max_examples=150, deadline=None)
@given(
    scheme=schemes(),
    rows=st.integers(1, 70),
    columns=st.sampled_from([1, 4, 31, 33, 64, 96, 128, 260]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_stored_is_what_the_layout_says_and_decodes(
    scheme: str, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    try:
        spec = parse_scheme(scheme).spec((rows, columns))
    except ValueError:
        assume(False)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    input_scale = torch.full((1,), 0.125, dtype=dtype)
    tensors, (lost, total) = press_linear(weight, weight, spec, input_scale=input_scale)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == spec.layout(dtype)
    decoded = decode(tensors, spec, torch.float64)
    assert decoded.shape == weight.shape
    # Norms are summed in float32 over at most 70 x 260 products, each decoded with float32's relative error; dividing
    # by the total makes a bound of a few thousand roundings generous and still a thousandth of any scheme's own error.
    expected = float((decoded - weight.double()).square().sum())
    assert lost == pytest.approx(expected, rel=1e-3, abs=1e-9 * total)
    assert total == pytest.approx(float(weight.double().square().sum()), rel=1e-3)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_factors_are_the_closest_of_their_rank(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rank = max(1, min(rows, columns) // 2)
    a, b = factorise(weight, rank)
    assert (a.shape, b.shape) == ((rows, rank), (rank, columns))
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    # Eckart-Young: the error is the tail of the spectrum. Backward error of a float32 SVD: a few eps ||W||.
    error = float(torch.linalg.norm(a.double() @ b.double() - weight.double()))
    assert error == pytest.approx(float(np.sqrt((singular[rank:] ** 2).sum())), abs=1e-5 * singular[0] * rows)


@given(rows=st.integers(1, 9), quads=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_the_two_largest_of_four_stay(rows: int, quads: int, seed: int) -> None:
    weight = torch.randint(-3, 4, (rows, 4 * quads), generator=torch.Generator().manual_seed(seed)).float()
    kept = keep_two_of_four(weight).view(-1, 4).numpy()
    for group, chosen in zip(weight.view(-1, 4).abs().numpy(), kept, strict=True):
        assert chosen.sum() == 2
        assert group[chosen].min() >= group[~chosen].max()
        # numpy's stable sort decides ties the same way: the first of equals stays
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-group, kind="stable")[:2])


def test_two_of_four_rounds_what_it_keeps_in_groups_of_what_it_keeps() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    spec = parse_scheme("sparse24:w4a16g32").spec((6, 128))
    tensors, _ = press_linear(weight, weight, spec)
    kept = keep_two_of_four(weight)
    expected = torch.zeros(6, 128)
    expected[kept] = dequantize(*quantize(weight[kept].view(6, 64), 4, 32), torch.float32).flatten()
    assert torch.equal(decode(tensors, spec, torch.float32), expected)


def test_a_residual_corrects_what_the_base_lost() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    losses = []
    for rank in (1, 8, 40):
        spec = parse_scheme(f"w2a16g32+residual{rank}").spec((48, 64))
        tensors, (lost, _) = press_linear(weight, weight, spec)
        base, (lost_by_base, _) = press_linear(weight, weight, parse_scheme("w2a16g32").spec((48, 64)))
        assert child_tensors(tensors, "base").keys() == base.keys()
        assert all(torch.equal(tensor, base[name]) for name, tensor in child_tensors(tensors, "base").items())
        losses.append(lost / lost_by_base)
    assert 1 > losses[0] > losses[1] > losses[2]
    # With 40 of 48 singular values what is left is the tail of the spectrum of the error: small.
    assert losses[2] < 0.05


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static", "w8a8-static+residual2"])
def test_a_scale_that_nobody_measured_is_asked_for(scheme: str) -> None:
    weight, spec = torch.ones(6, 64), parse_scheme(scheme).spec((6, 64))
    with pytest.raises(ValueError, match=r"is measured on text, .*; calibrate with a pass that does, or choose"):
        press_linear(weight, weight, spec)
    tensors, _ = press_linear(weight, weight, spec, input_scale=torch.tensor([0.5]))
    assert [tensor.tolist() for name, tensor in tensors.items() if name.endswith("input_scale")] == [[0.5]]


def test_blocks_are_rounded_alike_in_pieces_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces begin where blocks of rows do: with less than a block in one, there is one block in each."""
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(3))
    spec = parse_scheme("fp8-block").spec((300, 256))
    whole = press_linear(weight, weight, spec)[0]
    monkeypatch.setattr(rows, "PIECE_NUMBERS", 1000)
    pieces = press_linear(weight, weight, spec)[0]
    assert whole["weight_scale"].shape == (3, 2)
    assert torch.equal(whole["weight_scale"], pieces["weight_scale"])
    assert torch.equal(whole["weight"].view(torch.uint8), pieces["weight"].view(torch.uint8))
