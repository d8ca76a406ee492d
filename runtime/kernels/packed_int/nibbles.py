"""How codes of 2 to 8 bits lie in memory for PyTorch's packed int4 product, in exactly `bits` bits each.

That product reads unsigned nibbles in blocks of rows (64 with AVX-512, 32 with AVX2): for each column k, byte p of the
block holds row p in its low half and row p + block / 2 in its high half; of 16, 32 or 48 rows that remain at the end,
byte p holds rows 2p and 2p + 1.

A code, made unsigned, is cut into digits, the upper four bits and the rest, and each digit fills its nibble from the
top: 2 bits are kept as u << 2. So a digit reads as a signed number times a power of two, which its scale takes up
exactly. Digits narrower than a nibble lie in planes of 2 and of 1 bits that expand to nibbles by shifts and masks: byte
j of a plane holds the bits that byte j + n L of the block has at the top of its two nibbles, n places lower; L is the
length of the plane's share of a block.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pressd.runtime.kernels.registry import Tensors

NIBBLE = 4
ROW_MULTIPLE, COLUMN_MULTIPLE = 16, 32
_BLOCKS = (64, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some rows of a weight: whole blocks, or the rows that remain after them, whose pairs are neighbours."""

    start: int
    num_rows: int
    block: int
    is_remainder: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.num_rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks, bytes per block and column."""
        return self.num_rows // self.block, self.block // 2


def tiles(out_features: int, max_rows: int, block: int) -> Iterator[Tile]:
    """Cut rows into tiles of at most `max_rows`, or one block if that is more; the rows that remain come last."""
    whole = out_features // block * block
    step = max(block, max_rows // block * block)
    for start in range(0, whole, step):
        yield Tile(start=start, num_rows=min(step, whole - start), block=block, is_remainder=False)
    if rest := out_features - whole:
        yield Tile(start=whole, num_rows=rest, block=rest, is_remainder=True)


def pack(codes: torch.Tensor, bits: int, tile: Tile) -> Tensors:
    """Return the planes, flat uint8, of the signed codes int8 [tile.num_rows, in]."""
    num_blocks, half = tile.shape
    unsigned = codes.view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    pairs = unsigned.view(num_blocks, *((half, 2) if tile.is_remainder else (2, half)), -1)
    low, high = pairs.unbind(2 if tile.is_remainder else 1)
    planes = {}
    for shift, width, _ in _planes(bits):
        mask, top = (1 << width) - 1, NIBBLE - width
        pair = ((low >> shift & mask) << top) | ((high >> shift & mask) << (top + NIBBLE))
        slots = pair.transpose(1, 2).reshape(num_blocks, NIBBLE // width, -1)
        plane = slots[:, 0].clone()
        for slot in range(1, slots.size(1)):
            plane |= slots[:, slot] >> (width * slot)
        planes[_name(shift)] = plane.flatten()
    return planes


def expand(packed: Tensors, bits: int, in_features: int, tile: Tile) -> list[torch.Tensor]:
    """Return the nibbles of each digit, the upper digit first: uint8 [blocks, in, block / 2]."""
    num_blocks, half = tile.shape
    digits: list[torch.Tensor] = []
    for shift, width, above in _planes(bits):
        start, length = (count * in_features * width // 8 for count in (tile.start, tile.num_rows))
        plane = packed[_name(shift)][start : start + length]
        if width == NIBBLE:
            digits.append(plane.view(num_blocks, in_features, half))
            continue
        slots = NIBBLE // width
        words = plane.view(torch.int32).view(num_blocks, 1, -1)
        shifts = torch.arange(0, NIBBLE, width, dtype=torch.int32).view(slots, 1)
        nibbles = torch.bitwise_left_shift(words, shifts)
        if above:
            nibbles >>= above  # fills with copies of the sign, which the mask takes away
        nibbles &= _every_byte(_field(width, above))
        if above:
            digits[-1].view(torch.int32).bitwise_or_(nibbles.view(num_blocks, in_features, -1))
        else:
            digits.append(nibbles.view(torch.uint8).view(num_blocks, in_features, half))
    return digits


def signed_bytes(digits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return code << (8 - bits) of the low and of the high halves of `expand`'s bytes: int8, shaped as its digits."""
    # Taking the offset off an unsigned number is flipping its highest bit, here of the upper digits.
    high = digits[0].view(torch.int32) ^ _every_byte(0x88)
    low = (high << NIBBLE).bitwise_and_(_every_byte(0xF0))
    high &= _every_byte(0xF0)
    if len(digits) > 1:
        second = digits[1].view(torch.int32)
        high |= (second >> NIBBLE).bitwise_and_(_every_byte(0x0F))
        low |= second & _every_byte(0x0F)
    return low.view(torch.int8), high.view(torch.int8)


