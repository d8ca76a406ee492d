"""Norms, gates, rotations and codes against the plain-torch references, in float64 where rounding may differ."""

import os

import pytest
import torch

from pressd.runtime.kernels.activation_codes import FP8, quantize_rows_reference
from pressd.runtime.kernels.gate import reference as gate_reference
from pressd.runtime.kernels.gate import triton as gate
from pressd.runtime.kernels.norm import reference as norm_reference
from pressd.runtime.kernels.norm import triton as norm
from pressd.runtime.kernels.registry import CodeType, QuantizedRows
from pressd.runtime.kernels.rotary import reference as rotary_reference
from pressd.runtime.kernels.rotary import triton as rotary
from pressd.runtime.kernels.row_codes import quantize_rows

# The interpreter's conversion to e4m3 loses a carry from the significand into the exponent: 1.99 becomes 1.
DTYPES = [torch.int8] if os.environ.get("TRITON_INTERPRET") == "1" else [torch.int8, FP8]
CODES = [CodeType(dtype=dtype) for dtype in DTYPES]


def assert_codes(found: QuantizedRows, values: torch.Tensor) -> None:
    """Codes and scales of `values`, which were rounded to their type before: nothing else rounds but the scale.

    The scale is one division in float32; a value within its error of the middle between two codes may take either.
    """
    expected = quantize_rows_reference(values.float().cpu(), CodeType(dtype=found.codes.dtype))
    scale = found.scale.cpu().double()
    torch.testing.assert_close(scale, expected.scale.double(), rtol=2**-23, atol=0)
    step = 1.0 if found.codes.dtype == torch.int8 else 2**-3  # between codes, or over a code: three bits of it
    error = (found.codes.cpu().double() * scale - values.cpu().double()).abs()
    size = scale if found.codes.dtype == torch.int8 else values.cpu().double().abs() + scale * 2**-6
    # The largest value of a row lies between two codes of int8 and takes the smaller.
    assert bool((error <= (0.5 * step + 1e-4) * size).all())


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 70), (5, 1024), (2, 5000)], ids=str)
@pytest.mark.parametrize("with_delta", [False, True])
def test_norm(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], with_delta: bool) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x, delta = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    gain = torch.rand(shape[1], generator=generator).to(dtype)
    total, y = norm.add_norm(x.to(device), delta.to(device) if with_delta else None, gain.to(device), 1e-5)
    expected_total, _ = norm_reference.add_norm(x, delta if with_delta else None, gain, 1e-5)
    assert torch.equal(total.cpu(), expected_total)
    exact = norm_reference.norm(expected_total.double(), gain.double(), 1e-5)
    # The normalised value rounds, then its product with the gain: half an eps each, and float32 sums before.
    assert isinstance(y, torch.Tensor)
    assert bool(
        (
            (y.cpu().double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * exact.abs() + 1e-7
        ).all()
    )
    for codes in CODES:
        again, rows = norm.add_norm(
            x.to(device), delta.to(device) if with_delta else None, gain.to(device), 1e-5, codes
        )
        assert torch.equal(again, total)
        assert isinstance(rows, QuantizedRows)
        assert_codes(rows, y)


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 70), (2, 3000)], ids=str)
def test_gate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    gate_up = (4 * torch.randn(shape[0], 2 * shape[1], generator=generator)).to(dtype)
    y = gate.silu_mul(gate_up.to(device))
    assert isinstance(y, torch.Tensor)
    exact = gate_reference.silu_mul(gate_up.double())
    assert isinstance(exact, torch.Tensor)
    # Two roundings of half an eps, and exp in float32; below the least normal number an absolute step.
    limit = 1.01 * torch.finfo(dtype).eps * exact.abs() + 16 * torch.finfo(dtype).smallest_normal
    assert bool(((y.cpu().double() - exact).abs() <= limit + 2e-6 * exact.abs()).all())
    for codes in CODES:
        rows = gate.silu_mul(gate_up.to(device), codes)
        assert isinstance(rows, QuantizedRows)
        assert_codes(rows, y)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (1, 1), (4, 333), (2, 4096)], ids=str)
