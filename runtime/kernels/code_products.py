"""Products of 8-bit codes with 8-bit codes on a GPU, int8 or e4m3: for few rows an own kernel.

Legend: T rows of x (tokens), N outputs, K inputs. As with other weights, W [N, K] is the left factor.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.activation_codes import FP8
from pressd.runtime.kernels.registry import QuantizedRows
from pressd.runtime.kernels.split_sum import split_for, split_memory, sum_splits
from pressd.runtime.kernels.tiles import tiles_for
from pressd.runtime.kernels.variants import Variant

# Up to so many rows of x this kernel is used.
TOKENS = (16, 32, 64, 128)
COLUMNS = 128


@triton.jit(do_not_specialize=["num_tokens"])
def multiply_codes(
    x,
    x_scales,
    weight,
    scales,
    y,
    partials,
    arrived,
    num_tokens,
    out_features,
    in_features,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """y [T, N] = (x [T, K] W^T) * x_scales [T] * scales [N]."""
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < out_features
    tokens = tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    num_blocks = (in_features + BLOCK_K - 1) // BLOCK_K
    per_split = (num_blocks + SPLIT - 1) // SPLIT
    first = tl.program_id(1) * per_split
    column = tl.arange(0, BLOCK_K)
    weight_ptrs = weight + rows.to(tl.int64)[:, None] * in_features + column[None, :]
    x_ptrs = x + tokens[None, :] * in_features + column[:, None]
    acc = tl.zeros((BLOCK_N, TOKENS), dtype=tl.int32 if IS_INT8 else tl.float32)
    for block in range(first, min(first + per_split, num_blocks)):
        start = block * BLOCK_K
        is_column = start + column < in_features
        own = tl.load(weight_ptrs + start, mask=is_row[:, None] & is_column[None, :], other=0.0)
        seen = tl.load(x_ptrs + start, mask=is_token[None, :] & is_column[:, None], other=0.0)
        if IS_INT8:
            acc = tl.dot(own, seen, acc, out_dtype=tl.int32)
        else:
            # A tensor core keeps few bits of a sum of such products: it is added to float32 after each block.
            acc = tl.dot(own, seen, acc, max_num_imprecise_acc=BLOCK_K)
    done = True
    if SPLIT > 1:
        acc, done = sum_splits(acc, partials, arrived, tile, num_tiles, num_tokens, SPLIT, BLOCK_N, TOKENS)
    if done:
        own_scale = tl.load(scales + rows, mask=is_row, other=0.0).to(tl.float32)
        x_scale = tl.load(x_scales + tokens, mask=is_token, other=0.0)
        out = y + tokens[None, :] * out_features + rows[:, None]
        total = acc.to(tl.float32) * x_scale[None, :] * own_scale[:, None]
        tl.store(out, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


def product_of_few(x: QuantizedRows, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [T, N] of codes x [T <= 128, K] and weight [N, K] of the same type, and scale [N, 1]."""
    num_tokens, in_features = x.codes.shape
    out_features = weight.size(0)
    y = torch.empty(num_tokens, out_features, dtype=dtype, device=weight.device)
    if num_tokens == 0:
        return y
    tokens = next(size for size in TOKENS if num_tokens <= size)
    is_int8 = weight.dtype == torch.int8
    tiles = tiles_for("w8a8" if is_int8 else "fp8", weight.device, out_features, in_features, tokens)
    num_tiles, num_blocks = triton.cdiv(out_features, tiles.rows), triton.cdiv(in_features, COLUMNS)
    split = tiles.split or split_for(num_tiles, num_blocks)
    num_partials = split * num_tiles * tiles.rows * tokens if split > 1 else 0
    partials, arrived = split_memory(weight.device).take(num_partials, num_tiles)
    multiply_codes[(num_tiles, split)](
        x.codes,
        x.scale,
        weight,
        scale,
        y,
        partials.view(torch.int32) if is_int8 else partials,
        arrived,
        num_tokens,
        out_features,
        in_features,
        BLOCK_N=tiles.rows,
        BLOCK_K=COLUMNS,
        TOKENS=tokens,
        SPLIT=split,
        IS_INT8=is_int8,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return y


def variants_of(codes: torch.dtype) -> Iterator[Variant]:
    """Yield what is compiled for one type of codes."""
    is_int8 = codes == torch.int8
    name = "*i8" if is_int8 else "*fp8e4nv"
    for tokens in TOKENS:
        for split in (1, 4):
            tiles = tiles_for("w8a8" if codes != FP8 else "fp8", None, 4096, 4096, tokens)
            yield Variant(
                name=f"multiply_codes {codes} T{tokens} split {split}",
                kernel=multiply_codes,
                signature={
                    "x": name,
                    "x_scales": "*fp32",
                    "weight": name,
                    "scales": "*bf16",
                    "y": "*bf16",
                    "partials": "*i32" if is_int8 else "*fp32",
                    "arrived": "*i32",
                    "num_tokens": "i32",
                    "out_features": "i32",
                    "in_features": "i32",
                },
                constants={
                    "BLOCK_N": tiles.rows,
                    "BLOCK_K": COLUMNS,
                    "TOKENS": tokens,
                    "SPLIT": split,
                    "IS_INT8": is_int8,
                },
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                aligned=("out_features", "in_features"),
                oldest=80 if is_int8 else 89,
            )