def gather(
    ids: torch.Tensor, packed: Tensors, bits: int, out_features: int, in_features: int, block: int
) -> torch.Tensor:
    """Return code << (8 - bits) of the rows at ids int64 [T]: int8 [T, in]."""
    whole = out_features // block * block
    remains = ids >= whole
    start = torch.where(remains, whole, ids // block * block)
    half = torch.where(remains, out_features - whole, block) // 2
    row = ids - start
    byte, is_high = (torch.where(remains, pair, run) for pair, run in ((row // 2, row % half), (row % 2, row // half)))
    column = torch.arange(in_features)
    codes = torch.zeros(ids.numel(), in_features, dtype=torch.uint8)
    for shift, width, above in _planes(bits):
        run = in_features * width // NIBBLE  # columns between two that share a byte
        place = (column // run * width).to(torch.uint8)
        index = (start * in_features * width // 8 + byte)[:, None] + half[:, None] * (column % run)
        pairs = packed[_name(shift)][index] << place
        nibble = (pairs >> (is_high * NIBBLE).to(torch.uint8)[:, None]) & _field(width, 0) & 0x0F
        codes |= nibble << NIBBLE >> (above + (0 if shift >= bits - NIBBLE else NIBBLE))
    return (codes ^ 0x80).view(torch.int8)


@functools.cache
def block_rows() -> int | None:
    """Return the rows per block on this machine; None if PyTorch packs in a way that is not the one described above.

    Nothing documents its layout: a weight whose nibbles spell its own row numbers is packed by both, and compared.
    """
    numbers = torch.arange(128 + ROW_MULTIPLE, dtype=torch.int32)[:, None].expand(-1, COLUMN_MULTIPLE)
    digits = [(numbers >> shift & 15).contiguous() for shift in (0, NIBBLE)]
    theirs = [torch._convert_weight_to_int4pack_for_cpu(digit, 1).flatten() for digit in digits]
    codes = [(digit - 8).to(torch.int8) for digit in digits]
    for block in _BLOCKS:
        cut = list(tiles(len(numbers), len(numbers), block))
        ours = [torch.cat([pack(digit[tile.rows], NIBBLE, tile)[_name(0)] for tile in cut]) for digit in codes]
        if all(map(torch.equal, ours, theirs)):
            return block
    return None


def _planes(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield (lowest bit in the code, width, bits of the same digit above) of each plane, from the top of the code."""
    remaining = bits
    for digit in (min(bits, NIBBLE), max(bits - NIBBLE, 0)):
        above = 0
        for width in (4, 2, 1):
            if digit & width:
                remaining -= width
                yield remaining, width, above
                above += width


def _name(shift: int) -> str:
    return f"bits_from_{shift}"


def _field(width: int, above: int) -> int:
    """The bits of both halves of a byte that a plane fills."""
    nibble = ((1 << width) - 1) << (NIBBLE - width) >> above
    return nibble * 0x11


def _every_byte(byte: int) -> int:
    """Repeat a byte in a 32-bit word, as a signed number."""
    return int.from_bytes(bytes([byte] * 4), "little", signed=True)