def test_rows_to_codes(device: torch.device, dtype: torch.dtype, codes: CodeType, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    if shape[0] > 1:
        x[1] = 0
    rows = quantize_rows(x.to(device), codes.dtype)
    assert_codes(rows, x)
    if shape[0] > 1:
        assert bool((rows.codes[1].float() == 0).all())


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_what_is_no_number_stays_none_in_codes(device: torch.device, dtype: torch.dtype, codes: CodeType) -> None:
    x = torch.randn(4, 140, generator=torch.Generator().manual_seed(4)).to(dtype)
    x[1, 4], x[2, 100], x[3, 139] = float("-inf"), float("nan"), float("nan")
    gated = gate.silu_mul(x.to(device), codes)
    normed = norm.add_norm(x.to(device), None, torch.ones(140, dtype=dtype, device=device), 1e-5, codes)[1]
    plain = quantize_rows(x.to(device), codes.dtype)
    for found, expected in (
        (gated, gate_reference.silu_mul(x, codes)),
        (normed, norm_reference.add_norm(x, None, torch.ones(140, dtype=dtype), 1e-5, codes)[1]),
        (plain, quantize_rows_reference(x, codes)),
    ):
        assert isinstance(found, QuantizedRows)
        assert isinstance(expected, QuantizedRows)
        lost = [not bool(torch.isfinite(row)) for row in found.scale]
        assert lost == [not bool(torch.isfinite(row)) for row in expected.scale]
        assert lost[0] is False
        assert lost[2:] == [True, True]


@pytest.mark.parametrize("kind", ["norm", "gate"])
def test_values_are_rounded_where_the_reference_rounds(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    """A rounding more or fewer would change a tenth of the values by a last bit; the order of a sum, hardly any."""
    if dtype == torch.float32:
        pytest.skip("nothing is rounded in between")
    generator = torch.Generator().manual_seed(4)
    x, gain = (torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 4096), (4096,)))
    if kind == "norm":
        found = norm.add_norm(x.to(device), None, gain.to(device), 1e-5)[1]
        expected = norm_reference.add_norm(x, None, gain, 1e-5)[1]
    else:
        found, expected = gate.silu_mul(x.to(device)), gate_reference.silu_mul(x)
    assert isinstance(found, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert (found.cpu() == expected).double().mean() > 0.99


@pytest.mark.parametrize("heads", [(4, 2, 8), (3, 3, 80), (8, 1, 64)], ids=str)
@pytest.mark.parametrize("with_norms", [False, True])
def test_rotation(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], with_norms: bool) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(head_dim)
    num_tokens, block_size = 7, 4
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.rand(40, head_dim // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([0, 39, 3, 3, 17, 5, 1])
    slots = torch.tensor([5, 0, 11, -1, 6, 2, -1])
    gain = torch.rand(num_heads + num_kv_heads, head_dim, generator=generator).to(dtype) if with_norms else None

    def outputs(there: torch.device, kind: torch.dtype, module: object) -> list[torch.Tensor]:
        pools = [torch.full((3, block_size, num_kv_heads, head_dim), 7.0, dtype=kind, device=there) for _ in range(2)]
        query = module.rotate_and_write(  # type: ignore[attr-defined]
            qkv.to(there, kind),
            positions.to(there),
            cos.to(there),
            sin.to(there),
            None if gain is None else gain.to(there, kind),
            1e-5,
            *pools,
            slots.to(there),
            num_heads,
            num_kv_heads,
        )
        return [query.cpu().double(), *(pool.cpu().double() for pool in pools)]

    exact = outputs(torch.device("cpu"), torch.float64, rotary_reference)
    for found, expected in zip(outputs(device, dtype, rotary), exact, strict=True):
        # With norms a value rounds three times, each time by half an eps of values below 4, and two of them add up.
        assert (found - expected).abs().max() <= 4 * 4 * torch.finfo(dtype).eps
    assert bool((exact[1].flatten(0, 1)[[1, 3, 4]] == 7).all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
def test_no_number_reaches_a_pool_of_eight_bits_as_one(device: torch.device, kind: torch.dtype) -> None:
    """A sequence whose keys are NaN has to be found out, not to go on with others."""
    if kind not in CODES:
        pytest.skip("the interpreter's conversion to e4m3 is wrong")
    qkv = torch.randn(3, 4 * 16, generator=torch.Generator().manual_seed(1), dtype=torch.float16).to(device)
    qkv[1, 2 * 16 + 3] = float("nan")  # a key of the second token
    qkv[2, 3 * 16 + 9] = float("nan")  # a value of the third
    pools = [torch.zeros(1, 4, 1, 16, device=device).to(kind) for _ in range(2)]
    scales = [torch.ones((1, 4, 1) if kind == torch.int8 else (1,), device=device) for _ in range(2)]
    angles = torch.zeros(4, 8, device=device)
    where = torch.arange(3, device=device)
    rotary.rotate_and_write(qkv, where, angles.cos(), angles.sin(), None, 1e-5, *pools, where, 2, 1, *scales)
    for pool, scale, spoilt in zip(pools, scales, (1, 2), strict=True):
        wide = pool.float() * (scale.unsqueeze(-1) if kind == torch.int8 else scale)
        assert wide.isnan().flatten(2).any(-1).flatten().tolist() == [token == spoilt for token in range(4)]


@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
def test_rotation_into_eight_bits(device: torch.device, dtype: torch.dtype, kind: torch.dtype) -> None:
    """What comes back of the pool is what the compute type would hold, to half a code."""
    if kind not in CODES:
        pytest.skip("the interpreter's conversion to e4m3 is wrong")
    num_heads, num_kv_heads, head_dim, block_size = 4, 2, 64, 4
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(5, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.rand(40, head_dim // 2, generator=generator) * 6
    positions, slots = torch.tensor([0, 39, 3, 17, 5]), torch.tensor([5, 0, -1, 11, 2])

    def pools(there: torch.device, module: object, stored: torch.dtype) -> list[torch.Tensor]:
        blocks = [torch.zeros(3, block_size, num_kv_heads, head_dim, device=there).to(stored) for _ in range(2)]
        shape = (3, block_size, num_kv_heads) if stored == torch.int8 else (1,)
        scales = [torch.full(shape, 2.0**-6, device=there) for _ in range(2)] if stored != dtype else [None, None]
        module.rotate_and_write(  # type: ignore[attr-defined]
            *(tensor.to(there) for tensor in (qkv, positions, angles.cos(), angles.sin())),
            None,
            1e-5,
            *blocks,
            slots.to(there),
            num_heads,
            num_kv_heads,
            *scales,
        )
        if stored == dtype:
            return [block.cpu().float() for block in blocks]
        wide = [scale.unsqueeze(-1) if stored == torch.int8 else scale for scale in scales if scale is not None]
        return [(block.float() * scale).cpu() for block, scale in zip(blocks, wide, strict=True)]

    expected = pools(torch.device("cpu"), rotary_reference, dtype)
    for module, there in ((rotary, device), (rotary_reference, torch.device("cpu"))):
        for found, exact in zip(pools(there, module, kind), expected, strict=True):
            largest = exact.abs().amax(-1, keepdim=True)
            limit = largest / 127 * 0.501 if kind == torch.int8 else exact.abs() * 0.0626 + 2.0**-16
            assert bool(((found - exact).abs() <= limit).all())
            assert bool((found.flatten(0, 1)[[1, 3, 4]] == 0).all())
