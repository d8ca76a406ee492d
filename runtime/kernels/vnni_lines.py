"""How weights lie for integer dot products: lines of 64 bytes, each 16 outputs (a block) times some inputs.

A line of nibbles has 8 inputs: byte 4 r + i holds input i of output r in its low half, and input i + 4 in its high one.
A line of bytes has 4 inputs. Codes are unsigned, c + 2^(bits - 1). Lines of a block follow each other, then those of
the next; outputs that are missing in the last block have codes of zero and scales of zero.
"""

import torch

from pressd.runtime.kernels.host_memory import huge_empty

BLOCK = 16
LINE = 64
QUAD = 4
BITS = (4, 8)
PACKED_ELEMENTS = 1 << 22  # codes at a time


def inputs_per_line(bits: int) -> int:
    return 8 * LINE // BLOCK // bits


def blocks_of(outputs: int) -> int:
    return -(-outputs // BLOCK)


def empty(outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """Allocate uint8 [blocks, lines, LINE]."""
    return huge_empty((blocks_of(outputs), inputs // inputs_per_line(bits), LINE), torch.uint8)


def rows_at_a_time(inputs: int) -> int:
    """Return how many rows to pack at once: whole blocks, so that a weight never exists twice."""
    return max(1, PACKED_ELEMENTS // inputs // BLOCK) * BLOCK


def write(lines: torch.Tensor, first_row: int, codes: torch.Tensor, bits: int) -> None:
    """Pack signed codes int8 [rows, inputs], of outputs from `first_row`, the start of a block, on."""
    num_rows, inputs = codes.shape
    blocks = blocks_of(num_rows)
    unsigned = torch.zeros(blocks * BLOCK, inputs, dtype=torch.uint8)
    unsigned[:num_rows] = codes.view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    target = lines[first_row // BLOCK : first_row // BLOCK + blocks].view(blocks, -1, BLOCK, QUAD)
    if bits == 8:
        target.copy_(unsigned.view(blocks, BLOCK, -1, QUAD).transpose(1, 2))
        return
    low, high = unsigned.view(blocks, BLOCK, -1, 2, QUAD).unbind(3)
    target.copy_((low | (high << 4)).transpose(1, 2))


def pack_scale(scale: torch.Tensor) -> torch.Tensor:
    """Lay out scales [outputs, groups] as [blocks, groups, BLOCK]."""
    outputs, groups = scale.shape
    packed = huge_empty((blocks_of(outputs), groups, BLOCK), scale.dtype).zero_()
    for block in range(BLOCK):
        own = scale[block::BLOCK]
        packed[: own.size(0), :, block] = own
    return packed


def gather(ids: torch.Tensor, lines: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of W at ids int64 [T]: [T, inputs] in `dtype`, multiplied in the wider of it and the scale's."""
    block, row = ids // BLOCK, ids % BLOCK
    quads = lines.view(lines.size(0), lines.size(1), BLOCK, QUAD)[block, :, row]  # [T, lines, QUAD]
    if bits == 4:
        quads = torch.stack((quads & 15, quads >> 4), dim=2)
    wide = torch.promote_types(scale.dtype, dtype)
    codes = quads.flatten(1).to(wide) - (1 << (bits - 1))
    own = scale[block, :, row].to(wide)  # [T, groups]
    return (codes.view(*own.shape, codes.size(1) // own.size(1)) * own.unsqueeze(-1)).flatten(1).to(dtype)
