"""Every kernel that serves a device, there, against the reference in float64 on the CPU.

The reference is held against oracles that are not ours in tests/kernels; here the same arithmetic meets another
device's library, whose sums run in another order and whose matrix units may round more than was asked for.
"""

from dataclasses import replace

import pytest
import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, QueryRun
from pressd.runtime.kernels.catalogue import ATTENTION, LINEAR
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import LinearProblem, Tensors, describe_device

CPU = torch.device("cpu")
ROWS = (0, 1, 3, 33)
SHAPES = ((97, 160), (320, 512))
# storage, bits, group size, activation bits
STORAGES = (
    (dense.NAME, 16, None, 16),
    (int8.NAME, 8, None, 8),
    (int8.NAME, 8, None, 16),
    (packed_int.NAME, 4, 32, 16),
    (packed_int.NAME, 3, 32, 16),
    (packed_int.NAME, 8, None, 16),
    (packed_int.NAME, 4, 32, 8),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda", 0) if request.param == "cuda" else CPU


def stored(problem: LinearProblem, generator: torch.Generator) -> Tensors:
    shape = (problem.out_features, problem.in_features)
    if problem.storage == dense.NAME:
        return dense.encode(torch.randn(shape, generator=generator).to(problem.dtype))
    half = 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    groups = 1 if problem.group_size is None else problem.in_features // problem.group_size
    scale = (torch.rand(problem.out_features, groups, generator=generator) + 0.5).to(torch.bfloat16)
    return int8.encode(codes, scale) if problem.storage == int8.NAME else packed_int.encode(codes, scale, problem.bits)


def activations(rows: int, problem: LinearProblem, generator: torch.Generator) -> torch.Tensor:
    """Whole numbers times a power of two per row, the largest of a group 127.5: int8 rounding has nothing to decide."""
    x = torch.randint(-127, 128, (rows, problem.in_features), generator=generator).double()
    x[:, :: problem.group_size or problem.in_features] = 127.5
    return x * 2.0 ** torch.randint(-6, 3, (rows, 1), generator=generator).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s[0]}-w{s[1]}a{s[3]}g{s[2]}")
def test_linear(
    device: torch.device, storage: tuple[str, int, int | None, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    def problem_in(dtype: torch.dtype) -> LinearProblem:
        kind, bits, group_size, activation_bits = storage
        return LinearProblem(
            storage=kind,
            bits=bits,
            group_size=group_size,
            activation_bits=activation_bits,
            out_features=shape[0],
            in_features=shape[1],
            dtype=dtype,
        )

    generator = torch.Generator().manual_seed(shape[0] + storage[1])
    problem, exact = problem_in(dtype), problem_in(torch.float64)
    tensors = stored(problem, generator)
    candidates = [kernel for kernel in LINEAR if kernel.storage == problem.storage]
    there, here = describe_device(device), describe_device(CPU)
    weight = candidates[-1].pack(dict(tensors), exact, here)
    identity = torch.eye(shape[1], dtype=torch.float64)
    decoded = candidates[-1].run(identity, weight, replace(exact, activation_bits=16))
    serving = [kernel for kernel in candidates if kernel.why_not(problem, there) is None]
    assert serving
    for kernel in serving:
        packed = kernel.pack(dict(tensors), problem, there)
        for rows in ROWS:
            x = activations(rows, problem, generator)
            y = kernel.run(x.to(device, dtype), packed, problem)
            assert (y.device, y.dtype, y.shape) == (device, dtype, (rows, shape[0]))
            expected = candidates[-1].run(x, weight, exact)
            # As in tests/kernels: a sum of n products in the type it is summed in, the decoded weight and the result
            # rounded to the compute type, by half an eps each. cuBLAS may add partial sums in bfloat16: up to 4 here.
            eps, sum_eps = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            limit = (shape[1] * sum_eps + 3.5 * eps) * (x.abs() @ decoded.abs()) + 1.5 * eps * expected.abs()
            assert bool(((y.cpu().double() - expected).abs() <= limit).all()), (kernel.name, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("heads", [(4, 2, 8), (3, 3, 16), (8, 1, 64)], ids=str)
def test_attention(device: torch.device, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """One token, a first chunk and a later chunk; the last sequence's blocks are scattered."""
    problem, exact = (
        AttentionProblem(num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2], dtype=kind)
        for kind in (dtype, torch.float64)
    )
    generator = torch.Generator().manual_seed(heads[0])
    shape = (10, 4, heads[1], heads[2])
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(13, heads[0], heads[2], generator=generator).to(dtype)
    runs = (
        QueryRun(start=0, length=1, kv_length=9, block_table=(0, 1, 2), first_block=0),
        QueryRun(start=1, length=7, kv_length=7, block_table=(3, 4), first_block=3),
        QueryRun(start=8, length=5, kv_length=18, block_table=(9, 5, 8, 6, 7), first_block=None),
    )
    batch = AttentionBatch(runs=runs, slot_mapping=torch.empty(0, dtype=torch.int64))
    expected = ATTENTION[-1].run(query.double(), keys.double(), values.double(), batch, exact)
    serving = [kernel for kernel in ATTENTION if kernel.why_not(problem, describe_device(device)) is None]
    assert serving
    for kernel in serving:
        output = kernel.run(query.to(device), keys.to(device), values.to(device), batch, problem)
        assert (output.device, output.dtype) == (device, dtype)
        # The bound of tests/kernels, with heads eight times as wide: scores of at most head_dim |q||k|, below 40.
        assert (output.cpu().double() - expected).abs().max() < 24 * torch.finfo(dtype).eps, kernel.name
