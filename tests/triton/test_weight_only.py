"""Products with 4- and 8-bit weights against the decoded weight in float64."""

import dataclasses

import pytest
import torch

from pressd.runtime.kernels.integer_codes import round_activations
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.packed_int import triton as kernels
from pressd.runtime.kernels.packed_int.triton_weights import pack_words, unpack_words
from pressd.runtime.kernels.registry import Device, LinearProblem, Tensors

SHAPES = [(1, 128), (70, 96), (65, 384), (130, 1024)]  # [out, in]
ROWS = [0, 1, 3, 16, 17, 33, 65, 130]


def problem_of(bits: int, group: int | None, shape: tuple[int, int], dtype: torch.dtype) -> LinearProblem:
    return LinearProblem(
        storage=disk.NAME,
        bits=bits,
        group_size=group,
        activation_bits=16,
        out_features=shape[0],
        in_features=shape[1],
        dtype=dtype,
    )


def stored(problem: LinearProblem, generator: torch.Generator) -> Tensors:
    shape, half = (problem.out_features, problem.in_features), 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    groups = 1 if problem.group_size is None else problem.in_features // problem.group_size
    scale = (torch.rand(problem.out_features, groups, generator=generator) + 0.5).to(problem.dtype)
    return disk.encode(codes, scale, problem.bits)


def bound(x: torch.Tensor, weight: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Products in float32, summed in any order (half an eps a term and operation), scales applied to sums; the result
    rounds once, and the dense product of many rows rounds each weight: half an eps of the type each."""
    eps, sum_eps = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    size = x.abs() @ weight.abs().T
    return (x.size(1) + 8) * sum_eps * size + 0.5 * eps * size + 0.5 * eps * (expected.abs() + eps * size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, None), (8, None), (8, 32), (8, 128)])
def test_products(
    device: torch.device, dtype: torch.dtype, bits: int, group: int | None, shape: tuple[int, int]
) -> None:
    if group is not None and shape[1] % group:
        pytest.skip("groups divide the inputs")
    problem = problem_of(bits, group, shape, dtype)
    generator = torch.Generator().manual_seed(shape[0] + bits)
    tensors = stored(problem, generator)
    weight = disk.decode(tensors, bits, group, torch.float64)
    packed = kernels.pack(tensors, problem, Device(torch_device=device, features=frozenset()))
    for num_rows in ROWS:
        x = torch.randn(num_rows, shape[1], generator=generator).to(dtype)
        expected = x.double() @ weight.T
        y = kernels.run(x.to(device), packed, problem)
        assert (y.shape, y.dtype, y.device) == (expected.shape, dtype, device)
        error = (y.cpu().double() - expected).abs()
        assert bool((error <= bound(x.double(), weight, expected, dtype)).all()), num_rows


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [32, 64])
def test_words_hold_all_codes(bits: int, count: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.int8).repeat(40)[: 5 * 37].view(5, 37).contiguous()
    assert torch.equal(unpack_words(pack_words(codes, bits, count), bits, count, 37), codes)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, None)])
def test_few_rows_are_the_same_bits_whatever_their_number(device: torch.device, bits: int, group: int | None) -> None:
    """A draft is verified several tokens at once and decoded one by one: both must agree."""
    problem = problem_of(bits, group, (70, 1024), torch.float16)
    generator = torch.Generator().manual_seed(bits)
    tensors = stored(problem, generator)
    packed = kernels.pack(tensors, problem, Device(torch_device=device, features=frozenset()))
    x = torch.randn(16, 1024, generator=generator).half().to(device)
    whole = kernels.run(x, packed, problem)
    for count in (1, 2, 5):
        for first in (0, 7):
            part = kernels.run(x[first : first + count].contiguous(), packed, problem)
            assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 64)])
def test_dense_weight_and_rows_are_the_decoded_ones(
    device: torch.device, dtype: torch.dtype, bits: int, group: int | None
) -> None:
    problem = problem_of(bits, group, (37, 192), dtype)
    generator = torch.Generator().manual_seed(bits)
    tensors = stored(problem, generator)
    packed = kernels.pack(tensors, problem, Device(torch_device=device, features=frozenset()))
    expected = disk.decode(tensors, bits, group, dtype)
    assert torch.equal(kernels.dense(packed, problem).cpu(), expected)
    ids = torch.tensor([3, 36, 0, 3])
    assert torch.equal(kernels.rows(ids.to(device), packed, problem).cpu(), expected[ids])


def test_activations_in_eight_bits_are_rounded_first(device: torch.device) -> None:
    problem = problem_of(4, 32, (33, 96), torch.float16)
    generator = torch.Generator().manual_seed(1)
    tensors = stored(problem, generator)
    rounded = dataclasses.replace(problem, activation_bits=8)
    packed = kernels.pack(tensors, problem, Device(torch_device=device, features=frozenset()))
    x = torch.randn(3, 96, generator=generator).to(device, torch.float16)
    y = kernels.run(x, packed, rounded)
    assert torch.equal(y, kernels.run(round_activations(x, 32), packed, problem))
    assert not torch.equal(y, kernels.run(x, packed, problem))
