"""2- to 8-bit weights on disk: compressed-tensors' `pack-quantized` with its dense stream (0.18 and later).

A row is one little-endian bit string cut into 32-bit words: element i is the unsigned number code + 2^(bits-1) in bits
[i * bits, (i + 1) * bits). An element may straddle two words; the last word is filled up with zero bits.

Zero points, where there are any, are such strings too, from the first output to the last: one for each group.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pressd.runtime.kernels.integer_codes import dequantize, scale_shape

NAME = "packed_int"
ZERO_POINT = "weight_zero_point"
WORD_BITS = 32


def layout(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    *,
    symmetric: bool = True,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each stored tensor by its suffix; `dtype` is the scale's."""
    scale = scale_shape(out_features, in_features, group_size)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (out_features, _num_words(in_features, bits))),
        "weight_scale": (dtype, scale),
        "weight_shape": (torch.int64, (2,)),
    }
    if not symmetric:
        tensors[ZERO_POINT] = (torch.int32, (_num_words(out_features, bits), scale[1]))
    return tensors


def encode(codes: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors to store for signed codes int8 [out, in], scale and zero point int8 [out, groups]."""
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    return tensors if zero_point is None else tensors | {ZERO_POINT: pack_zero_points(zero_point, bits)}


def decode(tensors: dict[str, Tensor], bits: int, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype`."""
    out_features, in_features = tensors["weight_shape"].tolist()
    assert tensors["weight_scale"].shape == scale_shape(out_features, in_features, group_size)
    zero_point = unpack_zero_points(tensors[ZERO_POINT], bits, out_features) if ZERO_POINT in tensors else None
    return dequantize(unpack(tensors["weight_packed"], bits, in_features), tensors["weight_scale"], dtype, zero_point)


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """Pack signed zero points int8 [out, groups] into int32 [ceil(out * bits / 32), groups]."""
    return _transposed(pack(zero_point.T, bits))


def unpack_zero_points(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Return the signed zero points int8 [out, groups] of words int32 [ceil(out * bits / 32), groups]."""
    return _transposed(unpack(packed.T, bits, out_features))


def join_zero_points(parts: Sequence[Tensor], bits: int, out_features: Sequence[int]) -> Tensor:
    """Return the words of the zero points of weights that are put below each other, whose words may have room left."""
    signed = (unpack_zero_points(part, bits, rows) for part, rows in zip(parts, out_features, strict=True))
    return pack_zero_points(torch.cat(list(signed)), bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes int8 [out, in] into int32 [out, ceil(in * bits / 32)]."""
    out_features, in_features = codes.shape
    # 32 elements fill exactly `bits` words: the pattern of one such run repeats along the row.
    unsigned = F.pad((codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), (0, -in_features % WORD_BITS))
    runs = unsigned.reshape(out_features, -1, WORD_BITS)
    words = torch.zeros(*runs.shape[:2], bits, dtype=torch.int32, device=codes.device)
    for element in range(WORD_BITS):
        word, shift = divmod(element * bits, WORD_BITS)
        value = runs[..., element].to(torch.int32)
        words[..., word] |= value << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= value >> (WORD_BITS - shift)
    return words.reshape(out_features, -1)[:, : _num_words(in_features, bits)].contiguous()


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the signed codes int8 [out, in] of words int32 [out, ceil(in * bits / 32)]."""
    out_features, num_words = packed.shape
    assert num_words == _num_words(in_features, bits)
    runs = F.pad(packed, (0, -num_words % bits)).reshape(out_features, -(-num_words // bits), bits)
    codes = torch.empty(*runs.shape[:2], WORD_BITS, dtype=torch.int8, device=packed.device)
    mask = (1 << bits) - 1
    for element in range(WORD_BITS):
        word, shift = divmod(element * bits, WORD_BITS)
        value = runs[..., word] >> shift
        if shift + bits > WORD_BITS:
            # The shift right was arithmetic: only the low bits are this element's, the rest come from the next word.
            in_word = WORD_BITS - shift
            value = (value & ((1 << in_word) - 1)) | (runs[..., word + 1] << in_word)
        codes[..., element] = (value & mask) - (1 << (bits - 1))
    return codes.flatten(1)[:, :in_features].contiguous()


def _transposed(matrix: Tensor) -> Tensor:
    # Not contiguous(): of a matrix with one column that would keep the strides of a row.
    return matrix.T.clone(memory_format=torch.contiguous_format)


def _num_words(in_features: int, bits: int) -> int:
    return -(-in_features * bits // WORD_BITS)
