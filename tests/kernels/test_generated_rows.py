"""What lies between the linears, generated, against the reference in float64."""

import numpy as np
import pytest
import torch
from generated import needs_vnni

from pressd.runtime.kernels import vnni_rows
from pressd.runtime.kernels.activation_codes import quantize_rows_reference
from pressd.runtime.kernels.gate import cpu as gate
from pressd.runtime.kernels.gate import reference as gate_reference
from pressd.runtime.kernels.integer_codes import quantize_activations
from pressd.runtime.kernels.norm import cpu as norm
from pressd.runtime.kernels.norm import reference as norm_reference
from pressd.runtime.kernels.registry import SUM_FACTOR, CodeType, QuantizedRows
from pressd.runtime.kernels.rotary import cpu as rotary
from pressd.runtime.kernels.rotary import reference as rotary_reference

pytestmark = [needs_vnni, pytest.mark.usefixtures("vectors")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (None, 32, 64, 128)


def assert_codes(found: QuantizedRows, values: torch.Tensor, kind: CodeType, error: float) -> None:
    """Codes are those of `values` float64, which the kernel may have computed with a relative `error`.

    A value within its error of the middle between two codes may take either, and so may the largest of a group.
    """
    expected = quantize_rows_reference(values, kind)
    torch.testing.assert_close(found.scale.double(), expected.scale, rtol=error + 2**-22, atol=0)
    groups = found.codes.double().reshape(*found.scale.shape, values.size(1) // found.scale.size(1))
    exact = values.view(groups.shape)
    step = found.scale.double().unsqueeze(-1)
    slack = 0.5 * step + error * exact.abs() + 128 * 2**-22 * step
    assert bool(((groups * step - exact).abs() <= slack).all())
    assert bool((groups.abs() <= 127).all())
    assert found.sums is not None
    assert torch.equal(found.sums, (groups.sum(-1) * SUM_FACTOR).to(torch.int32))


@pytest.mark.parametrize("group_size", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (5, 384), (3, 1152)], ids=str)
def test_rows_equal_the_reference_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, group_size: int | None
) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 3).to(dtype)
    if shape[0] > 1:
        x[1] = 0
    rows = vnni_rows.quantize_rows(x, group_size)
    codes, scale = quantize_activations(x, group_size)
    assert torch.equal(rows.codes.float(), codes)
    assert torch.equal(rows.scale, scale)
    assert rows.sums is not None
    assert torch.equal(
        rows.sums, (codes.view(*scale.shape, shape[1] // scale.size(1)).sum(-1) * SUM_FACTOR).to(torch.int32)
    )


@pytest.mark.parametrize("width", [32, 96, 160, 416])
def test_rows_without_groups_may_have_any_multiple_of_a_vector(width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).to(torch.bfloat16)
    codes, scale = quantize_activations(x)
    rows = vnni_rows.quantize_rows(x, None)
    assert torch.equal(rows.codes.float(), codes)
    assert torch.equal(rows.scale, scale)


@pytest.mark.parametrize("group_size", [None, 64])
def test_what_is_no_number_stays_none(group_size: int | None) -> None:
    x = torch.randn(4, 128)
    x[1, 4], x[2, 100], x[3, 127] = float("inf"), float("nan"), float("nan")
    rows = vnni_rows.quantize_rows(x, group_size)
    groups = rows.scale.size(1)
    spoilt = torch.zeros(4, groups, dtype=torch.bool)
    spoilt[1, 0] = spoilt[2, -1] = spoilt[3, -1] = True
    assert torch.equal(rows.scale.isfinite(), ~spoilt)


@pytest.mark.parametrize("quantize", [None, *GROUPS], ids=["values", *map(str, GROUPS)])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (6, 384)], ids=str)
def test_norm(shape: tuple[int, int], dtype: torch.dtype, adds: bool, quantize: int | str | None) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x, delta = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    gain = (torch.rand(shape[1], generator=generator) + 0.5).to(dtype)
    total, y = norm.add_norm(x, delta if adds else None, gain, 1e-5)
    expected_total, _ = norm_reference.add_norm(x, delta if adds else None, gain, 1e-5)
    assert torch.equal(total, expected_total)
    exact = norm_reference.norm(expected_total.double(), gain.double(), 1e-5)
    assert isinstance(y, torch.Tensor)
    # Sums of squares of n values, a root, a quotient and two products in float32, then one rounding.
    error = (shape[1] / 16 + 8) * 2**-24
    limit = (0.5 * torch.finfo(dtype).eps * 1.001 + error) * exact.abs() + torch.finfo(dtype).smallest_normal
    assert bool(((y.double() - exact).abs() <= limit).all())
    kind = CodeType(dtype=torch.int8, group_size=quantize if isinstance(quantize, int) else None, has_sums=True)
    again, rows = norm.add_norm(x, delta if adds else None, gain, 1e-5, kind)
    assert torch.equal(again, total)
    assert isinstance(rows, QuantizedRows)
    assert_codes(rows, exact, kind, error)


