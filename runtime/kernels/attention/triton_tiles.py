"""What the attention kernels of a GPU share: where positions lie in the pool, and the running softmax."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def pool_rows(table, position, is_position, kv_head, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr):
    """Return rows int64 of the pool, viewed as [blocks * block_size * kv_heads], of positions int32 of a sequence.

    `table` points at the sequence's block table; where not `is_position`, nothing is read and the row is the pool's
    first.
    """
    block = tl.load(table + position // BLOCK_SIZE, mask=is_position, other=0).to(tl.int64)
    return (block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head


@triton.jit
def softmax_step(scores, values, m, total, acc):
    """Add a tile to a softmax that is under way: scores [R, N] base 2, minus infinity where masked; values [N, D].

    Returns the largest score so far, the sum of weights [R] and the weighted values [R, D]. A row of which nothing is
    seen stays as it is, to the bit.
    """
    new = tl.maximum(m, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * alpha[:, None])
    return new, total, acc
