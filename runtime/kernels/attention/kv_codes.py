"""Keys and values in eight bits, there and back.

With a scale of its own, a head of a token is rounded as activations are (kernels/activation_codes.py). With one scale
for a layer, what lies beyond the largest code takes the largest. A number that is none stays none: its token's scale is
NaN, or its code is.
"""

import functools

import torch

from pressd.runtime.kernels.activation_codes import FP8, LARGEST, quantize_rows_reference
from pressd.runtime.kernels.attention.batch import QueryRun, sequence_view
from pressd.runtime.kernels.registry import CodeType

# The code of int8 that no number has: NaN, under a scale that cannot say it.
NO_NUMBER = -128


def encode(
    rows: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return rows [T, kv_heads, head_dim] as codes in `dtype` and, without a `scale` of one element for all, their own.

    Those are float32 [T, kv_heads].
    """
    if scale is None:
        found = quantize_rows_reference(rows.flatten(1), CodeType(dtype=dtype, group_size=rows.size(-1)))
        return found.codes.view(rows.shape), found.scale.to(torch.float32)
    scaled = rows.to(torch.promote_types(rows.dtype, torch.float32)) / scale
    if dtype == FP8:
        return scaled.clamp(-LARGEST[FP8], LARGEST[FP8]).to(FP8), None
    codes = scaled.round().clamp(-LARGEST[dtype], LARGEST[dtype]).nan_to_num(nan=NO_NUMBER)
    return codes.to(dtype), None


def decode(codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return what codes [..., kv_heads, head_dim] stand for, in `dtype`, computed in float32 at least.

    `scales` are None for floating-point numbers, of one element for all, or [..., kv_heads].
    """
    if scales is None:
        return codes.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    is_shared = scales.shape == (1,)
    numbers = codes.to(wide) if codes.dtype == torch.int8 else _look_up(codes, wide)
    numbers.mul_(scales if is_shared else scales.unsqueeze(-1))
    if is_shared and codes.dtype == torch.int8 and codes.numel() and codes.amin() == NO_NUMBER:
        numbers.masked_fill_(codes == NO_NUMBER, torch.nan)
    return numbers.to(dtype)


def _look_up(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return codes in e4m3 as numbers in `dtype`: PyTorch's own conversion is five times as slow on a CPU."""
    numbers = _numbers(dtype, codes.device)
    return numbers.index_select(0, codes.view(torch.uint8).flatten().to(torch.int32)).view(codes.shape)


@functools.cache
def _numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what each byte, [256], means in e4m3."""
    return torch.arange(256, dtype=torch.uint8).view(FP8).to(device, dtype)


def sequence_numbers(
    blocks: torch.Tensor, scales: torch.Tensor | None, run: QueryRun, first: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return keys or values [kv_length - first, kv_heads, head_dim] of a sequence from position `first` on, in `dtype`.

    It is a view if they are stored so and the sequence's blocks are contiguous.
    """
    codes = sequence_view(indexable(blocks), run, first)
    if codes.dtype != blocks.dtype:  # not for nothing: no gradient passes a view as another type, not even the same
        codes = codes.view(blocks.dtype)
    own = scales if scales is None or scales.shape == (1,) else sequence_view(scales, run, first)
    return decode(codes, own, dtype)


def indexable(blocks: torch.Tensor) -> torch.Tensor:
    """Return blocks as what every device can gather and scatter: those of 8 bits as bytes."""
    return blocks.view(torch.uint8) if blocks.dtype == FP8 else blocks
