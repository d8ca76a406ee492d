"""Activations in int8: the rounding against compressed-tensors', which quantises them as every token passes."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from pressd.runtime.kernels.integer_codes import quantize_activations, round_activations


@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rounding_is_compressed_tensors(group_size: int | None, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 256, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    x[:, 5::64] *= 30  # outliers, so that the rest of their group uses few codes
    arguments = QuantizationArgs(
        num_bits=8,
        symmetric=True,
        dynamic=True,
        strategy=QuantizationStrategy.TOKEN if group_size is None else QuantizationStrategy.GROUP,
        group_size=group_size,
    )
    codes, scale = quantize_activations(x, group_size)
    assert (codes.shape, scale.shape) == ((rows, 256), (rows, 256 // (group_size or 256)))
    if rows:
        batch = x.unsqueeze(0)  # theirs takes the second dimension for the tokens
        their_scale, zero = compute_dynamic_scales_and_zp(batch, arguments, torch.nn.Module())
        assert torch.equal(scale, their_scale.squeeze(0))
        theirs = quantize(batch, their_scale, zero, arguments).squeeze(0).clamp(min=-127)
        assert torch.equal(codes, theirs)
        seen = fake_quantize(batch, their_scale, zero, arguments)[0]
        low = their_scale[0].repeat_interleave(256 // their_scale.size(-1), -1) * -127
        assert torch.equal(round_activations(x, group_size), torch.maximum(seen, low))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_bit_of_a_row_moves_no_code_of_its_largest_value(dtype: torch.dtype) -> None:
    """The largest value is 127.5 steps whatever it is; rounding makes that a little more or a little less."""
    largest = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.5
    for sign in (1, -1):
        codes, _ = quantize_activations(torch.stack([sign * largest, largest / 3], dim=1))
        assert (codes[:, 0] == sign * 127).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros_and_the_largest_keeps_its_sign(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 64, dtype=dtype)
    x[1, 40], x[2, 3] = -1.9921875, 1.9921875  # 127.5 / 64: a step is a power of two
    codes, scale = quantize_activations(x, 32)
    assert codes.dtype == scale.dtype == torch.promote_types(dtype, torch.float32)
    assert codes.count_nonzero() == 2
    # 127.5 steps would round to 128: neither side has it.
    assert (codes[1, 40], codes[2, 3]) == (-127, 127)
    seen = round_activations(x, 32)
    assert seen.dtype == dtype
    assert not seen[0].any()
    # Half a step is what rounding may cost: 1 part in 255.
    assert torch.allclose(seen.double(), x.double(), rtol=1 / 255 + 2 * torch.finfo(dtype).eps, atol=0)


def test_what_is_not_a_number_stays_one() -> None:
    x = torch.ones(2, 32)
    x[1, 7] = float("nan")
    seen = round_activations(x, None)
    assert not seen[0].isnan().any()
    assert seen[1].isnan().all()
