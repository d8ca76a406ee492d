"""Keys and values in eight bits: what is stored, against rounding done by hand, and attention over it in float64."""

import numpy as np
import pytest
import torch
from test_attention_kernels import ATTENTION, BLOCK_SIZE, CPU, SEQUENCES, oracle

from pressd.runtime.kernels.activation_codes import FP8
from pressd.runtime.kernels.attention import cpu, reference
from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, KVFormat, QueryRun
from pressd.runtime.kernels.attention.kv_codes import decode, encode
from pressd.runtime.kernels.registry import AttentionKernel
from pressd.runtime.kernels.rotary.reference import write

HEADS = ((4, 2, 8), (3, 3, 5), (8, 1, 4), (7, 1, 96), (4, 1, 13))
WINDOWS = (None, 1, 7)
FORMATS = {
    "int8": KVFormat(dtype=torch.int8, scales="token"),
    "int8 of a layer": KVFormat(dtype=torch.int8, scales="layer"),
    "fp8": KVFormat(dtype=FP8, scales="token"),
    "fp8 of a layer": KVFormat(dtype=FP8, scales="layer"),
    "bf16": KVFormat(dtype=torch.bfloat16),
}
# Of keys and of values: below the largest of them over the largest code, so that some saturate.
LAYER_SCALES = {torch.int8: (0.02, 0.017), FP8: (0.0048828125, 0.00413)}
NUM_BLOCKS = 40


