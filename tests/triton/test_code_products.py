"""Products of 8-bit codes with 8-bit codes against float64, in which they are exact."""

import os

import pytest
import torch

from pressd.runtime.kernels.activation_codes import FP8
from pressd.runtime.kernels.code_products import product_of_few
from pressd.runtime.kernels.fp8 import format as fp8_disk
from pressd.runtime.kernels.fp8 import reference as fp8_reference
from pressd.runtime.kernels.fp8 import triton as fp8
from pressd.runtime.kernels.int8 import reference as int8_reference
from pressd.runtime.kernels.int8 import triton as int8
from pressd.runtime.kernels.int8.triton import scaled
from pressd.runtime.kernels.registry import Device, LinearProblem, QuantizedRows, Tensors

SHAPES = [(1, 32), (70, 96), (65, 320), (130, 1024)]


def random_codes(shape: tuple[int, ...], codes: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if codes == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(FP8)


@pytest.mark.parametrize("codes", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows(device: torch.device, dtype: torch.dtype, codes: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = random_codes(shape, codes, generator)
    scale = torch.rand(shape[0], 1, generator=generator) * 1e-4
    for num_rows in (0, 1, 3, 17, 33, 100):
        x = random_codes((num_rows, shape[1]), codes, generator)
        x_scale = torch.rand(num_rows, 1, generator=generator)
        rows = QuantizedRows(codes=x.to(device), scale=x_scale.to(device))
        y = product_of_few(rows, weight.to(device), scale.to(device), dtype)
        products = x.double() @ weight.double().T
        expected = products * x_scale.double() * scale.double().T
        # Integers add up exactly; products of floats are exact in float32, which adds them, on a tensor core with some
        # bits less (2^-13 of the largest) within a block of 128. Two scales and the result round once each.
        sums = x.double().abs() @ weight.double().abs().T * x_scale.double() * scale.double().T
        loose = 0.0 if codes == torch.int8 else shape[1] * 2.0**-24 + 2.0**-13
        limit = loose * sums + (0.51 * torch.finfo(dtype).eps + 2.0**-22) * expected.abs() + 1e-7
        assert (y.shape, y.dtype) == (expected.shape, dtype)
        assert bool(((y.cpu().double() - expected).abs() <= limit).all()), num_rows


def test_many_rows_are_scaled_once(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    sums = torch.randint(-(2**20), 2**20, (5, 1500), generator=generator, dtype=torch.int32)
    x_scale, scale = torch.rand(5, 1, generator=generator), torch.rand(1500, 1, generator=generator) * 1e-4
    y = scaled(sums.to(device), x_scale.to(device), scale.to(device), dtype)
    expected = sums.double() * x_scale.double() * scale.double().T
    # Three roundings in float32, and one to the type, which below its least normal number is absolute.
    limit = (0.51 * torch.finfo(dtype).eps + 2.0**-22) * expected.abs() + torch.finfo(dtype).smallest_normal * 2.0**-10
    assert bool(((y.cpu().double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("num_rows", [0, 1, 17, 130])
def test_whole_layers(device: torch.device, dtype: torch.dtype, storage: str, num_rows: int) -> None:
    """Activations are quantised on the way; the reference does it too, in float64."""
    if storage == "fp8" and (os.environ.get("TRITON_INTERPRET") == "1" or dtype != torch.bfloat16):
        pytest.skip("the interpreter's conversion to e4m3 is wrong, and the library's product by rows gives bfloat16")
    generator = torch.Generator().manual_seed(num_rows)
    problem = LinearProblem(
        storage=storage, bits=8, group_size=None, activation_bits=8, out_features=80, in_features=96, dtype=dtype
    )
    tensors: Tensors = {
        "weight": random_codes((80, 96), torch.int8 if storage == "int8" else fp8_disk.CODES, generator),
        "weight_scale": torch.rand(80, 1, generator=generator).to(dtype) / 100,
    }
    x = torch.randn(num_rows, 96, generator=generator).to(dtype)
    kernel, reference = (int8, int8_reference) if storage == "int8" else (fp8, fp8_reference)
    there = Device(torch_device=device, features=frozenset())
    y = kernel.run(x.to(device), kernel.pack(dict(tensors), problem, there), problem)
    here = Device(torch_device=torch.device("cpu"), features=frozenset())
    expected = reference.run(x.float(), reference.pack(dict(tensors), problem, here), problem)
    assert (y.shape, y.dtype) == ((num_rows, 80), dtype)
    # The same codes but for near ties, which the last bit of a scale decides: one code off in a row, by one step.
    off = 2 * x.float().abs().amax(-1, keepdim=True) / 127 if num_rows else torch.zeros(0, 1)
    largest = (tensors["weight"].float() * tensors["weight_scale"].float()).abs().amax()
    limit = off * largest + 2 * torch.finfo(dtype).eps * expected.float().abs()
    assert bool(((y.cpu().float() - expected.float()).abs() <= limit + 1e-6).all())
