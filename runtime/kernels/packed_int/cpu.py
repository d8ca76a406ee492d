"""2- to 8-bit weights on a CPU, from one layout: PyTorch's packed int4 product for few rows, widened tiles for many.

In bfloat16, few rows of x meet nibbles: those of a 4-bit weight are multiplied where they lie, narrower codes are
expanded to nibbles a tile at a time, wider ones are two digits and two products. Many rows of x, and any number in
float32 and float16, meet tiles of weights in floating point. Both see the same codes, scales and activations; a tile
in bfloat16 rounds code x scale to it once, as the reference does, and the packed product does not. That one takes zero
point x scale, rounded to bfloat16, where the others subtract zero points from codes.
"""

from collections.abc import Callable

import torch

from pressd.runtime.kernels import byte_codes
from pressd.runtime.kernels.crossovers import few_rows
from pressd.runtime.kernels.integer_codes import quantize_activations, round_activations
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.packed_int import nibbles
from pressd.runtime.kernels.registry import (
    Device,
    LinearKernel,
    LinearProblem,
    Tensors,
    describe_device,
    why_not_special,
)
from pressd.runtime.kernels.widened import tile_dtype, tile_elements

PRODUCT_GROUPS = (256, 128, 64, 32)  # what PyTorch's packed product knows, the largest first
EXPANDED_ELEMENTS = 1 << 23  # of a weight at a time for few rows: 4 MiB of nibbles
PACKING_ELEMENTS = 1 << 22

