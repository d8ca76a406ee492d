"""Packed integers decoded to a dense weight at every call, plain torch."""

import torch

from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    shape = torch.tensor([problem.out_features, problem.in_features])
    return {
        "weight_packed": tensors["weight_packed"].to(device.torch_device),
        "weight_scale": tensors["weight_scale"].to(device.torch_device),
        "weight_shape": shape,
    }


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return torch.nn.functional.linear(x, disk.decode(packed, problem.bits, problem.group_size, problem.dtype))


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run)
