"""Attention of many new tokens of each sequence over keys and values in blocks: prompts, whole or in chunks."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from pressd.runtime.kernels.attention.triton_tiles import pool_rows, softmax_step


@triton.jit(do_not_specialize_on_alignment=["starts", "lengths", "kv_lengths", "table_rows"])
def attend_many(
    query,
    keys,
    values,
    block_tables,
    starts,
    lengths,
    kv_lengths,
    table_rows,
    out,
    stride_token,
    stride_head,
    max_blocks,
    scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Programs: tiles of the longest sequence's tokens, the last first; then KV heads; then sequences.

    A tile has the rows of all heads that share keys, of ROWS // GROUP tokens.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths + sequence)
    kv_length = tl.load(kv_lengths + sequence)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if first < length:
        row = tl.arange(0, ROWS)
        token = first + row // GROUP
        is_row = (row < TOKENS * GROUP) & (token < length)
        dim = tl.arange(0, DIM)
        is_dim = dim < HEAD_DIM
        own = tl.load(starts + sequence).to(tl.int64) + token
        head = kv_head * GROUP + row % GROUP
        query_ptrs = query + own[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]
        q = tl.load(query_ptrs, mask=is_row[:, None] & is_dim[None, :], other=0.0)
        table = block_tables + tl.load(table_rows + sequence).to(tl.int64) * max_blocks
        at = kv_length - length + token
        begin = kv_length - length + first  # the position of the tile's first token
        end = tl.minimum(begin + TOKENS, kv_length)
        lowest = tl.maximum(begin + 1 - WINDOW, 0) if WINDOW else 0
        m = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, DIM), dtype=tl.float32)
        # Up to here every row sees every position, unless a window ends within it.
        whole = lowest // TILE * TILE if WINDOW else begin // TILE * TILE
        for base in range(lowest // TILE * TILE, whole, TILE):
            position = base + tl.arange(0, TILE)
            rows = pool_rows(table, position, position >= 0, kv_head, BLOCK_SIZE, KV_HEADS)
            k = tl.load(keys + rows[None, :] * HEAD_DIM + dim[:, None], mask=is_dim[:, None], other=0.0)
            v = tl.load(values + rows[:, None] * HEAD_DIM + dim[None, :], mask=is_dim[None, :], other=0.0)
            scores = tl.dot(q, k.to(DTYPE)) * scale
            m, total, acc = softmax_step(scores, v.to(DTYPE), m, total, acc)
        for base in range(whole, end, TILE):
            position = base + tl.arange(0, TILE)
            is_position = (position < end) & (position >= lowest)
            rows = pool_rows(table, position, is_position, kv_head, BLOCK_SIZE, KV_HEADS)
            k = tl.load(
                keys + rows[None, :] * HEAD_DIM + dim[:, None], mask=is_position[None, :] & is_dim[:, None], other=0.0
            )
            v = tl.load(
                values + rows[:, None] * HEAD_DIM + dim[None, :], mask=is_position[:, None] & is_dim[None, :], other=0.0
            )
            scores = tl.dot(q, k.to(DTYPE)) * scale
            sees = is_position[None, :] & (position[None, :] <= at[:, None])
            if WINDOW:
                sees = sees & (position[None, :] > at[:, None] - WINDOW)
            scores = tl.where(sees, scores, float("-inf"))
            m, total, acc = softmax_step(scores, v.to(DTYPE), m, total, acc)
        out_ptrs = out + (own[:, None] * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + dim[None, :]
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: a row that is none
        tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])
