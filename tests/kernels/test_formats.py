"""What is on disk: packing against an independent bit stream, rounding against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.integer_codes import dequantize, quantize
from pressd.runtime.kernels.packed_int import format as packed_int

BITS = range(2, 9)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The format's definition in numpy: the low `bits` bits of each code, first element first, in 32-bit words."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[:, :, None], axis=2, bitorder="little")[:, :, :bits].reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(2, 8))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 100))
    seed = draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=np.int8)
    return torch.from_numpy(codes), bits


@given(codes_and_bits())
def test_packing_is_the_bit_stream_and_unpacking_its_inverse(drawn: tuple[torch.Tensor, int]) -> None:
    codes, bits = drawn
    packed = packed_int.pack(codes, bits)
    np.testing.assert_array_equal(packed.numpy(), bit_stream(codes.numpy(), bits))
    assert packed.dtype == torch.int32
    assert torch.equal(packed_int.unpack(packed, bits, codes.size(1)), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("extreme", ["lowest", "highest"])
def test_extreme_codes_survive_the_sign_bit_of_a_word(bits: int, extreme: str) -> None:
    value = -(2 ** (bits - 1)) if extreme == "lowest" else 2 ** (bits - 1) - 1
    codes = torch.full((3, 67), value, dtype=torch.int8)
    assert torch.equal(packed_int.unpack(packed_int.pack(codes, bits), bits, 67), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_layout_is_what_encode_stores(bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(bits)).to(dtype)
    tensors = packed_int.encode(*quantize(weight, bits, group_size), bits)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == packed_int.layout(5, 192, bits, group_size, dtype)
    assert tensors["weight_shape"].tolist() == [5, 192]


def test_int8_and_dense_layouts_are_what_encode_stores() -> None:
    weight = torch.randn(5, 33)
    for tensors, layout in (
        (int8.encode(*quantize(weight, 8, None)), int8.layout(5, 33, 8, None, torch.float32)),
        (dense.encode(weight), dense.layout(5, 33, 32, None, torch.float32)),
    ):
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == layout


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 32])
def test_every_storage_decodes_to_codes_times_scale(bits: int, group_size: int | None) -> None:
    weight = torch.randn(7, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = quantize(weight, bits, group_size)
    expected = (codes.view(*scale.shape, -1).double() * scale.double().unsqueeze(-1)).view(7, 160)
    decoded = packed_int.decode(packed_int.encode(codes, scale, bits), bits, group_size, torch.float32)
    # 8 bits of code times 8 bits of a bfloat16's significand fit in float32's 24: exact.
    assert torch.equal(decoded.double(), expected)
    if bits == 8 and group_size is None:
        assert torch.equal(int8.decode(int8.encode(codes, scale), torch.float32), decoded)


def test_dense_decodes_to_itself() -> None:
    weight = torch.randn(3, 4).bfloat16()
    assert torch.equal(dense.decode(dense.encode(weight), torch.float32), weight.float())


@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 3),
    magnitude=st.floats(1e-20, 1e20),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_code_is_the_nearest_level(bits: int, groups: int, magnitude: float, seed: int) -> None:
    weight = torch.randn(3, 32 * groups, generator=torch.Generator().manual_seed(seed)) * magnitude
    before = weight.clone()
    codes, scale = quantize(weight, bits, 32)
    assert torch.equal(weight, before)
    # The scale maps max|w| to (2^bits - 1) / 2, half a level above the highest code: nothing is further than half a
    # level from a code. The scale is rounded once (2^-24) and so is the quotient, of at most 127.5: 2^-16 covers both.
    distance = (weight.double() - dequantize(codes, scale, torch.float64)).abs().view(3, groups, 32)
    assert bool((distance <= scale.double().unsqueeze(-1) * (0.5 + 2**-16)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_group_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    weight = torch.randn(2, 64).to(dtype)
    weight[0, 32:] = 0
    codes, scale = quantize(weight, 4, 32)
    assert bool(torch.isfinite(scale).all())
    assert scale.dtype == dtype
    assert bool((scale != 0).all())
    assert torch.equal(dequantize(codes, scale, dtype)[0, 32:], torch.zeros(32, dtype=dtype))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_shows_in_its_scale(poison: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 40] = poison
    _, scale = quantize(weight, 4, 32)
    assert torch.isfinite(scale).tolist() == [[True, True], [True, False]]