def e4m3(x: np.ndarray) -> np.ndarray:
    """Round to 4 bits of exponent and 3 of mantissa, the largest 448 and the smallest steps 2^-9; half to even."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def bf16(x: np.ndarray) -> np.ndarray:
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    return np.rint(x / step) * step


def rounded(x: np.ndarray, stored: KVFormat, scale: float | None, computed: type = np.float32) -> np.ndarray:
    """What x [..., head_dim] comes back as; divisions are those of the type that layers compute in, or of float32."""
    if stored.scales == "none":
        return bf16(x)
    largest = 127.5 if stored.dtype == torch.int8 else 448.0
    wide = x.astype(computed)
    own = np.abs(wide).max(-1, keepdims=True) / computed(largest) if scale is None else computed(scale)
    scaled = wide / own
    if stored.dtype == torch.int8:
        codes = np.clip(np.rint(scaled), -127, 127).astype(np.float64)
    else:
        codes = e4m3(np.clip(scaled, -448, 448).astype(np.float32).astype(np.float64))  # by way of float32, in any type
    return codes * np.float32(own).astype(np.float64)


def scales_of(stored: KVFormat, shape: tuple[int, ...]) -> list[torch.Tensor | None]:
    """Scales as a pool of this shape has them; those of tokens are NaN."""
    if stored.scales == "layer":
        assert stored.dtype is not None
        return [torch.tensor([scale]) for scale in LAYER_SCALES[stored.dtype]]
    return [torch.full(shape[:-1], torch.nan) if stored.scales == "token" else None for _ in range(2)]


def poisoned(stored: KVFormat, shape: tuple[int, ...]) -> torch.Tensor:
    """Blocks in which nothing is a number until it is written."""
    assert stored.dtype is not None
    if stored.dtype == torch.bfloat16:
        return torch.full(shape, torch.nan, dtype=stored.dtype)
    return torch.full(shape, 0x80 if stored.dtype == torch.int8 else 0x7F, dtype=torch.uint8).view(stored.dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_a_hand_rounds_to(name: str) -> None:
    stored = FORMATS[name]
    rows = torch.randn(9, 3, 33, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 2, 9)[:, None, None]
    rows[2, 1, 4:] = rows[3, 0, :] = 0.0
    rows[2, 0, :5] = torch.tensor([1.0, 0.5, 2.0**-7, 2.0**-8, 3 * 2.0**-9]) * rows[2, 0].abs().max()
    blocks = poisoned(stored, (4, 3, 3, 33))
    own, _ = scales_of(stored, tuple(blocks.shape))
    slots = torch.tensor([11, 0, 3, 4, 7, 1, 8, 2, 10])
    write(blocks, slots, rows, own)
    flat = None if own is None else own if own.shape == (1,) else own.flatten(0, 1)
    found = decode(blocks.flatten(0, 1), flat, torch.float64)
    scale = None if own is None or own.shape != (1,) else own.item()
    kept = rows.double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(rounded(kept, stored, scale))  # a row of zeros
    np.testing.assert_array_equal(found[slots].numpy(), expected)
    untouched = sorted(set(range(12)) - set(slots.tolist()))
    assert bool(found[untouched].isnan().all()), "a slot that nothing was written to"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("contiguous", [True, False], ids=["views", "gathers"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kernel", [reference.KERNEL, cpu.KERNEL], ids=lambda kernel: kernel.name)
def test_equals_float64(
    kernel: AttentionKernel,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    name: str,
    contiguous: bool,
    window: int | None,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    stored = FORMATS[name]
    problem = AttentionProblem(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, window=window, kv=stored
    )
    if dtype == torch.float64 and kernel is cpu.KERNEL:
        assert kernel.why_not(problem, CPU) == "PyTorch has no fused kernel for torch.float64"
        return
    assert kernel.why_not(problem, CPU) is None
    generator = torch.Generator().manual_seed(7)
    free = list(range(NUM_BLOCKS)) if contiguous else torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    pools, scales = [poisoned(stored, shape) for _ in range(2)], scales_of(stored, shape)
    runs, queries, expected, start, moved = [], [], [], 0, 0.0
    for length, kv_length in SEQUENCES:
        table = tuple(free.pop(0) for _ in range(-(-kv_length // BLOCK_SIZE)))
        first = 0 if window is None else max(0, kv_length - length + 1 - window)
        positions = range(first, kv_length)  # what no window reaches is not written, and not to be read
        slots = torch.tensor([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions])
        exact = []
        for pool, own in zip(pools, scales, strict=True):
            rows = torch.randn(kv_length, num_kv_heads, head_dim, generator=generator).bfloat16().to(dtype)
            write(pool, slots, rows[first:], own)
            scale = None if own is None or own.shape != (1,) else own.item()
            computed = np.float64 if dtype == torch.float64 else np.float32
            exact.append(rounded(rows.double().numpy(), stored, scale, computed))
        query = torch.randn(length, num_heads, head_dim, generator=generator).to(dtype)
        found = table[0] if contiguous else None
        runs.append(QueryRun(start=start, length=length, kv_length=kv_length, block_table=table, first_block=found))
        queries.append(query)
        group = num_heads // num_kv_heads
        expected.append(oracle(query.double().numpy(), *exact, group, window))
        products = np.einsum("qhd,khd->qkh", np.abs(query.double().numpy()), np.abs(exact[0]).repeat(group, 1))
        moved = max(moved, products.max() / np.sqrt(head_dim))
        start += length
    batch = AttentionBatch(runs=tuple(runs), slot_mapping=torch.empty(0, dtype=torch.int64))
    output = kernel.run(torch.cat(queries), *pools, batch, problem, *scales).double().numpy()
    # Over keys and values of the compute type the result is within 24 eps (test_attention_kernels.py). Here they round
    # to it once more, by eps / 2 each: values below 5 move the result by 2.5 eps, and keys move a score by the
    # products' sizes / sqrt(head_dim) times eps / 2, all weights by twice that, and the result by that times 5.
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(output, np.concatenate(expected), rtol=0, atol=(24 + 2.5 + 5 * moved) * eps)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bf16"])
def test_no_number_stays_none(name: str) -> None:
    """A sequence whose keys are NaN has to be found out, not to go on with others."""
    stored = FORMATS[name]
    assert stored.dtype is not None
    rows = torch.ones(3, 2, 4, dtype=torch.float16)
    rows[1, 0, 2] = torch.nan
    codes, own = encode(rows, stored.dtype, torch.tensor([0.1]) if stored.scales == "layer" else None)
    found = decode(codes, torch.tensor([0.1]) if own is None else own, torch.float16).isnan()
    assert bool(found[1, 0].any())
    assert not bool(found[[0, 2]].any())
    assert not bool(found[1, 1].any())


@pytest.mark.parametrize("kernel", ATTENTION, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", FORMATS)
def test_who_reads_what_is_said_in_advance(kernel: AttentionKernel, name: str) -> None:
    problem = AttentionProblem(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32, kv=FORMATS[name])
    reason = kernel.why_not(problem, CPU)
    if kernel.is_generated:
        stored = str(FORMATS[name].dtype).removeprefix("torch.")
        assert reason == f"reads keys and values in float32, as it computes, not in {stored}"
    else:
        assert reason is None


def test_a_pool_in_the_compute_type_is_no_other_format() -> None:
    problem = AttentionProblem(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16, kv=FORMATS["bf16"])
    assert problem.why_not_as_computed() is None
    assert problem.kv_token_bytes == 2 * 2 * 32 * 2