Product = Callable[[torch.Tensor, Tensors, LinearProblem, nibbles.Tile], torch.Tensor]


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if (reason := why_not_special(problem, zero_points=True)) is not None:
        return reason
    if problem.dtype not in byte_codes.DTYPES:
        return f"computes in float32 at most, not in {problem.dtype}"
    if problem.out_features % nibbles.ROW_MULTIPLE or problem.in_features % nibbles.COLUMN_MULTIPLE:
        multiples = f"{nibbles.ROW_MULTIPLE} x {nibbles.COLUMN_MULTIPLE}"
        return f"needs multiples of {multiples}, not {problem.out_features} x {problem.in_features}"
    if problem.group_size not in (None, *PRODUCT_GROUPS):
        return f"serves groups of {sorted(PRODUCT_GROUPS)} or whole rows, not of {problem.group_size}"
    if nibbles.block_rows() is None:
        return "PyTorch packs int4 weights in a layout that it does not know"
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    planes: dict[str, list[torch.Tensor]] = {}
    for tile in _tiles(problem, PACKING_ELEMENTS):
        codes = disk.unpack(tensors["weight_packed"][tile.rows], problem.bits, problem.in_features)
        for name, plane in nibbles.pack(codes, problem.bits, tile).items():
            planes.setdefault(name, []).append(plane)
    scale = tensors["weight_scale"].T
    if problem.group_size is not None and problem.dtype == torch.bfloat16:
        # What the packed product takes. A scale of another type rounds here instead of its products with the codes.
        scale = scale.to(torch.bfloat16)
    packed = {**{name: torch.cat(parts) for name, parts in planes.items()}, "scale": scale.contiguous()}
    if not problem.symmetric:
        zero_point = disk.unpack_zero_points(tensors[disk.ZERO_POINT], problem.bits, problem.out_features)
        packed["zero_point"] = zero_point.T.contiguous()
    return packed


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    if x.size(0) == 0:
        return x.new_zeros(0, problem.out_features)
    multiply, elements = _branch(x, problem)
    by_row = problem.group_size is None
    x, x_scale = _activations(x, problem)
    # Without groups, scales multiply the sums: codes, of weights and activations, are exact in every type.
    output = torch.empty(x.size(0), problem.out_features, dtype=torch.float32 if by_row else problem.dtype)
    for tile in _tiles(problem, elements):
        output[:, tile.rows] = multiply(x, packed, problem, tile)
    if not by_row:
        return output
    output.mul_(packed["scale"])
    return (output if x_scale is None else output.mul_(x_scale)).to(problem.dtype)


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    block = nibbles.block_rows()
    assert block is not None
    codes = nibbles.gather(ids, packed, problem.bits, problem.out_features, problem.in_features, block)
    scale = packed["scale"][:, ids].float().mul_(2.0 ** (problem.bits - 8)).T
    groups = codes.view(ids.numel(), scale.size(1), problem.in_features // scale.size(1)).float()
    if not problem.symmetric:
        groups -= (packed["zero_point"][:, ids].float() * 2.0 ** (8 - problem.bits)).T.unsqueeze(-1)
    return groups.mul_(scale.unsqueeze(-1)).flatten(1).to(problem.dtype)


def _branch(x: torch.Tensor, problem: LinearProblem) -> tuple[Product, int]:
    """Choose how to multiply, and how many weights at a time."""
    in_integers = byte_codes.integers_are_exact(problem, describe_device(x.device))
    branch = f"{1 if problem.bits <= nibbles.NIBBLE else 2} x int4 before {'int8' if in_integers else 'floats'}"
    if problem.dtype == torch.bfloat16 and x.size(0) <= few_rows(branch):
        # A 4-bit weight is multiplied where it lies: there is nothing to expand.
        is_one_nibble = problem.bits == nibbles.NIBBLE
        return _packed_product, problem.out_features * problem.in_features if is_one_nibble else EXPANDED_ELEMENTS
    return _integer_product if in_integers else _widened_product, tile_elements()


def _tiles(problem: LinearProblem, elements: int) -> list[nibbles.Tile]:
    block = nibbles.block_rows()
    assert block is not None
    return list(nibbles.tiles(problem.out_features, elements // problem.in_features, block))


def _activations(x: torch.Tensor, problem: LinearProblem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what meets the weight, in the problem's type, and the scale of its rows [T, 1] if it is codes."""
    if problem.activation_bits == 16:
        return x, None
    if problem.group_size is None:
        codes, scale = quantize_activations(x)
        return codes.to(problem.dtype), scale
    return round_activations(x, problem.group_size), None


def _packed_product(x: torch.Tensor, packed: Tensors, problem: LinearProblem, tile: nibbles.Tile) -> torch.Tensor:
    """Multiply x [T, in] with the nibbles of some rows: [T, rows], unscaled without groups.

    A code is 2^b x upper digit + lower digit, with b = bits - 4; both digits are signed once their highest bit, worth
    half their range, is taken off. The upper's share of that is the code's own offset, the lower's is given back.
    """
    in_features, group_size = problem.in_features, problem.group_size or _product_group(problem.in_features)
    digits = nibbles.expand(packed, problem.bits, in_features, tile)
    pairs = torch.zeros(in_features // group_size, tile.num_rows, 2, dtype=torch.bfloat16)
    scale = packed["scale"][:, tile.rows] if problem.group_size else pairs.new_ones(1, 1)
    exponent = problem.bits - nibbles.NIBBLE
    offsets = _offsets(scale, packed, problem, tile)
    products = []
    for place, digit in enumerate(digits):
        pairs[..., 0] = scale * 2.0 ** (exponent - nibbles.NIBBLE * place)
        pairs[..., 1] = offsets[place]
        nibble_rows = digit.view(tile.num_rows, in_features // 2)
        products.append(torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibble_rows, group_size, pairs))
    result: torch.Tensor = products[0] if len(products) == 1 else products[0].float() + products[1]
    return result


def _offsets(
    scale: torch.Tensor, packed: Tensors, problem: LinearProblem, tile: nibbles.Tile
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Return what is added to every weight of a group with its upper digit, and with the lower if there is one.

    With zero points, the second is what rounding to bfloat16 leaves of the first.
    """
    half = 2.0 ** (problem.bits - nibbles.NIBBLE - 1) if problem.bits > nibbles.NIBBLE else 0.0
    if problem.symmetric:
        return scale * half if half else 0.0, 0.0
    zero_point = packed["zero_point"][:, tile.rows].to(torch.bfloat16)
    if not half:
        return zero_point.neg_().mul_(scale), 0.0
    exact = scale.float() * (half - zero_point)
    upper = exact.to(torch.bfloat16)
    return upper, exact - upper


def _integer_product(x: torch.Tensor, packed: Tensors, problem: LinearProblem, tile: nibbles.Tile) -> torch.Tensor:
    """Multiply codes [T, in] with the codes of some rows in integers: [T, rows], unscaled."""
    sums = torch._int_mm(x.to(torch.int8), _columns(packed, problem, tile, torch.int8))
    return sums.float().mul_(2.0 ** (problem.bits - 8))


def _widened_product(x: torch.Tensor, packed: Tensors, problem: LinearProblem, tile: nibbles.Tile) -> torch.Tensor:
    """Multiply x [T, in] with some rows in floating point: [T, rows], unscaled without groups."""
    dtype = tile_dtype(problem.dtype)
    columns = _columns(packed, problem, tile, dtype)
    factor = 2.0 ** (problem.bits - 8)
    if not problem.symmetric:
        # A difference of two 8-bit numbers has 8 bits: it is exact in every type, as are powers of two of it.
        zero_point = packed["zero_point"][:, tile.rows].to(dtype) * 2.0 ** (8 - problem.bits)
        columns.view(len(zero_point), -1, tile.num_rows).sub_(zero_point.unsqueeze(1))
    if problem.group_size is None:
        return (x.to(dtype) @ columns).float().mul_(factor)
    scale = (packed["scale"][:, tile.rows].to(dtype) * factor).unsqueeze(1)
    columns.view(-1, problem.group_size, tile.num_rows).mul_(scale)
    return x.to(dtype) @ columns


def _columns(packed: Tensors, problem: LinearProblem, tile: nibbles.Tile, dtype: torch.dtype) -> torch.Tensor:
    """Return code << (8 - bits) of some rows as a matrix [in, rows]; exact in every type."""
    num_blocks, half = tile.shape
    low, high = nibbles.signed_bytes(nibbles.expand(packed, problem.bits, problem.in_features, tile))
    columns = torch.empty(problem.in_features, tile.num_rows, dtype=dtype)
    pairs = columns.view(-1, num_blocks, *((half, 2) if tile.is_remainder else (2, half)))
    for part, codes in enumerate((low, high)):
        pairs.select(3 if tile.is_remainder else 2, part).copy_(codes.transpose(0, 1))
    return columns


def _product_group(in_features: int) -> int:
    return next(size for size in PRODUCT_GROUPS if in_features % size == 0)


KERNEL = LinearKernel(name="cpu-nibbles", storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
