"""Four- and eight-bit weights on a GPU: own kernels for few rows of x, a dense product for many."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator

import torch
import triton

from pressd.runtime.kernels.integer_codes import round_activations
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.packed_int.triton_kernels import multiply, widen
from pressd.runtime.kernels.packed_int.triton_weights import WORD_BITS, count_for, pack_words, unpack_words
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors, why_not_special
from pressd.runtime.kernels.split_sum import split_for, split_memory
from pressd.runtime.kernels.tiles import tiles_for
from pressd.runtime.kernels.triton_device import why_no_triton
from pressd.runtime.kernels.variants import Variant

BITS = (4, 8)
# Rows of x that one launch takes; tiles are chosen by their number alone.
TOKENS = (16, 32, 64)
# Up to so many rows the words are read directly, in several launches: to widen a weight, and read it again, is slower.
MOST = 128
GROUPS = (None, 32, 64, 128)
# Rows and blocks of columns that one program of `widen` makes.
WIDEN_ROWS = 32


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if reason := why_no_triton(problem.dtype, device) or why_not_special(problem):
        return reason
    if problem.bits not in BITS:
        return f"serves {' and '.join(map(str, BITS))} bits, not {problem.bits}"
    if problem.group_size not in GROUPS:
        return f"serves groups of 32, 64, 128 or none, not of {problem.group_size}"
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    stored = tensors["weight_packed"].to(device.torch_device)
    return pack_codes(disk.unpack(stored, problem.bits, problem.in_features), tensors["weight_scale"], problem)


def pack_codes(codes: torch.Tensor, scale: torch.Tensor, problem: LinearProblem) -> Tensors:
    """Lay out codes int8 [out, in] and scale [out, groups]; the words go where the codes are."""
    return {
        "words": pack_words(codes, problem.bits, _count(problem)),
        "scale": scale.to(codes.device).t().contiguous(),
    }


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    if problem.activation_bits == 8:
        x = round_activations(x, problem.group_size)
    if x.size(0) > MOST:
        return torch.nn.functional.linear(x, dense(packed, problem))
    y = torch.empty(x.size(0), problem.out_features, dtype=problem.dtype, device=x.device)
    for first in range(0, x.size(0), TOKENS[-1]):
        part = slice(first, first + TOKENS[-1])
        _multiply(x[part], packed, problem, y[part])
    return y


def dense(packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    """Return W [out, in] in the problem's dtype."""
    words, scale = packed["words"], packed["scale"]
    count = _count(problem)
    num_blocks = words.size(1) // count
    weight = torch.empty(problem.out_features, problem.in_features, dtype=problem.dtype, device=words.device)
    widen[(triton.cdiv(problem.out_features, WIDEN_ROWS), num_blocks)](
        words,
        scale,
        weight,
        problem.out_features,
        problem.in_features,
        num_blocks,
        BITS=problem.bits,
        GROUP=problem.group_size or 0,
        WORDS=count,
        BLOCK_N=WIDEN_ROWS,
        num_warps=4,
    )
    return weight


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes = unpack_words(packed["words"][ids], problem.bits, _count(problem), problem.in_features)
    scale = packed["scale"].t()[ids].float()
    groups = codes.view(ids.numel(), scale.size(1), -1).float()
    return (groups * scale.unsqueeze(-1)).flatten(1).to(problem.dtype)


def _count(problem: LinearProblem) -> int:
    return count_for(problem.bits, problem.group_size, problem.in_features)


def _multiply(x: torch.Tensor, packed: Tensors, problem: LinearProblem, y: torch.Tensor) -> None:
    """Write the product of at most TOKENS[-1] rows to y."""
    words, scale = packed["words"], packed["scale"]
    tokens = next(size for size in TOKENS if x.size(0) <= size)
    count = _count(problem)
    num_blocks = words.size(1) // count
    tiles = tiles_for(f"w{problem.bits}", x.device, problem.out_features, problem.in_features, tokens)
    num_tiles = triton.cdiv(problem.out_features, tiles.rows)
    split = tiles.split or split_for(num_tiles, num_blocks)
    num_partials = split * num_tiles * tiles.rows * tokens if split > 1 else 0
    partials, arrived = split_memory(x.device).take(num_partials, num_tiles)
    multiply[(num_tiles, split)](
        x,
        words,
        scale,
        y,
        partials,
        arrived,
        x.size(0),
        problem.out_features,
        problem.in_features,
        num_blocks,
        x.stride(0),
        BITS=problem.bits,
        GROUP=problem.group_size or 0,
        WORDS=count,
        EVEN=problem.in_features % (count * WORD_BITS // problem.bits) == 0,
        BLOCK_N=tiles.rows,
        TOKENS=tokens,
        SPLIT=split,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def variants() -> Iterator[Variant]:
    numbers = ("num_tokens", "out_features", "in_features", "num_blocks", "stride_x")
    for bits in BITS:
        for group in (0, 32, 128):
            for tokens in TOKENS:
                for split in (1, 4):
                    tiles = tiles_for(f"w{bits}", None, 4096, 4096, tokens)
                    pointers = {"x": "*bf16", "words": "*i32", "scales": "*bf16", "y": "*bf16"}
                    yield Variant(
                        name=f"multiply w{bits} g{group} T{tokens} split {split}",
                        kernel=multiply,
                        signature=pointers | {"partials": "*fp32", "arrived": "*i32"} | dict.fromkeys(numbers, "i32"),
                        constants={
                            "BITS": bits,
                            "GROUP": group,
                            "WORDS": count_for(bits, group or None, 4096),
                            "EVEN": True,
                            "BLOCK_N": tiles.rows,
                            "TOKENS": tokens,
                            "SPLIT": split,
                        },
                        num_warps=tiles.num_warps,
                        num_stages=tiles.num_stages,
                        aligned=("out_features", "in_features", "num_blocks", "stride_x"),
                    )
            yield Variant(
                name=f"widen w{bits} g{group}",
                kernel=widen,
                signature={"words": "*i32", "scales": "*bf16", "weight": "*bf16"} | dict.fromkeys(numbers[1:4], "i32"),
                constants={
                    "BITS": bits,
                    "GROUP": group,
                    "WORDS": count_for(bits, group or None, 4096),
                    "BLOCK_N": WIDEN_ROWS,
                },
                aligned=("out_features", "in_features"),
            )


KERNEL = LinearKernel(name="triton", storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
