"""Between codes and stored tensors, whatever the storage: the workshop's half of each format's encode and decode."""

import torch
from torch import Tensor

from pressd.runtime.artifact.schemes import LinearSpec
from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.packed_int import format as packed_int


def encode(codes: Tensor, scale: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Return the tensors to store, by suffix, for codes int8 [out, in] and scale [out, groups]."""
    if spec.storage == int8.NAME:
        return int8.encode(codes, scale)
    assert spec.storage == packed_int.NAME
    return packed_int.encode(codes, scale, spec.bits)


def decode(tensors: dict[str, Tensor], spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in `dtype` that the stored tensors stand for."""
    if spec.storage == dense.NAME:
        return dense.decode(tensors, dtype)
    if spec.storage == int8.NAME:
        return int8.decode(tensors, dtype)
    assert spec.storage == packed_int.NAME
    return packed_int.decode(tensors, spec.bits, spec.group_size, dtype)
