"""How 4- and 8-bit codes lie in 32-bit words on a GPU, and how a kernel takes them out again.

A row is cut into blocks of `count` words, of 8 * count columns (4 bits) or 4 * count (8 bits). A word holds one column
out of each of the block's parts, which are `count` columns long: part 2 j is in the low half of the word at bit
j * bits, part 2 j + 1 in the high half. One shift and one mask then give two parts at once, each contiguous in the
columns of x.
Codes are stored unsigned, code + 2^(bits-1); columns that fill up the last block are 0 and meet an x of 0.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

WORD_BITS = 32
# Words of a block: few and large parts, where they do not cross a scale's columns.
COUNTS = (64, 32)


def count_for(bits: int, group_size: int | None, in_features: int) -> int:
    """Return the words of a block."""
    fitting = (
        count
        for count in COUNTS
        if (group_size is None or group_size % count == 0) and in_features % (count * WORD_BITS // bits) == 0
    )
    return next(fitting, COUNTS[-1])


def pack_words(codes: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Pack signed codes int8 [out, in] into int32 [out, blocks * count]."""
    out_features, in_features = codes.shape
    num_parts = WORD_BITS // bits
    unsigned = codes.to(torch.int32) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -in_features % (num_parts * count)))
    parts = unsigned.view(out_features, -1, num_parts, count)
    words = torch.zeros(out_features, parts.size(1), count, dtype=torch.int32, device=codes.device)
    for part in range(num_parts):
        words |= parts[:, :, part] << _shift_of(part, bits)
    return words.flatten(1)


def unpack_words(words: torch.Tensor, bits: int, count: int, in_features: int) -> torch.Tensor:
    """Return the signed codes int8 [out, in] of words int32 [out, blocks * count]."""
    blocks = words.view(words.size(0), -1, count)
    mask = (1 << bits) - 1
    parts = [((blocks >> _shift_of(part, bits)) & mask) - (1 << (bits - 1)) for part in range(WORD_BITS // bits)]
    return torch.stack(parts, dim=2).flatten(1)[:, :in_features].to(torch.int8).contiguous()


def _shift_of(part: int, bits: int) -> int:
    return part // 2 * bits + part % 2 * (WORD_BITS // 2)


@triton.jit
def part_of(words, PART: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the signed codes of one part of words int32 [rows, count], exact in DTYPE.

    A code becomes the last bits of a significand, under an exponent that makes it 2^m + code; the offset is subtracted.
    Bfloat16 has room for seven bits: the eighth chooses what is subtracted.
    """
    shifted = words >> (PART // 2 * BITS)
    if tl.float32 == DTYPE:
        value = (shifted >> (PART % 2 * 16)) & ((1 << BITS) - 1)
        codes = value.to(tl.float32) - (1 << (BITS - 1))
    elif tl.float16 == DTYPE:
        MASK: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
        codes = half_of((shifted & MASK) | 0x64006400, PART % 2, DTYPE) - (1024 + (1 << (BITS - 1)))
    elif BITS == 4:
        codes = half_of((shifted & 0x000F000F) | 0x43004300, PART % 2, DTYPE) - 136.0
    else:
        low = half_of((shifted & 0x007F007F) | 0x43004300, PART % 2, DTYPE)
        # -256 is 0xC380 and -128 is 0xC300; -1023360256 is 0xC300C300.
        codes = low + half_of((~shifted & 0x00800080) | -1023360256, PART % 2, DTYPE)
    return codes


@triton.jit
def half_of(pairs, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """Return the low or the high 16 bits of each int32 as DTYPE."""
    if HIGH:
        pairs = pairs >> 16
    return pairs.to(tl.int16).to(DTYPE, bitcast=True)
