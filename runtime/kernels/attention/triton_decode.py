"""Attention of few new tokens of each sequence over keys and values in blocks: decoding, and verifying drafts.

The positions of a sequence are divided into splits of a fixed length, from position 0 on, each a program's; the last of
a sequence's programs to arrive puts them together. Where a split begins depends neither on the batch nor on how many
tokens are new, so a token gets the same bits however it is computed. The query rows that share keys, of all new tokens,
make up one tile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from pressd.runtime.kernels.attention.triton_tiles import pool_rows, softmax_step

# Rows of a tile: the fewest of a tensor core, so that a row's sums never depend on how many others there are.
ROWS = 16


# Rows of what one upload brought lie wherever its width puts them: no variant for each way of lying.
@triton.jit(
    do_not_specialize=["max_splits"],
    do_not_specialize_on_alignment=["starts", "lengths", "kv_lengths", "table_rows"],
)
def attend(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    block_tables,
    starts,
    lengths,
    kv_lengths,
    table_rows,
    out,
    partial_values,
    partial_sums,
    arrived,
    stride_token,
    stride_head,
    max_blocks,
    max_splits,
    scale,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Programs: splits, then tiles of rows of each KV head, then sequences. SCALES: none, one, or one for each row.

    Of a tile's rows, the first KEPT have a place in what is left for the last program.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    split = tl.program_id(0)
    num_tiles = tl.num_programs(1)
    kv_head = tl.program_id(1) % KV_HEADS
    sequence = tl.program_id(2)
    kv_length = tl.load(kv_lengths + sequence)
    length = tl.load(lengths + sequence)
    row = tl.program_id(1) // KV_HEADS * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    is_row = token < length
    at = kv_length - length + token  # positions of the rows
    lowest = tl.maximum(kv_length - length + 1 - WINDOW, 0) if WINDOW else 0
    first_split = lowest // SPLIT
    last_split = (kv_length - 1) // SPLIT
    has_rows = tl.program_id(1) // KV_HEADS * ROWS < length * GROUP
    if (kv_length > 0) & has_rows & (split >= first_split) & (split <= last_split):
        dim = tl.arange(0, DIM)
        is_dim = dim < HEAD_DIM
        own = tl.load(starts + sequence).to(tl.int64) + token
        head = kv_head * GROUP + row % GROUP
        query_ptrs = query + own[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]
        q = tl.load(query_ptrs, mask=is_row[:, None] & is_dim[None, :], other=0.0)
        table = block_tables + tl.load(table_rows + sequence).to(tl.int64) * max_blocks
        m = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, DIM), dtype=tl.float32)
        if SCALES == 1:
            scale *= tl.load(key_scales)
        stop = tl.minimum((split + 1) * SPLIT, kv_length)
        for base in range(split * SPLIT, stop, TILE):
            position = base + tl.arange(0, TILE)
            is_position = (position < kv_length) & (position >= lowest)
            rows = pool_rows(table, position, is_position, kv_head, BLOCK_SIZE, KV_HEADS)
            k = tl.load(
                keys + rows[None, :] * HEAD_DIM + dim[:, None], mask=is_position[None, :] & is_dim[:, None], other=0.0
            )
            v = tl.load(
                values + rows[:, None] * HEAD_DIM + dim[None, :], mask=is_position[:, None] & is_dim[None, :], other=0.0
            )
            scores = tl.dot(q, k.to(DTYPE)) * scale
            if SCALES == 2:
                scores *= tl.load(key_scales + rows, mask=is_position, other=0.0)[None, :]
            sees = is_position[None, :] & (position[None, :] <= at[:, None]) & is_row[:, None]
            if WINDOW:
                sees = sees & (position[None, :] > at[:, None] - WINDOW)
            scores = tl.where(sees, scores, float("-inf"))
            if SCALES == 2:
                own_scale = tl.load(value_scales + rows, mask=is_position, other=0.0)
                seen = (v.to(tl.float32) * own_scale[:, None]).to(DTYPE)
            else:
                seen = v.to(DTYPE)
            m, total, acc = softmax_step(scores, seen, m, total, acc)
        if SCALES == 1:
            acc *= tl.load(value_scales)
        if first_split < last_split:
            place = (sequence.to(tl.int64) * num_tiles + tl.program_id(1)) * max_splits
            sums = partial_sums + (place + split) * (2 * KEPT) + tl.arange(0, ROWS)
            tl.store(sums, m, mask=is_row)
            tl.store(sums + KEPT, total, mask=is_row)
            parts = partial_values + (place + split) * (KEPT * DIM)
            offset = tl.arange(0, ROWS)[:, None] * DIM + dim[None, :]
            tl.store(parts + offset, acc, mask=is_row[:, None] & is_dim[None, :])
            tl.debug_barrier()  # all threads have written before one of them says so
            counter = arrived + sequence * num_tiles + tl.program_id(1)
            done = tl.atomic_add(counter, 1, sem="acq_rel") == last_split - first_split
            if done:
                tl.debug_barrier()
                tl.store(counter, 0)
                first_row = tl.program_id(1) // KV_HEADS * ROWS
                own_row = first_row + tl.arange(0, KEPT)
                own_head = kv_head * GROUP + own_row % GROUP
                own_token = tl.load(starts + sequence).to(tl.int64) + own_row // GROUP
                is_own = own_row < length * GROUP
                result = join(partial_values, partial_sums, place, first_split, last_split, is_own, KEPT, DIM)
                out_ptrs = out + (own_token[:, None] * (KV_HEADS * GROUP) + own_head[:, None]) * HEAD_DIM + dim[None, :]
                tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_own[:, None] & is_dim[None, :])
        else:
            result = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: a row that is none
            out_ptrs = out + (own[:, None] * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + dim[None, :]
            tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def join(partial_values, partial_sums, place, first_split, last_split, is_row, KEPT: tl.constexpr, DIM: tl.constexpr):
    """Return what all splits together attend to, [KEPT, DIM]: sums run over them in their order.

    From a multiple of JOINED on: splits that a window leaves out change nothing then. Loads of so many are under way at
    once.
    """
    JOINED: tl.constexpr = 8
    row = tl.arange(0, KEPT)
    dim = tl.arange(0, DIM)
    largest = tl.full((KEPT,), float("-inf"), dtype=tl.float32)
    for base in range(first_split // JOINED * JOINED, last_split + 1, JOINED):
        for index in tl.static_range(JOINED):
            split = base + index
            is_there = is_row & (row * 0 + split >= first_split) & (row * 0 + split <= last_split)
            own = partial_sums + (place + split) * (2 * KEPT) + row
            largest = tl.maximum(largest, tl.load(own, mask=is_there, other=float("-inf"), cache_modifier=".cg"))
    total = tl.zeros((KEPT,), dtype=tl.float32)
    acc = tl.zeros((KEPT, DIM), dtype=tl.float32)
    for base in range(first_split // JOINED * JOINED, last_split + 1, JOINED):
        for index in tl.static_range(JOINED):
            split = base + index
            is_there = is_row & (row * 0 + split >= first_split) & (row * 0 + split <= last_split)
            own = partial_sums + (place + split) * (2 * KEPT) + row
            m = tl.load(own, mask=is_there, other=float("-inf"), cache_modifier=".cg")
            weight = tl.exp2(m - tl.where(largest == float("-inf"), 0.0, largest))
            total += weight * tl.load(own + KEPT, mask=is_there, other=0.0, cache_modifier=".cg")
            values = partial_values + (place + split) * (KEPT * DIM) + row[:, None] * DIM + dim[None, :]
            part = tl.load(values, mask=is_there[:, None], other=0.0, cache_modifier=".cg")
            acc += tl.where(weight[:, None] > 0, part, 0.0) * weight[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
