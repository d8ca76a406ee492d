"""How much memory pressing needs, from shapes alone.

For a weight of n = out x in numbers, i bytes each in the artifact's precision, w bytes in float32 or the source's wider
type, k = min(out, in), s bytes stored. What each step of press_linear and decode holds at its highest, the mapped
source not counted:

    cast       i n, held throughout, where the source has another precision
    packed     2 n + scales, pieces being joined; for packed_int 5 n + scales, codes made unsigned in 16 bits; zero
               points, of a byte each until they are packed, count as scales
    masked     (8 + 2 i) n, magnitudes sorted in fours with their positions in int64
    chain      w (2 n + k (out + in) + 4 k^2), an SVD: its input, a copy, U and V, LAPACK's workspace
    sum        the base as stored, and the SVD of what it lost
    decoding   into w bytes: packed_int w n + n and 1 + w for each zero point, int8 w n, masked 1.5 w n + n, chain w n,
               sum 3 w n

Comparing with the source widens pieces of a million numbers. Beside these the last pressed linear of an unfinished file
is kept as it is stored, and read once more when its file is complete (reread.py).
"""

import math
from collections.abc import Callable
from typing import assert_never

import torch

from pressd.compress.plan import Plan
from pressd.compress.rows import PIECE_NUMBERS
from pressd.runtime.artifact.specs import Chain, LinearSpec, Masked, Packed, Sum
from pressd.runtime.kernels.packed_int import format as packed_int

# Squares of k in LAPACK's workspace (gesdd, JOBZ = 'S'), which it asks for itself.
_WORKSPACE_SQUARES = 4


def peak_bytes(plan: Plan, source: torch.dtype, file_of: Callable[[str], str]) -> int:
    """Return the most bytes that pressing by `plan` holds at once, beyond the process as it begins.

    `source` is the precision of the source's weights, whose mapped pages are not counted: the system may take them
    back. `file_of` says which weight file a tensor goes to.
    """
    linears = [
        (file_of(f"{prefix}.{next(iter(spec.layout(plan.dtype)))}"), spec)
        for group in plan.groups()
        for prefix, spec in group.specs.items()
    ]
    last_of = {file: index for index, (file, _) in enumerate(linears)}
    kept: dict[str, LinearSpec] = {}
    peak = 0
    for index, (file, spec) in enumerate(linears):
        held = sum(kept_spec.stored_bytes(plan.dtype) for kept_spec in kept.values())
        peak = max(peak, held + press_bytes(spec, source, plan.dtype))
        if not spec.is_dense:
            kept[file] = spec
        if last_of[file] == index and file in kept:
            peak = max(peak, _reread_bytes(kept.pop(file), plan.dtype))
    return peak


def press_bytes(spec: LinearSpec, source: torch.dtype, dtype: torch.dtype) -> int:
    """Return the most bytes that pressing one weight holds at once, its stored tensors included."""
    size = _size(spec)
    cast = 0 if source == dtype else size * dtype.itemsize
    if isinstance(spec, Packed):
        codes = 0 if spec.is_dense else size + _scales(spec, dtype)
        return cast + max(_pressing(spec, dtype), codes + _compared(size, source, dtype if spec.is_dense else None))
    # What is not one stored weight is decoded as a whole to be compared.
    wide = torch.promote_types(dtype, torch.float32)
    compared = size * wide.itemsize + _compared(size, source, wide)
    return cast + max(_pressing(spec, dtype), spec.stored_bytes(dtype) + max(decode_bytes(spec, dtype, wide), compared))


def _compared(size: int, source: torch.dtype, ours: torch.dtype | None) -> int:
    """Temporaries of one piece: our numbers and the source's, widened unless they are wide, and their difference.

    `ours` is the type that they are in already, None if they are decoded piece by piece.
    """
    wide = torch.promote_types(source, torch.float32)
    return min(size, PIECE_NUMBERS) * wide.itemsize * ((ours != wide) + (source != wide) + 1)


def decode_bytes(spec: LinearSpec, dtype: torch.dtype, wide: torch.dtype) -> int:
    """Return the most bytes that decoding into `wide` holds at once, the result included, the stored not."""
    size, w = _size(spec), wide.itemsize
    match spec:
        case Packed():
            zero_points = 0 if spec.symmetric else math.prod(spec.layout(dtype)["weight_scale"][1]) * (1 + w)
            return (size * w if not spec.is_dense or dtype != wide else 0) + _codes_apart(spec) + zero_points
        case Masked():
            return decode_bytes(spec.values, dtype, wide) - _codes_apart(spec.values) + size + size * w
        case Chain():
            return size * w + decode_bytes(spec.a, dtype, wide) + decode_bytes(spec.b, dtype, wide)
        case Sum():
            return max(3 * size * w, size * w + decode_bytes(spec.residual, dtype, wide))
        case _:
            assert_never(spec)


def _pressing(spec: LinearSpec, dtype: torch.dtype) -> int:
    """What making a node's tensors holds, of a weight that is in `dtype` already."""
    size, wide = _size(spec), torch.promote_types(dtype, torch.float32)
    match spec:
        case Packed():
            if spec.is_dense:
                return 0
            scales = _scales(spec, dtype)
            return max(2 * (size + scales), 5 * size + scales if spec.storage == packed_int.NAME else 0)
        case Masked():
            kept = size + _size(spec.values) * dtype.itemsize
            return max((8 + 2 * dtype.itemsize) * size, kept + _pressing(spec.values, dtype))
        case Chain():
            return (0 if wide == dtype else size * wide.itemsize) + _svd(spec, wide)
        case Sum():
            base = spec.base.stored_bytes(dtype)
            widened = 0 if wide == dtype else size * wide.itemsize
            losing = widened + max(decode_bytes(spec.base, dtype, wide), 2 * size * wide.itemsize)
            return max(_pressing(spec.base, dtype), base + losing, base + size * wide.itemsize + _svd(spec, wide))
        case _:
            assert_never(spec)


def _svd(spec: LinearSpec, wide: torch.dtype) -> int:
    """A copy of the input by columns, U, V, and the workspace; lower orders are left out."""
    k = min(spec.out_features, spec.in_features)
    return wide.itemsize * (_size(spec) + k * (spec.out_features + spec.in_features) + _WORKSPACE_SQUARES * k * k)


def _reread_bytes(spec: LinearSpec, dtype: torch.dtype) -> int:
    """What was kept, and what is read to be compared with it."""
    return 2 * spec.stored_bytes(dtype)


def _size(spec: LinearSpec) -> int:
    return spec.out_features * spec.in_features


def _scales(spec: Packed, dtype: torch.dtype) -> int:
    kind, shape = spec.layout(dtype)["weight_scale"]
    return math.prod(shape) * (kind.itemsize + (0 if spec.symmetric else 1))


def _codes_apart(spec: Packed) -> int:
    """Bytes of the codes that unpacking makes; int8 stores them as they are."""
    return _size(spec) if spec.storage == packed_int.NAME else 0
