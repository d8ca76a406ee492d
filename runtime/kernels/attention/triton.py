"""Attention over paged keys and values on a GPU: one kernel for sequences with few new tokens, one for prompts."""

# mypy: disable-error-code="no-untyped-call"

import math
from collections.abc import Iterator

import torch
import triton

from pressd.runtime.kernels.attention.batch import MAX_DECODE, AttentionBatch, AttentionProblem, PagedBatch
from pressd.runtime.kernels.attention.triton_decode import ROWS, attend
from pressd.runtime.kernels.attention.triton_prefill import attend_many
from pressd.runtime.kernels.registry import AttentionKernel, Device
from pressd.runtime.kernels.split_sum import split_memory
from pressd.runtime.kernels.triton_device import why_no_triton
from pressd.runtime.kernels.variants import Variant

MAX_HEAD_DIM = 256
# Query rows that share keys and values.
MAX_GROUP = 16
# Positions of a split, by the longest sequence that there can be: few enough programs, and enough of them.
SPLITS = ((32768, 256), (math.inf, 512))
PREFILL_ROWS = 128
# Of a pipeline's stages, block tables take every other one: keys and values have (stages - 2) / 2 tiles on their way.
DECODE_WARPS, DECODE_STAGES = 2, 6
PREFILL_WARPS, PREFILL_STAGES = 8, 3
DECODE_TILE, PREFILL_TILE = 64, 128


def why_not(problem: AttentionProblem, device: Device) -> str | None:
    if reason := why_no_triton(problem.dtype, device) or problem.why_not_as_computed():
        return reason
    if problem.head_dim > MAX_HEAD_DIM or problem.head_dim % 2:
        return f"serves heads of an even number of up to {MAX_HEAD_DIM} dimensions, not {problem.head_dim}"
    if problem.num_heads // problem.num_kv_heads > MAX_GROUP:
        return f"serves up to {MAX_GROUP} queries to a key"
    return None


