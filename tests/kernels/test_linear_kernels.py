"""Every registered linear kernel against float64 arithmetic on the decoded weight."""

import itertools

import numpy as np
import pytest
import torch

from pressd.runtime.kernels import crossovers
from pressd.runtime.kernels.catalogue import linear_kernels
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import REFERENCE, LinearKernel, LinearProblem, Tensors, describe_device, select

CPU = describe_device(torch.device("cpu"))
LINEAR = linear_kernels(CPU)
INSTRUCTIONS = "avx512" if "avx512" in CPU.features else "avx2"
# None, one, few, and both sides of where this machine's kernels change branches.
CROSSOVERS = {rows[INSTRUCTIONS] for rows in crossovers.FEW_ROWS.values() if INSTRUCTIONS in rows}
# Generated tiles have 1 to 16 rows, and several of 12 at most.
ROWS = sorted({0, 1, 2, 3, 5, 16, 17, 29, *CROSSOVERS, *(rows + 1 for rows in CROSSOVERS)})
# Odd, less than a block of rows of the packed product, and whole blocks with rows that remain.
SHAPES = ((97, 160), (16, 64), (144, 256))
GENERATED_SHAPES = ((16, 256), (497, 256), (144, 96))  # a block, one with missing outputs, no multiple of groups
ONEDNN_SHAPES = ((1000, 1088), (1088, 1000))  # smaller ones are refused
BITS = range(2, 9)
GROUPS = (None, 32, 64, 128)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def storages(kernel: LinearKernel) -> list[tuple[int, int | None, int]]:
    """(bits, group size, activation bits) of everything that a storage can hold; of references a part."""
    if kernel.storage == dense.NAME:
        return [(16, None, 16)]
    if kernel.storage == int8.NAME:
        return [(8, None, 8), (8, None, 16), (8, 32, 8)]
    if kernel.storage == fp8.NAME:
        return [(8, None, 16), (8, None, 8)]
    if kernel.storage == packed_int.NAME and kernel.name == "cpu-vnni":
        return [(bits, group, 8) for bits in (4, 8) for group in GROUPS]
    if kernel.storage == packed_int.NAME and kernel.name == REFERENCE:
        return [(4, 32, 16), (4, 64, 8), (3, None, 16), (3, None, 8), (7, 32, 8), (8, None, 16)]
    return list(itertools.product(BITS, GROUPS, (16, 8))) if kernel.storage == packed_int.NAME else []


def stored(problem: LinearProblem, generator: torch.Generator) -> tuple[Tensors, np.ndarray]:
    """Return random stored tensors and the weight they mean, in float64."""
    shape = (problem.out_features, problem.in_features)
    if problem.storage == dense.NAME:
        weight = torch.randn(shape, generator=generator, dtype=torch.float32).to(problem.dtype)
        return dense.encode(weight), weight.double().numpy()
    if problem.storage == fp8.NAME:
        floats = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = (torch.rand(shape[0], 1, generator=generator) / 100).to(torch.bfloat16)
        return fp8.encode(floats, scale), (floats.double() * scale.double()).numpy()
    half = 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    groups = 1 if problem.group_size is None else problem.in_features // problem.group_size
    # Weights of about 1, so that float16 holds the products.
    scale = ((torch.rand(problem.out_features, groups, generator=generator) + 0.5) / half).to(torch.bfloat16)
    wide = codes.double().view(shape[0], groups, -1) * scale.double()[..., None]
    tensors = (
        int8.encode(codes, scale) if problem.storage == int8.NAME else packed_int.encode(codes, scale, problem.bits)
    )
    return tensors, wide.view(shape).numpy()


def activations(rows: int, problem: LinearProblem, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, in] in float64 and what int8 quantisation per row, or per group of a row, makes of it.

    Whole codes times a power of two with the extreme at -127.5 steps, which becomes -127: the oracle needs no rounding
    rule of its own, and 16-bit floats hold every value. In 8-bit floats they are exact, with an extreme of 448.
    """
    if problem.storage == fp8.NAME:
        floats = (torch.randn(rows, problem.in_features, generator=generator) * 100).clamp(-448, 448)
        exact = floats.to(torch.float8_e4m3fn).double()
        exact[:, :1] = 448.0
        exact *= 2.0 ** torch.randint(-6, 3, (rows, 1), generator=generator).double()
        return exact, exact
    group_size = problem.group_size or problem.in_features
    shape = (rows, problem.in_features // group_size, group_size)
    codes = torch.randint(-127, 128, shape, generator=generator).double()
    scales = 2.0 ** torch.randint(-6, 3, (*shape[:2], 1), generator=generator).double()
    codes[..., 0] = -127.5
    x = codes * scales
    codes[..., 0] = -127
    return x.flatten(1), (codes * scales).flatten(1)


def problems() -> list[tuple[LinearKernel, LinearProblem]]:
    found = []
    for kernel in LINEAR:
        shapes = {"cpu-onednn": ONEDNN_SHAPES, "cpu-vnni": GENERATED_SHAPES}.get(kernel.name, SHAPES)
        for (bits, group_size, activation_bits), shape, dtype in itertools.product(storages(kernel), shapes, DTYPES):
            if group_size is not None and shape[1] % group_size:
                continue
            problem = LinearProblem(
                storage=kernel.storage,
                bits=bits,
                group_size=group_size,
                activation_bits=activation_bits,
                out_features=shape[0],
                in_features=shape[1],
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
        x, quantised = activations(rows, problem, generator)
        y = kernel.run(x.to(problem.dtype), packed, problem)
        assert y.dtype == problem.dtype
        assert y.shape == (rows, problem.out_features)
        seen = quantised if problem.activation_bits == 8 else x
        expected = seen.numpy() @ weight.T
        assert (np.abs(y.double().numpy() - expected) <= bound(problem, seen, weight, expected)).all(), f"{rows} rows"


def bound(problem: LinearProblem, x: torch.Tensor, weight: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How far a kernel may be off: rounding, and nothing else.

    A sum of n products is off by at most n eps sum|x||w| in the type it is summed in (Higham, Accuracy and Stability,
    3.1). A reference may also round the decoded weight to the compute type, and a kernel its result, twice where a
    product of codes is rounded before scales are applied: half an eps each time. Codes of more than 4 bits may be two
    products, each rounded: w = u + l with |l| at most half the upper digit's step, s 2^(bits - 4) / 2, and so
    |x u| + |x l| at most |x w| + |x| s 2^(bits - 4). Scales are at most 1.5 / 2^(bits - 1).
    """
    sum_eps = torch.finfo(torch.promote_types(problem.dtype, torch.float32)).eps
    eps = torch.finfo(problem.dtype).eps
    magnitude = x.abs().numpy() @ np.abs(weight).T
    if problem.storage == packed_int.NAME and problem.bits > 4:
        magnitude = magnitude + x.abs().sum(-1, keepdim=True).numpy() * 1.5 / 2 ** (problem.bits - 1) * 2 ** (
            problem.bits - 4
        )
    subnormal = torch.finfo(problem.dtype).tiny * eps
    return (problem.in_features * sum_eps + 1.5 * eps) * magnitude + 1.5 * eps * np.abs(expected) + subnormal


