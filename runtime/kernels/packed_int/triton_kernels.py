"""Products with 4- and 8-bit weights on a GPU: for few rows of x straight from the words, for many through a dense one.

Legend: T rows of x (tokens), N outputs, K inputs. The weights are the left factor, W [N, K] x^T [K, T]: a tensor core
takes the left one from registers, where codes become numbers; the right one comes from shared memory.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from pressd.runtime.kernels.packed_int.triton_weights import part_of
from pressd.runtime.kernels.split_sum import sum_splits


@triton.jit(do_not_specialize=["num_tokens"])
def multiply(
    x,
    words,
    scales,
    y,
    partials,
    arrived,
    num_tokens,
    out_features,
    in_features,
    num_blocks,
    stride_x,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y [T, N] = x [T, K] W^T; scales [groups, N], or [1, N] with GROUP 0. EVEN: blocks of columns divide K."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 32 // BITS
    BLOCK_K: tl.constexpr = PARTS * WORDS
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < out_features
    tokens = tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    per_split = (num_blocks + SPLIT - 1) // SPLIT
    first = tl.program_id(1) * per_split
    word = tl.arange(0, WORDS)
    word_ptrs = words + rows.to(tl.int64)[:, None] * (num_blocks * WORDS) + word[None, :]
    x_ptrs = x + tokens[None, :] * stride_x + word[:, None]
    acc = tl.zeros((BLOCK_N, TOKENS), dtype=tl.float32)
    # Parts that share a scale are added up before it is applied; without groups it is applied at the very end.
    SHARING: tl.constexpr = GROUP // WORDS if GROUP else PARTS
    for block in range(first, min(first + per_split, num_blocks)):
        packed = tl.load(word_ptrs + block * WORDS, mask=is_row[:, None], other=0)
        block_ptrs = x_ptrs + block * BLOCK_K
        for group in tl.static_range(PARTS // SHARING):
            total = acc if GROUP == 0 else tl.zeros((BLOCK_N, TOKENS), dtype=tl.float32)
            for own in tl.static_range(SHARING):
                inside = is_token[None, :]
                if not EVEN:
                    column = block * BLOCK_K + (group * SHARING + own) * WORDS
                    inside = inside & (column + word[:, None] < in_features)
                seen = tl.load(block_ptrs + (group * SHARING + own) * WORDS, mask=inside, other=0.0)
                total = tl.dot(part_of(packed, group * SHARING + own, BITS, DTYPE), seen, total)
            if GROUP == 0:
                acc = total
            else:
                index = block * (PARTS // SHARING) + group
                is_scale = is_row
                if not EVEN:
                    is_scale = is_row & (tl.full((BLOCK_N,), index * GROUP, tl.int32) < in_features)
                scale = tl.load(scales + index * out_features + rows, mask=is_scale, other=0.0)
                acc += total * scale.to(tl.float32)[:, None]
    done = True
    if SPLIT > 1:
        acc, done = sum_splits(acc, partials, arrived, tile, num_tiles, num_tokens, SPLIT, BLOCK_N, TOKENS)
    if done:
        if GROUP == 0:
            acc = acc * tl.load(scales + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
        out = y + tokens[None, :] * out_features + rows[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


@triton.jit
def widen(
    words,
    scales,
    weight,
    out_features,
    in_features,
    num_blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write W [N, K], each code times its scale, rounded once; a program makes BLOCK_N rows of one block of columns."""
    PARTS: tl.constexpr = 32 // BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    is_row = rows < out_features
    word = tl.arange(0, WORDS)
    at = rows.to(tl.int64)[:, None]
    packed = tl.load(words + at * (num_blocks * WORDS) + block * WORDS + word[None, :], mask=is_row[:, None], other=0)
    for part in tl.static_range(PARTS):
        column = block * (PARTS * WORDS) + part * WORDS
        index = column // GROUP if GROUP else 0
        is_scale = is_row & (tl.full((BLOCK_N,), column, tl.int32) < in_features)
        scale = tl.load(scales + index * out_features + rows, mask=is_scale, other=0.0).to(tl.float32)
        value = part_of(packed, part, BITS, tl.float32) * scale[:, None]
        inside = is_row[:, None] & (column + word[None, :] < in_features)
        tl.store(weight + at * in_features + column + word[None, :], value.to(weight.dtype.element_ty), mask=inside)