@pytest.mark.parametrize("group_size", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (6, 384)], ids=str)
def test_gate(shape: tuple[int, int], dtype: torch.dtype, group_size: int | None) -> None:
    gate_up = (torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    exact = gate_reference.silu_mul(gate_up.double())
    assert isinstance(exact, torch.Tensor)
    y = gate.silu_mul(gate_up)
    assert isinstance(y, torch.Tensor)
    # exp to 2 ulp, a sum, a quotient and a product.
    error = 8 * 2**-24
    limit = (0.5 * torch.finfo(dtype).eps * 1.001 + error) * exact.abs() + torch.finfo(dtype).smallest_normal
    assert bool(((y.double() - exact).abs() <= limit).all())
    kind = CodeType(dtype=torch.int8, group_size=group_size, has_sums=True)
    rows = gate.silu_mul(gate_up, kind)
    assert isinstance(rows, QuantizedRows)
    assert_codes(rows, exact, kind, error)


def test_the_gate_at_both_ends() -> None:
    values = torch.tensor(
        [-1e4, -100.0, -90.0, -88.0, -87.0, -1.0, -0.0, 0.0, 1.0, 87.0, 88.0, 90.0, 1e4, -20.0, 20.0, 3.0]
    )
    found = gate.silu_mul(torch.cat((values, torch.ones(16)))[None])
    assert isinstance(found, torch.Tensor)
    exact = torch.nn.functional.silu(values.double())
    # Below -87 e^x is no normal number in float32: silu(-88) is -5e-37 where it is -5e-37 or 0.
    np.testing.assert_allclose(found[0].double().numpy(), exact.numpy(), rtol=1e-6, atol=2e-34)
    spoilt = gate.silu_mul(torch.tensor([[float("nan"), float("inf"), 1.0, 2.0] * 4 + [1.0] * 16]))
    assert isinstance(spoilt, torch.Tensor)
    assert spoilt[0, :4].isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2, 32), (3, 1, 64), (2, 2, 8), (7, 1, 96), (1, 1, 6)], ids=str)
def test_rotation(heads: tuple[int, int, int], dtype: torch.dtype, norms: bool) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(head_dim)
    tokens = 5
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.rand(50, head_dim // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([0, 49, 7, 7, 23])
    slots = torch.tensor([3, 0, -1, 11, 5])
    gain = (torch.rand(num_heads + num_kv_heads, head_dim, generator=generator) + 0.5).to(dtype) if norms else None
    pools = [torch.full((3, 4, num_kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    query = rotary.rotate_and_write(qkv, positions, cos, sin, gain, 1e-5, *pools, slots, num_heads, num_kv_heads)
    wide = [torch.full((3, 4, num_kv_heads, head_dim), torch.nan, dtype=torch.float64) for _ in range(2)]
    expected = rotary_reference.rotate_and_write(
        qkv.double(),
        positions,
        cos.double(),
        sin.double(),
        None if gain is None else gain.double(),
        1e-5,
        *wide,
        slots,
        num_heads,
        num_kv_heads,
    )
    # Two products and a sum in float32, of values below 6, after a norm; then one rounding.
    limit = 0.5 * torch.finfo(dtype).eps * 1.001
    for found, exact in ((query, expected), (pools[0], wide[0])):
        torch.testing.assert_close(found.double(), exact, rtol=limit, atol=64 * 2**-24, equal_nan=True)
    torch.testing.assert_close(pools[1].double(), wide[1], rtol=0, atol=0, equal_nan=True)
