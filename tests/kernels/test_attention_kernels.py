"""Every registered attention kernel against float64 numpy, over views, gathers and memory full of NaN."""

import numpy as np
import pytest
import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, QueryRun
from pressd.runtime.kernels.catalogue import ATTENTION
from pressd.runtime.kernels.registry import AttentionKernel, describe_device

CPU = describe_device(torch.device("cpu"))
BLOCK_SIZE = 4
# (new tokens, positions with them): one token, a first chunk, a later chunk, one token alone, tails of blocks.
SEQUENCES = ((1, 9), (7, 7), (5, 18), (1, 1), (2, 5))
HEADS = ((4, 2, 8), (3, 3, 16), (8, 1, 4))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def oracle(query: np.ndarray, keys: np.ndarray, values: np.ndarray, group: int) -> np.ndarray:
    """Attention of query [q, heads, d] over keys, values [k, kv_heads, d], the queries being the last positions."""
    output = np.empty_like(query)
    for row in range(len(query)):
        visible = len(keys) - len(query) + row + 1
        for head in range(query.shape[1]):
            scores = keys[:visible, head // group] @ query[row, head] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            output[row, head] = (weights / weights.sum()) @ values[:visible, head // group]
    return output


@pytest.mark.parametrize("contiguous", [True, False], ids=["views", "gathers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kernel", ATTENTION, ids=lambda kernel: kernel.name)
def test_equals_float64(
    kernel: AttentionKernel, heads: tuple[int, int, int], dtype: torch.dtype, contiguous: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    problem = AttentionProblem(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
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
        expected.append(oracle(query.double().numpy(), keys, values, num_heads // num_kv_heads))
        start += length
    batch = AttentionBatch(runs=tuple(runs), slot_mapping=torch.empty(0, dtype=torch.int64))
    assert batch.num_gathers == (0 if contiguous else len(SEQUENCES))
    output = kernel.run(torch.cat(queries), pool[0], pool[1], batch, problem).double().numpy()
    # The weights sum to 1, so the result is off by the rounding of scores (head_dim eps |q||k|, here below 40) and of
    # values of size below 5, in the compute type; the constant is measured at a third of this bound.
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(output, np.concatenate(expected), rtol=0, atol=24 * eps)
