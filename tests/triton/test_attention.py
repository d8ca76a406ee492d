"""Paged attention against the reference in float64, over pools that are NaN wherever no sequence has its own."""

import dataclasses
import random

import pytest
import torch

from pressd.runtime.kernels.attention import reference
from pressd.runtime.kernels.attention import triton as kernels
from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, PagedBatch, QueryRun, page

SHAPES = [(4, 4, 16), (4, 2, 8), (8, 2, 64), (7, 1, 80), (8, 1, 128)]  # heads, KV heads, head dim


class Pool:
    """Keys, values and queries of sequences (new tokens, tokens in all) in scattered blocks."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        problem: AttentionProblem,
        block_size: int,
        seed: int,
        widest: int | None = None,
    ) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        counts = [-(-total // block_size) for _, total in sequences]
        free = rng.sample(range(1, sum(counts) + 3), sum(counts))
        shape = (sum(counts) + 3, block_size, problem.num_kv_heads, problem.head_dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=problem.dtype) for _ in range(2))
        self.runs, start = [], 0
        for (length, total), count in zip(sequences, counts, strict=True):
            blocks = [free.pop() for _ in range(count)]
            first = 0 if problem.window is None else max(0, total - length + 1 - problem.window)
            for position in range(first, total):
                for pool in (self.keys, self.values):
                    row = torch.randn(shape[2:], generator=generator)
                    pool[blocks[position // block_size], position % block_size] = row.to(problem.dtype)
            self.runs.append(
                QueryRun(start=start, length=length, kv_length=total, block_table=blocks, first_block=None)
            )
            start += length
        self.query = torch.randn(start, problem.num_heads, problem.head_dim, generator=generator).to(problem.dtype)
        self.problem, self.block_size = problem, block_size

    def expected(self) -> torch.Tensor:
        batch = AttentionBatch(runs=tuple(self.runs), slot_mapping=torch.empty(0, dtype=torch.int64))
        exact = dataclasses.replace(self.problem, dtype=torch.float64)
        return reference.run(self.query.double(), self.keys.double(), self.values.double(), batch, exact)

    def run(self, device: torch.device) -> torch.Tensor:
        decoding, prompts = page(self.runs, self.block_size, device)
        batch = AttentionBatch(
            runs=(), slot_mapping=torch.empty(0, dtype=torch.int64), decoding=decoding, prompts=prompts
        )
        tensors = (tensor.to(device) for tensor in (self.query, self.keys, self.values))
        return kernels.run(*tensors, batch, self.problem).cpu()


def problem_of(shape: tuple[int, int, int], dtype: torch.dtype, window: int | None = None) -> AttentionProblem:
    return AttentionProblem(num_heads=shape[0], num_kv_heads=shape[1], head_dim=shape[2], dtype=dtype, window=window)


def check(pool: Pool, device: torch.device) -> None:
    """Values are below 5 and outputs are their means: weights round to half an eps each before the second product, as
    does the result; scores of up to head_dim |q| |k| in float32, and exp2 of them, move weights by less than that."""
    error = (pool.run(device).double() - pool.expected()).abs().max()
    assert error < 5 * 2 * torch.finfo(pool.problem.dtype).eps + 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(Pool([(1, 1), (1, 129), (1, 64), (1, 300), (1, 17)], problem_of(shape, dtype), 16, seed=1), device)


@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_decoding_with_a_window(device: torch.device, dtype: torch.dtype, window: int) -> None:
    problem = problem_of((4, 2, 16), dtype, window)
    check(Pool([(1, 1), (3, 300), (1, 200), (16, 140)], problem, 4, seed=window), device)


@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_drafts_and_prompts_in_one_step(device: torch.device, dtype: torch.dtype, block_size: int) -> None:
    problem = problem_of((4, 2, 16), dtype)
    check(Pool([(4, 9), (17, 17), (1, 40), (40, 170), (16, 16), (65, 130)], problem, block_size, seed=3), device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_prompts(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], window: int | None) -> None:
    check(Pool([(70, 70), (17, 150), (33, 100)], problem_of(shape, dtype, window), 16, seed=4), device)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("total", [3, 64, 127, 128, 130, 257, 300])
def test_a_draft_is_verified_with_the_bits_of_decoding(device: torch.device, total: int, window: int | None) -> None:
    # numpy, which computes for the interpreter, rounds some rows of a tile otherwise than others: there, sixteen heads
    # share a key, so that every token has a tile of its own.
    heads, kv_heads = (16, 1) if device.type == "cpu" else (8, 2)
    problem = problem_of((heads, kv_heads, 16), torch.float16, window)
    length = min(6, total)
    pool = Pool([(length, total)], problem, 16, seed=total)
    # One table for all, as the engine's: how long it is decides where splits begin.
    table = torch.zeros(1, 40, dtype=torch.int32)
    table[0, : len(pool.runs[0].block_table)] = torch.tensor(pool.runs[0].block_table)

    def outputs(first: int, count: int) -> torch.Tensor:
        columns = (0, count, total - length + first + count, 0)
        starts, lengths, kv_lengths, rows = (torch.tensor([n], dtype=torch.int32, device=device) for n in columns)
        paged = PagedBatch(
            starts=starts,
            lengths=lengths,
            kv_lengths=kv_lengths,
            rows=rows,
            block_tables=table.to(device),
            max_query=count,
            max_kv=640,
        )
        out = torch.full((count, heads, 16), float("nan"), dtype=torch.float16, device=device)
        query = pool.query[first : first + count].contiguous().to(device)
        kernels.decode(query, pool.keys.to(device), pool.values.to(device), paged, problem, out)
        return out

    together = outputs(0, length)
    for token in range(length):
        assert torch.equal(outputs(token, 1), together[token : token + 1]), token
    assert torch.equal(outputs(1, 2), together[1:3])


def test_empty_places_are_left_alone(device: torch.device) -> None:
    problem = problem_of((4, 2, 16), torch.float16)
    pool = Pool([(1, 30), (1, 200)], problem, 16, seed=9)
    decoding, _ = page(pool.runs, 16, device)
    assert decoding is not None
    nothing = torch.zeros(2, dtype=torch.int32, device=device)
    wider = dataclasses.replace(
        decoding,
        **{name: torch.cat([getattr(decoding, name), nothing]) for name in ("starts", "lengths", "kv_lengths", "rows")},
    )
    out = torch.full((4, 4, 16), float("nan"), dtype=torch.float16, device=device)
    tensors = (tensor.to(device) for tensor in (pool.query, pool.keys, pool.values))
    kernels.decode(*tensors, wider, problem, out)
    assert out[2:].isnan().all()
    assert (out[:2].cpu().double() - pool.expected()).abs().max() < 5 * 2 * torch.finfo(torch.float16).eps + 1e-4


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_keys_and_values_in_eight_bits(device: torch.device, dtype: torch.dtype, kind: str) -> None:
    """The same values in the compute type are the oracle: what eight bits lose was lost before."""
    problem = problem_of((8, 2, 64), dtype)
    pool = Pool([(1, 30), (3, 200), (1, 129)], problem, 16, seed=11)
    stored, scales = [], []
    for name in ("keys", "values"):
        blocks = getattr(pool, name).float()
        if kind == "fp8":
            scale = torch.tensor([0.0625])
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            exact = codes.double() * scale.double()
        else:
            scale = blocks.abs().amax(-1) / 127
            codes = (blocks / scale.unsqueeze(-1)).nan_to_num(100).round().to(torch.int8)
            exact = codes.double() * scale.double().unsqueeze(-1)
        stored.append(codes.to(device))
        scales.append(scale.to(device))
        setattr(pool, name, exact)
    decoding, _ = page(pool.runs, 16, device)
    assert decoding is not None
    out = torch.full(pool.query.shape, float("nan"), dtype=dtype, device=device)
    kernels.decode(pool.query.to(device), *stored, decoding, problem, out, *scales)
    # A value rounds to the type once more than in the other tests, where it is of that type.
    assert (out.cpu().double() - pool.expected()).abs().max() < 5 * 3 * torch.finfo(dtype).eps + 1e-4