@pytest.mark.parametrize(
    ("kernel", "problem"), [(kernel, problem) for kernel, problem in problems() if kernel.rows], ids=name
)
def test_rows_are_the_decoded_weights(kernel: LinearKernel, problem: LinearProblem) -> None:
    assert kernel.rows is not None
    generator = torch.Generator().manual_seed(problem.in_features * 13 + problem.bits)
    tensors, weight = stored(problem, generator)
    packed = kernel.pack(tensors, problem, CPU)
    last = problem.out_features - 1
    for ids in ([], [last], [0, last, 3, 3, *range(last, 0, -7)]):
        rows = kernel.rows(torch.tensor(ids, dtype=torch.int64), packed, problem)
        assert rows.dtype == problem.dtype
        # A code times a bfloat16 scale is exact in float32, so that the type of the problem is rounded to once.
        assert torch.equal(rows, torch.from_numpy(weight[ids]).view(-1, problem.in_features).to(problem.dtype))


def kept_bytes(packed: Tensors) -> int:
    """Bytes of what a layer keeps; of a tensor in oneDNN's own layout what it takes, padding included."""
    return sum(
        torch.ops.mkldnn._nbytes(tensor) if tensor.layout == torch._mkldnn else tensor.nbytes
        for tensor in packed.values()
    )


@pytest.mark.parametrize("kernel", LINEAR, ids=name)
@pytest.mark.parametrize("shape", [(272, 1024), (1000, 1088)], ids=lambda shape: "x".join(map(str, shape)))
def test_a_layer_keeps_what_is_stored_and_a_tenth_at_most(kernel: LinearKernel, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    for (bits, group_size, activation_bits), dtype in itertools.product(storages(kernel), DTYPES):
        problem = LinearProblem(
            storage=kernel.storage,
            bits=bits,
            group_size=group_size,
            activation_bits=activation_bits,
            out_features=shape[0],
            in_features=shape[1],
            dtype=dtype,
        )
        if (group_size is None or shape[1] % group_size == 0) and kernel.why_not(problem, CPU) is None:
            tensors, _ = stored(problem, generator)
            size = sum(tensor.nbytes for tensor in tensors.values())
            kept = kept_bytes(kernel.pack(tensors, problem, CPU))
            # What describes the shape is stored, and need not be kept.
            assert size - 16 <= kept <= 1.1 * size, name(problem)


def test_a_second_copy_would_be_counted() -> None:
    """A weight stored in 16 bits and kept in 32 breaks the bound above."""
    kernel = next(kernel for kernel in LINEAR if kernel.storage == dense.NAME and kernel.name == REFERENCE)
    problem = LinearProblem(
        storage=dense.NAME,
        bits=16,
        group_size=None,
        activation_bits=16,
        out_features=16,
        in_features=64,
        dtype=torch.float32,
    )
    tensors = {"weight": torch.zeros(16, 64, dtype=torch.bfloat16)}
    assert kept_bytes(kernel.pack(tensors, problem, CPU)) > 1.1 * tensors["weight"].nbytes


def test_every_kernel_is_exercised_or_refuses_this_machine() -> None:
    tested = {kernel.name + kernel.storage for kernel, _ in problems()}
    machine_bound = {
        "cpu-onednnint8",
        "cpu-wideneddense",
        "cpu-nibblespacked_int",
        "cpu-vnniint8",
        "cpu-vnnipacked_int",
    }
    elsewhere = {"referencemask"}
    assert {kernel.name + kernel.storage for kernel in LINEAR} - tested <= machine_bound | elsewhere


def test_reference_is_last_and_never_refuses() -> None:
    for storage in {kernel.storage for kernel in LINEAR}:
        kernels = [kernel for kernel in LINEAR if kernel.storage == storage]
        for bits, group_size, activation_bits in storages(kernels[-1]):
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
            assert kernels[-1].name == REFERENCE == chosen.name
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
    x, _ = activations(1, problem, generator)
    y = kernel.run(x.float(), kernel.pack(tensors, problem, CPU), problem)
    difference = np.abs(y.double().numpy() - x.numpy() @ weight.T)
    bound = (64 * torch.finfo(torch.float32).eps * 4) * (x.abs().numpy() @ np.abs(weight).T)
    assert (difference > bound).any()
