"""Every registered attention kernel against float64 numpy, over views, gathers and memory full of NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pressd.runtime.kernels.attention import cpu
from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, QueryRun
from pressd.runtime.kernels.catalogue import attention_kernels
from pressd.runtime.kernels.registry import AttentionKernel, describe_device

CPU = describe_device(torch.device("cpu"))
ATTENTION = attention_kernels(CPU)
BLOCK_SIZE = 4
# (new tokens, positions with them): one token, a first chunk, a later chunk, one token alone, tails of blocks; then
# single tokens of equal lengths, three of whose runs lie at equal distances and one does not.
SEQUENCES = ((1, 9), (7, 7), (5, 18), (1, 1), (2, 5), (1, 6), (1, 6), (1, 6), (2, 5), (1, 6))
HEADS = ((4, 2, 8), (3, 3, 16), (8, 1, 4), (6, 2, 32), (7, 1, 96))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Itself only; within a block; a block; across blocks; as long as a sequence (7 and 18), longer than all.
WINDOWS = (None, 1, 3, 4, 6, 7, 18, 100)


def oracle(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, group: int, window: int | None = None
) -> np.ndarray:
    """Attention of query [q, heads, d] over keys, values [k, kv_heads, d], the queries being the last positions."""
    output = np.empty_like(query)
    for row in range(len(query)):
        position = len(keys) - len(query) + row
        visible = [j for j in range(position + 1) if window is None or position - j < window]
        for head in range(query.shape[1]):
            scores = keys[visible, head // group] @ query[row, head] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            output[row, head] = (weights / weights.sum()) @ values[visible, head // group]
    return output


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("contiguous", [True, False], ids=["views", "gathers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kernel", ATTENTION, ids=lambda kernel: kernel.name)
def test_equals_float64(
    kernel: AttentionKernel, heads: tuple[int, int, int], dtype: torch.dtype, contiguous: bool, window: int | None
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    problem = AttentionProblem(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, window=window
    )
    if (reason := kernel.why_not(problem, CPU)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(7)
    free = list(range(40))
    if not contiguous:
        free = torch.randperm(40, generator=generator).tolist()
    pool = torch.full((2, 40, BLOCK_SIZE, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    runs, queries, expected, start = [], [], [], 0
    for length, kv_length in SEQUENCES:
        table = tuple(free.pop(0) for _ in range(-(-kv_length // BLOCK_SIZE)))
        sequence = torch.randn(2, kv_length, num_kv_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for position in range(kv_length):
            pool[:, table[position // BLOCK_SIZE], position % BLOCK_SIZE] = sequence[:, position]
        query = torch.randn(length, num_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        first = table[0] if contiguous else None
        runs.append(QueryRun(start=start, length=length, kv_length=kv_length, block_table=table, first_block=first))
        queries.append(query)
        keys, values = sequence.double().numpy()
        expected.append(oracle(query.double().numpy(), keys, values, num_heads // num_kv_heads, window))
        start += length
    batch = AttentionBatch(runs=tuple(runs), slot_mapping=torch.empty(0, dtype=torch.int64))
    assert batch.num_gathers == (0 if contiguous else len(SEQUENCES))
    output = kernel.run(torch.cat(queries), pool[0], pool[1], batch, problem).double().numpy()
    # The weights sum to 1, so the result is off by the rounding of scores (head_dim eps |q||k|, here below 40) and of
    # values of size below 5, in the compute type; the constant is measured at a third of this bound.
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(output, np.concatenate(expected), rtol=0, atol=24 * eps)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40])
@pytest.mark.parametrize("chunk", [1, 3, 16, 33])
@pytest.mark.parametrize("kernel", ATTENTION, ids=lambda kernel: kernel.name)
def test_a_sequence_in_chunks_equals_it_whole(kernel: AttentionKernel, chunk: int, window: int | None) -> None:
    """Of one sequence, however it is cut; what lies behind every window of a chunk is NaN and must not be read."""
    length, num_heads, num_kv_heads, head_dim = 33, 4, 1, 32
    problem = AttentionProblem(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=torch.float32, window=window
    )
    generator = torch.Generator().manual_seed(3)
    table = tuple(torch.randperm(9, generator=generator).tolist())
    query = torch.randn(length, num_heads, head_dim, generator=generator)
    sequence = torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
    slots = torch.tensor([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)])
    expected = oracle(query.double().numpy(), *sequence.double().numpy(), num_heads // num_kv_heads, window)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        behind = max(0, start + 1 - window) if window is not None else 0
        pool = torch.full((2, 9 * BLOCK_SIZE, num_kv_heads, head_dim), torch.nan)
        pool[:, slots[behind:stop]] = sequence[:, behind:stop]
        keys, values = pool.unflatten(1, (9, BLOCK_SIZE))
        run = QueryRun(start=0, length=stop - start, kv_length=stop, block_table=table, first_block=None)
        batch = AttentionBatch(runs=(run,), slot_mapping=slots[start:stop])
        output = kernel.run(query[start:stop], keys, values, batch, problem).double().numpy()
        atol = 24 * torch.finfo(torch.float32).eps  # as above
        np.testing.assert_allclose(output, expected[start:stop], rtol=0, atol=atol)


@given(
    runs=st.lists(
        st.tuples(st.integers(1, 2), st.integers(2, 4), st.none() | st.integers(-3, 12)), unique_by=lambda run: run[2]
    )
)
def test_runs_are_stacked_where_one_view_holds_them(runs: list[tuple[int, int, int | None]]) -> None:
    parts = [
        QueryRun(start=place, length=length, kv_length=kv_length, block_table=(), first_block=first)
        for place, (length, kv_length, first) in enumerate(runs)
    ]
    found = cpu.stacks(parts)
    assert sorted(part.start for stack in found for part in stack) == list(range(len(parts)))
    for stack in found:
        if len(stack) > 1:
            assert {(part.length, part.kv_length) for part in stack} == {(1, stack[0].kv_length)}
            firsts = [part.first_block for part in stack]
            assert firsts == list(range(firsts[0], firsts[-1] + 1, firsts[1] - firsts[0]))
    equal = [QueryRun(start=n, length=1, kv_length=5, block_table=(), first_block=3 * n) for n in range(9)]
    assert cpu.stacks(equal) == [equal], "what lies at equal distances is one stack"
