"""Packed integers decoded to a dense weight at every call, plain torch."""

import torch

from pressd.runtime.kernels.integer_codes import dequantize, round_activations
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    packed = {name: tensors[name].to(device.torch_device) for name in ("weight_packed", "weight_scale")}
    if not problem.symmetric:  # unpacked, for a row of a weight has no words of its own among them
        zero_point = tensors[disk.ZERO_POINT].to(device.torch_device)
        packed["zero_point"] = disk.unpack_zero_points(zero_point, problem.bits, problem.out_features)
    return packed


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    seen = x if problem.activation_bits == 16 else round_activations(x, problem.group_size)
    return torch.nn.functional.linear(seen, _decode(packed, problem))


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return _decode({name: tensor[ids] for name, tensor in packed.items()}, problem)


def _decode(packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    """Return the rows of W that `packed` has, in the problem's dtype."""
    codes = disk.unpack(packed["weight_packed"], problem.bits, problem.in_features)
    return dequantize(codes, packed["weight_scale"], problem.dtype, packed.get("zero_point"))


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
