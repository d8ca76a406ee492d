"""Every registered linear kernel against float64 arithmetic on the decoded weight."""

import numpy as np
import pytest
import torch

from pressd.runtime.kernels.catalogue import LINEAR
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import LinearKernel, LinearProblem, Tensors, describe_device, select

CPU = describe_device(torch.device("cpu"))
# None, one, few (matrix-vector branches), and enough rows for every branch on M; never a multiple of a tile.
ROWS = (0, 1, 3, 8, 33, 67)
SHAPES = ((16, 64), (48, 128), (97, 160), (128, 256), (320, 512))
STORAGES = (
    (dense.NAME, 16, None, 16),
    (int8.NAME, 8, None, 8),
    (int8.NAME, 8, None, 16),
    (packed_int.NAME, 4, 32, 16),
    (packed_int.NAME, 4, 128, 16),
    (packed_int.NAME, 3, 32, 16),
    (packed_int.NAME, 8, None, 16),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def stored(problem: LinearProblem, generator: torch.Generator) -> tuple[Tensors, np.ndarray]:
    """Return random stored tensors and the weight they mean, in float64."""
    shape = (problem.out_features, problem.in_features)
    if problem.storage == dense.NAME:
        weight = torch.randn(shape, generator=generator, dtype=torch.float32).to(problem.dtype)
        return dense.encode(weight), weight.double().numpy()
    half = 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    groups = 1 if problem.group_size is None else problem.in_features // problem.group_size
    scale = (torch.rand(problem.out_features, groups, generator=generator) + 0.5).to(torch.bfloat16)
    wide = codes.double().view(shape[0], groups, -1) * scale.double()[..., None]
    tensors = (
        int8.encode(codes, scale) if problem.storage == int8.NAME else packed_int.encode(codes, scale, problem.bits)
    )
    return tensors, wide.view(shape).numpy()


def activations(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, columns] in float64 and what int8 quantisation per row makes of it.

    Whole codes times a power of two with the extreme at -127.5 steps, which rounds to -128: the oracle needs no
    rounding rule of its own, and bfloat16 holds every value.
    """
    codes = torch.randint(-127, 128, (rows, columns), generator=generator).double()
    scales = 2.0 ** torch.randint(-6, 3, (rows, 1), generator=generator).double()
    codes[:, 0] = -127.5
    x = codes * scales
    codes[:, 0] = -128
    return x, codes * scales


def problems() -> list[tuple[LinearKernel, LinearProblem]]:
    found = []
    for kernel in LINEAR:
        for storage, bits, group_size, activation_bits in STORAGES:
            if storage != kernel.storage:
                continue
            for out_features, in_features in SHAPES:
                if group_size is not None and in_features % group_size:
                    continue
                for dtype in DTYPES:
                    problem = LinearProblem(
                        storage=storage,
                        bits=bits,
                        group_size=group_size,
                        activation_bits=activation_bits,
                        out_features=out_features,
                        in_features=in_features,
                        dtype=dtype,
                    )
                    if kernel.why_not(problem, CPU) is None:
                        found.append((kernel, problem))
    return found


def name(value: object) -> str:
    if isinstance(value, LinearProblem):
        kind = f"w{value.bits}a{value.activation_bits}g{value.group_size}"
        return f"{kind}-{value.out_features}x{value.in_features}-{str(value.dtype).removeprefix('torch.')}"
    assert isinstance(value, LinearKernel)
    return f"{value.storage}-{value.name}"


@pytest.mark.parametrize(("kernel", "problem"), problems(), ids=name)
def test_equals_float64(kernel: LinearKernel, problem: LinearProblem) -> None:
    generator = torch.Generator().manual_seed(problem.out_features * 1009 + problem.bits)
    tensors, weight = stored(problem, generator)
    packed = kernel.pack(tensors, problem, CPU)
    for rows in ROWS:
        x, quantised = activations(rows, problem.in_features, generator)
        y = kernel.run(x.to(problem.dtype), packed, problem)
        assert y.dtype == problem.dtype
        assert y.shape == (rows, problem.out_features)
        seen = quantised if problem.activation_bits == 8 else x
        expected = seen.numpy() @ weight.T
        # A sum of n products is off by at most n eps sum|x||w| in the type it is summed in (Higham, Accuracy and
        # Stability, 3.1). A reference may also round the decoded weight to the compute type, and a kernel its result,
        # twice where a product of codes is rounded before scales are applied: half an eps each time.
        sum_eps = torch.finfo(torch.promote_types(problem.dtype, torch.float32)).eps
        eps = torch.finfo(problem.dtype).eps
        magnitude = seen.abs().numpy() @ np.abs(weight).T
        bound = (problem.in_features * sum_eps + 1.5 * eps) * magnitude + 1.5 * eps * np.abs(expected)
        assert (np.abs(y.double().numpy() - expected) <= bound).all(), f"{rows} rows"


def test_every_kernel_is_exercised_or_refuses_this_machine() -> None:
    tested = {kernel.name + kernel.storage for kernel, _ in problems()}
    machine_bound = {"cpu-onednnint8", "cpu-widenedint8", "cpu-wideneddense"}
    assert {kernel.name + kernel.storage for kernel in LINEAR} - tested <= machine_bound


def test_reference_is_last_and_never_refuses() -> None:
    for storage, bits, group_size, activation_bits in STORAGES:
        kernels = [kernel for kernel in LINEAR if kernel.storage == storage]
        problem = LinearProblem(
            storage=storage,
            bits=bits,
            group_size=group_size,
            activation_bits=activation_bits,
            out_features=7,
            in_features=128,
            dtype=torch.float64,
        )
        chosen, refusals = select(kernels, lambda kernel, p=problem: kernel.why_not(p, CPU), "fast")
        assert kernels[-1].name == "reference" == chosen.name
        assert len(refusals) == len(kernels) - 1
        assert select(kernels, lambda kernel, p=problem: kernel.why_not(p, CPU), "reference") == (chosen, ())


def test_a_wrong_weight_is_noticed() -> None:
    """The bound above is tight enough to see one code off by one."""
    problem = LinearProblem(
        storage=packed_int.NAME,
        bits=4,
        group_size=32,
        activation_bits=16,
        out_features=16,
        in_features=64,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(3)
    tensors, weight = stored(problem, generator)
    tensors["weight_packed"][5, 2] ^= 1 << 4
    kernel = next(kernel for kernel in LINEAR if kernel.storage == packed_int.NAME and kernel.name == "reference")
    x, _ = activations(1, 64, generator)
    y = kernel.run(x.float(), kernel.pack(tensors, problem, CPU), problem)
    difference = np.abs(y.double().numpy() - x.numpy() @ weight.T)
    bound = (64 * torch.finfo(torch.float32).eps * 4) * (x.abs().numpy() @ np.abs(weight).T)
    assert (difference > bound).any()
