"""Between weights and stored tensors, whatever the storage: the workshop's half of each format's encode and decode."""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from pressd.runtime.artifact.specs import Chain, LinearSpec, Masked, Packed, Sum, child_tensors
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.integer_codes import dequantize
from pressd.runtime.kernels.mask import format as mask
from pressd.runtime.kernels.packed_int import format as packed_int


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A weight [out, in] that a pass has rounded: codes int8 or e4m3 [out, in], and scale [out, groups].

    With blocks, scale is [ceil(out / size), in / size]. `zero_point` int8 [out, groups] is None for symmetric weights.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def decoded(self, rows: slice, spec: Packed, dtype: torch.dtype) -> Tensor:
        """Return some rows of the weight in `dtype`, as `decode` does it."""
        if spec.storage == fp8.NAME:
            numbers = torch.arange(len(self.codes))[rows]
            return fp8.dequantize(self.codes[rows], fp8.of_rows(self.scale, numbers, spec.block_size), dtype)
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return dequantize(self.codes[rows], self.scale[rows], dtype, zero_point)


def encode(
    codes: Tensor,
    scale: Tensor,
    spec: Packed,
    *,
    zero_point: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the tensors to store, by suffix, for what `Codes` says of a weight, and for activations' scale [1].

    `zero_point` is there if the spec has zero points, `input_scale`, in the type of scales, if activations are static.
    """
    assert (zero_point is None) == spec.symmetric
    assert (input_scale is None) != spec.static_activations
    if spec.storage == fp8.NAME:
        return fp8.encode(codes, scale, input_scale)
    if spec.storage == int8.NAME:
        return int8.encode(codes, scale, input_scale)
    assert spec.storage == packed_int.NAME
    return packed_int.encode(codes, scale, spec.bits, zero_point)


def decode(tensors: dict[str, Tensor], spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype` that the stored tensors stand for."""
    match spec:
        case Packed():
            return _decode_packed(tensors, spec, dtype)
        case Masked():
            values = _decode_packed(child_tensors(tensors, "values"), spec.values, dtype)
            return mask.expand(values, mask.unpack(tensors["mask"], spec.in_features))
        case Chain():
            wide = torch.promote_types(dtype, torch.float32)
            factors = (
                _decode_packed(child_tensors(tensors, name), leaf, wide)
                for name, leaf in (("a", spec.a), ("b", spec.b))
            )
            a, b = factors
            return (a @ b).to(dtype)
        case Sum():
            wide = torch.promote_types(dtype, torch.float32)
            base = decode(child_tensors(tensors, "base"), spec.base, wide)
            return (base + decode(child_tensors(tensors, "residual"), spec.residual, wide)).to(dtype)
        case _:
            assert_never(spec)


def whole(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return a child's tensors by their suffixes in its parent: the inverse of `child_tensors`."""
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _decode_packed(tensors: dict[str, Tensor], spec: Packed, dtype: torch.dtype) -> Tensor:
    if spec.storage == dense.NAME:
        return dense.decode(tensors, dtype)
    if spec.storage == fp8.NAME:
        return fp8.decode(tensors, dtype, spec.block_size)
    if spec.storage == int8.NAME:
        return int8.decode(tensors, dtype)
    assert spec.storage == packed_int.NAME
    return packed_int.decode(tensors, spec.bits, spec.group_size, dtype)
