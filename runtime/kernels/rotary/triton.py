"""Norm of heads, rotation, and the way of keys and values into the pool, in one launch."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.variants import Variant

# Heads of one program.
HEADS_AT_ONCE = 8


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotate_heads(
    qkv,
    positions,
    cos,
    sin,
    gain,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    epsilon,
    NORMS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program for some heads of a token: queries come first, then keys, then values."""
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    WIDTH: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    lane = tl.arange(0, HALF)
    inside = (head < ALL)[:, None] & (lane < WIDTH)[None, :]
    source = qkv + (token * ALL + head)[:, None] * HEAD_DIM + lane[None, :]
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + WIDTH, mask=inside, other=0.0)
    slot = tl.load(slots + token)
    low, high = first.to(tl.float32), second.to(tl.float32)
    if NORMS:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM
        scale = 1.0 / tl.sqrt_rn(mean + epsilon)
        is_gain = (head < HEADS + KV_HEADS)[:, None] & inside
        own = gain + head[:, None] * HEAD_DIM + lane[None, :]
        first_gain = tl.load(own, mask=is_gain, other=0.0).to(tl.float32)
        second_gain = tl.load(own + WIDTH, mask=is_gain, other=0.0).to(tl.float32)
        low = (first_gain * (low * scale[:, None]).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
        high = (second_gain * (high * scale[:, None]).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
    angle = tl.load(positions + token) * WIDTH + lane
    cosine = tl.load(cos + angle, mask=lane < WIDTH, other=0.0)[None, :]
    sine = tl.load(sin + angle, mask=lane < WIDTH, other=0.0)[None, :]
    turned = (low * cosine - high * sine).to(DTYPE)
    turned_too = (high * cosine + low * sine).to(DTYPE)
    is_query = (head < HEADS)[:, None] & inside
    target = query + (token * HEADS + head)[:, None] * HEAD_DIM + lane[None, :]
    tl.store(target, turned, mask=is_query)
    tl.store(target + WIDTH, turned_too, mask=is_query)
    is_written = tl.zeros_like(head) + slot >= 0
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS) & is_written
    where_to = slot * KV_HEADS + head - HEADS
    store_rows(keys, key_scales, where_to, turned, turned_too, is_key, inside, HEAD_DIM, HALF, SCALES)
    is_value = (head >= HEADS + KV_HEADS) & (head < ALL) & is_written
    where_to -= KV_HEADS
    store_rows(values, value_scales, where_to, first, second, is_value, inside, HEAD_DIM, HALF, SCALES)


@triton.jit
def store_rows(
    pool,
    scales,
    where_to,
    first,
    second,
    is_row,
    inside,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Store rows, whose halves are given, where they belong; in 8 bits with the one scale, or with one of their own."""
    lane = tl.arange(0, HALF)
    mask = is_row[:, None] & inside
    low, high = first.to(tl.float32), second.to(tl.float32)
    if SCALES == 1:
        scale = tl.load(scales)
        low, high = tl.div_rn(low, scale), tl.div_rn(high, scale)
        # Comparing keeps NaN; the least and the largest of two numbers would not.
        low = tl.where(low > 448.0, 448.0, tl.where(low < -448.0, -448.0, low))
        high = tl.where(high > 448.0, 448.0, tl.where(high < -448.0, -448.0, high))
    if SCALES == 2:
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        scale = tl.maximum(tl.div_rn(largest, 127.5), 1.1754943508222875e-38)
        is_spoilt = tl.max(((low != low) | (high != high)).to(tl.int32), 1) > 0
        scale = tl.where(is_spoilt, float("nan"), scale)
        tl.store(scales + where_to, scale, mask=is_row)
        # As in row_codes: the sum rounds half to even.
        low = (tl.div_rn(low, tl.zeros_like(low) + scale[:, None]) + 12582912.0) - 12582912.0
        low = tl.minimum(tl.maximum(low, -127.0), 127.0)
        high = (tl.div_rn(high, tl.zeros_like(high) + scale[:, None]) + 12582912.0) - 12582912.0
        high = tl.minimum(tl.maximum(high, -127.0), 127.0)
    target = pool + where_to[:, None] * HEAD_DIM + lane[None, :]
    tl.store(target, low.to(pool.dtype.element_ty), mask=mask)
    tl.store(target + HEAD_DIM // 2, high.to(pool.dtype.element_ty), mask=mask)


def rotate_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_gain: torch.Tensor | None,
    epsilon: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `RotateAndWrite` in registry.py says, of tables and positions, and reference.py of pools in 8 bits.

    Everything is contiguous.
    """
    assert positions is not None, "cosines and sines are looked up here"
    num_tokens, head_dim = qkv.size(0), keys.size(-1)
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        rotate_heads[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_AT_ONCE))](
            qkv,
            positions,
            cos,
            sin,
            qkv if norm_gain is None else norm_gain,
            query,
            keys,
            values,
            qkv if key_scales is None else key_scales,
            qkv if value_scales is None else value_scales,
            slots,
            epsilon,
            NORMS=norm_gain is not None,
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=triton.next_power_of_2(head_dim // 2),
            AT_ONCE=HEADS_AT_ONCE,
            SCALES=0 if key_scales is None else 2 if keys.dtype == torch.int8 else 1,
            num_warps=2,
        )
    return query


def variants() -> Iterator[Variant]:
    for scales, stored in enumerate(("*bf16", "*fp8e4nv", "*i8")):
        for norms in (False, True):
            yield Variant(
                name=f"rotate_and_write {'with' if norms else 'without'} norms to {stored}",
                kernel=rotate_heads,
                signature={
                    "qkv": "*bf16",
                    "positions": "*i64",
                    "cos": "*fp32",
                    "sin": "*fp32",
                    "gain": "*bf16",
                    "query": "*bf16",
                    "keys": stored,
                    "values": stored,
                    **dict.fromkeys(("key_scales", "value_scales"), "*fp32" if scales else "*bf16"),
                    "slots": "*i64",
                    "epsilon": "fp32",
                },
                constants={
                    "NORMS": norms,
                    "HEADS": 32,
                    "KV_HEADS": 8,
                    "HEAD_DIM": 128,
                    "HALF": 64,
                    "AT_ONCE": HEADS_AT_ONCE,
                    "SCALES": scales,
                },
                num_warps=2,
                oldest=89 if scales == 1 else 80,
            )