def run(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    batch: AttentionBatch,
    problem: AttentionProblem,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    assert key_scales is None is value_scales, "codes are refused: prompts are not attended to over them"
    paged = (batch.decoding, batch.prompts)
    assert not batch.runs or any(paged), "sequences are known to the host alone; see batch.page"
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch.decoding is not None:
        decode(query, key_blocks, value_blocks, batch.decoding, problem, out)
    if batch.prompts is not None:
        prefill(query, key_blocks, value_blocks, batch.prompts, problem, out)
    return out


def decode(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    paged: PagedBatch,
    problem: AttentionProblem,
    out: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write what sequences with at most MAX_DECODE new tokens attend to, to their rows of `out`.

    Keys and values may be in 8 bits: with scales of one element for all of them, or with one for each token and head,
    float32 [blocks, block_size, kv_heads].
    """
    assert paged.max_query <= MAX_DECODE
    group, dim = problem.num_heads // problem.num_kv_heads, triton.next_power_of_2(problem.head_dim)
    block_size = key_blocks.size(1)
    length = split_length(paged.block_tables.size(1) * block_size)
    max_splits = triton.cdiv(paged.max_kv, length)
    num_tiles = triton.cdiv(paged.max_query * group, ROWS) * problem.num_kv_heads
    num_places = paged.starts.size(0)
    kept = min(ROWS, triton.next_power_of_2(paged.max_query * group))
    places = num_places * num_tiles * max_splits * kept
    memory, arrived = split_memory(query.device).take(places * (max(16, dim) + 2), num_places * num_tiles)
    scales = 0 if key_scales is None else 1 if key_scales.numel() == 1 else 2
    attend[(max_splits, num_tiles, num_places)](
        query,
        key_blocks,
        value_blocks,
        query if key_scales is None else key_scales,
        query if value_scales is None else value_scales,
        paged.block_tables,
        paged.starts,
        paged.lengths,
        paged.kv_lengths,
        paged.rows,
        out,
        memory,
        memory[places * max(16, dim) :],
        arrived,
        query.stride(0),
        query.stride(1),
        paged.block_tables.size(1),
        max_splits,
        problem.scale * math.log2(math.e),
        WINDOW=problem.window or 0,
        KV_HEADS=problem.num_kv_heads,
        GROUP=group,
        HEAD_DIM=problem.head_dim,
        DIM=max(16, dim),
        BLOCK_SIZE=block_size,
        ROWS=ROWS,
        TILE=tile_of(dim, DECODE_TILE),
        SPLIT=length,
        SCALES=scales,
        KEPT=kept,
        num_warps=DECODE_WARPS,
        num_stages=DECODE_STAGES,
    )


def prefill(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    paged: PagedBatch,
    problem: AttentionProblem,
    out: torch.Tensor,
) -> None:
    """Write what sequences with any number of new tokens attend to, to their rows of `out`."""
    group, dim = problem.num_heads // problem.num_kv_heads, triton.next_power_of_2(problem.head_dim)
    tokens = PREFILL_ROWS // group
    attend_many[(triton.cdiv(paged.max_query, tokens), problem.num_kv_heads, paged.starts.size(0))](
        query,
        key_blocks,
        value_blocks,
        paged.block_tables,
        paged.starts,
        paged.lengths,
        paged.kv_lengths,
        paged.rows,
        out,
        query.stride(0),
        query.stride(1),
        paged.block_tables.size(1),
        problem.scale * math.log2(math.e),
        WINDOW=problem.window or 0,
        KV_HEADS=problem.num_kv_heads,
        GROUP=group,
        HEAD_DIM=problem.head_dim,
        DIM=max(16, dim),
        BLOCK_SIZE=key_blocks.size(1),
        ROWS=PREFILL_ROWS,
        TILE=tile_of(dim, PREFILL_TILE),
        num_warps=PREFILL_WARPS,
        num_stages=PREFILL_STAGES if dim <= 128 else 2,
    )


def split_length(longest: int) -> int:
    """Return the positions of a split where sequences have at most `longest`: the same for all that are served."""
    return next(length for most, length in SPLITS if longest <= most)


def tile_of(dim: int, tile: int) -> int:
    """Return the positions of a tile, of which heads of up to 128 dimensions have `tile`."""
    return tile if dim <= 128 else tile // 2


def variants() -> Iterator[Variant]:
    shared = {"block_tables": "*i32", "starts": "*i32", "lengths": "*i32", "kv_lengths": "*i32", "table_rows": "*i32"}
    numbers = {"stride_token": "i32", "stride_head": "i32", "max_blocks": "i32"}
    for dim in (64, 128):
        for window in (0, 4096):
            shape = {"WINDOW": window, "KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": dim, "DIM": dim, "BLOCK_SIZE": 16}
            for kind, (scales, stored) in {"bf16": (0, "*bf16"), "fp8": (1, "*fp8e4nv"), "int8": (2, "*i8")}.items():
                yield Variant(
                    name=f"attend d{dim} window {window} over {kind}",
                    kernel=attend,
                    signature={"query": "*bf16", "keys": stored, "values": stored}
                    | dict.fromkeys(("key_scales", "value_scales"), "*fp32" if scales else "*bf16")
                    | shared
                    | {"out": "*bf16", "partial_values": "*fp32", "partial_sums": "*fp32", "arrived": "*i32"}
                    | numbers
                    | {"max_splits": "i32", "scale": "fp32"},
                    constants=shape
                    | {"ROWS": ROWS, "TILE": tile_of(dim, DECODE_TILE), "SPLIT": 128, "SCALES": scales, "KEPT": 4},
                    num_warps=DECODE_WARPS,
                    num_stages=DECODE_STAGES,
                    aligned=("stride_token", "stride_head"),
                    oldest=89 if kind == "fp8" else 80,
                )
            yield Variant(
                name=f"attend_many d{dim} window {window}",
                kernel=attend_many,
                signature={"query": "*bf16", "keys": "*bf16", "values": "*bf16"}
                | shared
                | {"out": "*bf16"}
                | numbers
                | {"scale": "fp32"},
                constants=shape | {"ROWS": PREFILL_ROWS, "TILE": tile_of(dim, PREFILL_TILE)},
                num_warps=PREFILL_WARPS,
                num_stages=PREFILL_STAGES,
                aligned=("stride_token", "stride_head"),
            )


KERNEL = AttentionKernel(name="triton", why_not=why_not, run=run, reads_tables=True)
