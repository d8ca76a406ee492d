"""Zero points, scales of blocks, and stored scales of activations, against float64; who does not serve them refuses."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pressd.runtime.kernels import crossovers
from pressd.runtime.kernels.catalogue import linear_kernels, triton_modules
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors, describe_device

CPU = describe_device(torch.device("cpu"))
HOPPER = Device(torch_device=torch.device("cuda"), features=frozenset({"sm_90"}))
LINEAR = linear_kernels(CPU)
INSTRUCTIONS = "avx512" if "avx512" in CPU.features else "avx2"
# None, one, few, and both sides of where this machine's kernels change branches.
CROSSOVERS = {rows[INSTRUCTIONS] for rows in crossovers.FEW_ROWS.values() if INSTRUCTIONS in rows}
ROWS = sorted({0, 1, 3, 17, *CROSSOVERS, *(rows + 1 for rows in CROSSOVERS)})
SHAPES = ((97, 160), (16, 64), (144, 256), (1088, 1024))  # the last is what oneDNN takes
BLOCKS = ((97, 128), (256, 384), (300, 256))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PLAIN = LinearProblem(
    storage=packed_int.NAME,
    bits=4,
    group_size=32,
    activation_bits=16,
    out_features=64,
    in_features=128,
    dtype=torch.float32,
)
SERVED = {
    "zero points": {(packed_int.NAME, "cpu-nibbles"), (packed_int.NAME, REFERENCE)},
    "static int8": {(int8.NAME, "cpu-onednn"), (int8.NAME, "cpu-bytes"), (int8.NAME, REFERENCE)},
    "static fp8": {(fp8.NAME, REFERENCE)},
    "blocks": {(fp8.NAME, REFERENCE)},
}


def variants() -> list[tuple[str, LinearProblem]]:
    """Every kind of problem, over odd shapes and compute types."""
    found = []
    for bits, group, shape, dtype in itertools.product(range(2, 9), (None, 32, 64, 128), SHAPES[:3], DTYPES):
        if group is None or shape[1] % group == 0:
            changes = {"bits": bits, "group_size": group, "symmetric": False}
            found.append(("zero points", _sized(shape, dtype, **changes)))
    eight: dict[str, object] = {"bits": 8, "group_size": None, "activation_bits": 8}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for name, storage in (("static int8", int8.NAME), ("static fp8", fp8.NAME)):
            found.append((name, _sized(shape, dtype, storage=storage, static_activations=True, **eight)))
    for shape, dtype in itertools.product(BLOCKS, DTYPES):
        found.append(("blocks", _sized(shape, dtype, storage=fp8.NAME, block_size=128, **eight)))
    return found


def _sized(shape: tuple[int, int], dtype: torch.dtype, **changes: object) -> LinearProblem:
    return dataclasses.replace(
        PLAIN,
        out_features=shape[0],
        in_features=shape[1],
        dtype=dtype,
        **changes,  # type: ignore[arg-type]
    )


def stored(problem: LinearProblem, generator: torch.Generator) -> tuple[Tensors, np.ndarray, np.ndarray]:
    """Return random stored tensors, the weight they mean in float64, and what its parts are in magnitude.

    The latter is |code| x scale + |zero point| x scale, which partial sums may come to.
    """
    shape = (problem.out_features, problem.in_features)
    input_scale = torch.tensor([0.0625], dtype=torch.bfloat16) if problem.static_activations else None
    if problem.storage == fp8.NAME:
        codes = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        block = problem.block_size
        groups = (shape[0], 1) if block is None else (-(-shape[0] // block), shape[1] // block)
        scale = (torch.rand(groups, generator=generator) / 100).to(torch.bfloat16)
        wide = scale.double().repeat_interleave(block or 1, 0)[: shape[0]].repeat_interleave(shape[1] // groups[1], 1)
        weight = (codes.double() * wide).numpy()
        return fp8.encode(codes, scale, input_scale), weight, np.abs(weight)
    half = 1 << (problem.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    size = problem.group_size or problem.in_features
    groups = (shape[0], shape[1] // size)
    scale = ((torch.rand(groups, generator=generator) + 0.5) / half).to(torch.bfloat16)
    wide = scale.double().repeat_interleave(size, 1)
    if problem.symmetric:
        weight = (codes.double() * wide).numpy()
        return int8.encode(codes, scale, input_scale), weight, np.abs(weight)
    zero = torch.randint(-half, half, groups, generator=generator, dtype=torch.int8)
    zeros = zero.double().repeat_interleave(size, 1)
    weight = ((codes.double() - zeros) * wide).numpy()
    return (
        packed_int.encode(codes, scale, problem.bits, zero),
        weight,
        ((codes.double().abs() + zeros.abs()) * wide).numpy(),
    )


def activations(rows: int, problem: LinearProblem, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, in] in float64, exact in 16 bits, and what is left of it once it is rounded.

    By a stored scale of 1/16: whole steps, of which those beyond the largest code are clamped.
    """
    shape = (rows, problem.in_features)
    if problem.activation_bits == 16:
        x = torch.randn(shape, generator=generator).to(torch.bfloat16).double()
        return x, x
    if problem.block_size is not None:
        x = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).double()
        x[:, ::128] = 448.0  # the extreme of each group is the largest code: its scale is a power of two
        x *= 2.0 ** torch.randint(-6, 3, (rows, shape[1] // 128), generator=generator).double().repeat_interleave(
            128, 1
        )
        return x, x
    steps = torch.randint(-140, 140, shape, generator=generator).double()
    if problem.storage == int8.NAME:
        return steps / 16, steps.clamp(-128, 127) / 16
    steps = steps.to(torch.float8_e4m3fn).double() * 4
    return steps / 16, steps.clamp(-448, 448) / 16


def bound(
    problem: LinearProblem, x: torch.Tensor, weight: np.ndarray, parts: np.ndarray, expected: np.ndarray
) -> np.ndarray:
    """How far a kernel may be off: as test_linear_kernels.bound, where `parts` may be summed apart.

    Codes of more than 4 bits are two products, whose digits differ by 2^(bits - 4) steps; with zero points, the product
    of 4 bits or fewer takes zero point x scale rounded to bfloat16, half an eps of it.
    """
    sum_eps = torch.finfo(torch.promote_types(problem.dtype, torch.float32)).eps
    eps = torch.finfo(problem.dtype).eps
    sizes = x.abs().numpy()
    magnitude = sizes @ np.abs(weight).T
    if problem.storage == packed_int.NAME and problem.bits > 4:
        magnitude = magnitude + sizes.sum(-1, keepdims=True) * 1.5 / 2 ** (problem.bits - 1) * 2 ** (problem.bits - 4)
    subnormal = torch.finfo(problem.dtype).tiny * eps
    sums = sizes @ parts.T
    rounded_zero = 0.5 * eps * sums if problem.dtype == torch.bfloat16 and not problem.symmetric else 0.0
    total: np.ndarray = problem.in_features * sum_eps * (magnitude + sums) + 1.5 * eps * magnitude + rounded_zero
    return total + 1.5 * eps * np.abs(expected) + subnormal


def served() -> list[tuple[LinearKernel, LinearProblem]]:
    return [
        (kernel, problem)
        for _, problem in variants()
        for kernel in LINEAR
        if kernel.storage == problem.storage and kernel.why_not(problem, CPU) is None
    ]


def name(value: object) -> str:
    if isinstance(value, LinearProblem):
        kind = f"w{value.bits}a{value.activation_bits}g{value.group_size or value.block_size}"
        return f"{kind}-{value.out_features}x{value.in_features}-{str(value.dtype).removeprefix('torch.')}"
    assert isinstance(value, LinearKernel)
    return f"{value.storage}-{value.name}"


@pytest.mark.parametrize(("kernel", "problem"), served(), ids=name)
def test_equals_float64(kernel: LinearKernel, problem: LinearProblem) -> None:
    generator = torch.Generator().manual_seed(problem.out_features * 1009 + problem.bits)
    tensors, weight, parts = stored(problem, generator)
    packed = kernel.pack(tensors, problem, CPU)
    size = sum(tensor.nbytes for suffix, tensor in tensors.items() if suffix != "weight_shape")
    if "prepacked" not in packed and problem.out_features % 64 == 0:
        assert sum(tensor.nbytes for tensor in packed.values()) <= 1.1 * size
    for rows in ROWS:
        x, seen = activations(rows, problem, generator)
        y = kernel.run(x.to(problem.dtype), packed, problem)
        assert (y.dtype, y.shape) == (problem.dtype, (rows, problem.out_features))
        expected = seen.numpy() @ weight.T
        off = np.abs(y.double().numpy() - expected)
        assert (off <= bound(problem, seen, weight, parts, expected)).all(), f"{rows} rows"
    if kernel.rows is not None:
        last = problem.out_features - 1
        for ids in ([], [last], [0, last, 3, 3, *range(last, 0, -7)]):
            decoded = kernel.rows(torch.tensor(ids, dtype=torch.int64), packed, problem)
            # A difference of codes times a bfloat16 scale is exact in float32: the problem's type is rounded to once.
            exact = torch.from_numpy(weight[ids]).view(-1, problem.in_features).to(problem.dtype)
            assert torch.equal(decoded, exact)


@pytest.mark.parametrize("kind", SERVED)
def test_every_other_kernel_refuses(kind: str) -> None:
    # A shape and a type that nobody refuses for another reason.
    changes = {"out_features": 1152, "in_features": 1024, "dtype": torch.bfloat16}
    problem = next(problem for name, problem in variants() if name == kind)
    problem = dataclasses.replace(problem, **changes, group_size=128 if kind == "zero points" else None, bits=8)
    for bits in (4, 8) if kind == "zero points" else (8,):
        special = dataclasses.replace(problem, bits=bits)
        plain = dataclasses.replace(special, symmetric=True, block_size=None, static_activations=False)
        for kernel, device in _kernels(problem.storage):
            own = (kernel.storage, kernel.name)
            reason = kernel.why_not(special, device)
            if own in SERVED[kind]:
                assert reason == kernel.why_not(plain, device), own
            else:
                assert reason is not None, own
                if kernel.why_not(plain, device) is None:
                    assert any(word in reason for word in ("zero points", "blocks of 128", "stored scale")), reason
            if kind != "blocks" and kernel.codes is not None and reason is None:
                assert kernel.codes(special) is None


def _kernels(storage: str) -> list[tuple[LinearKernel, Device]]:
    on_gpu = [module.KERNEL for module in triton_modules() if isinstance(getattr(module, "KERNEL", None), LinearKernel)]
    kernels = [*((kernel, CPU) for kernel in LINEAR), *((kernel, HOPPER) for kernel in on_gpu)]
    assert len(on_gpu) == 3
    return [(kernel, device) for kernel, device in kernels if kernel.storage == storage]


def test_a_special_problem_reaches_fast_kernels_here() -> None:
    """What is served beside the reference is served: zero points by nibbles, static int8 by bytes."""
    tested = {(kernel.storage, kernel.name) for kernel, problem in served() if kernel.name != REFERENCE}
    machine_bound = {(packed_int.NAME, "cpu-nibbles"), (int8.NAME, "cpu-onednn")}
    assert tested - machine_bound == {(int8.NAME, "cpu-bytes")}


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_zero_point_that_is_off_by_one_is_noticed(bits: int) -> None:
    problem = _sized((144, 256), torch.float32, bits=bits, symmetric=False)
    generator = torch.Generator().manual_seed(1)
    tensors, weight, parts = stored(problem, generator)
    tensors["weight_zero_point"][0, 2] ^= 1
    for kernel in LINEAR:
        if kernel.storage == problem.storage and kernel.why_not(problem, CPU) is None:
            x, _ = activations(3, problem, generator)
            expected = x.numpy() @ weight.T
            y = kernel.run(x.float(), kernel.pack(tensors, problem, CPU), problem)
            off = np.abs(y.double().numpy() - expected)
            assert (off[:, 0] > bound(problem, x, weight, parts, expected)[:, 0]).all()
            assert (off[:, 1:] <= bound(problem, x, weight, parts, expected)[:, 1:]).all()


ONE_OF_EACH = [
    (kernel, problem)
    for kernel, problem in served()
    if problem.dtype == torch.float32 and (problem.bits, problem.group_size) in ((4, 32), (8, None))
]


@pytest.mark.parametrize(("kernel", "problem"), ONE_OF_EACH, ids=name)
def test_what_is_not_a_number_stays_one(kernel: LinearKernel, problem: LinearProblem) -> None:
    generator = torch.Generator().manual_seed(2)
    packed = kernel.pack(stored(problem, generator)[0], problem, CPU)
    x, _ = activations(2, problem, generator)
    x[1, 7] = float("nan")
    y = kernel.run(x.float(), packed, problem)
    assert not y[0].isnan().any()
    assert y[1].isnan().all()
