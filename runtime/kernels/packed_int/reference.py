"""Packed integers decoded to a dense weight at every call, plain torch."""

import torch

from pressd.runtime.kernels.integer_codes import round_activations
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return {
        "weight_packed": tensors["weight_packed"].to(device.torch_device),
        "weight_scale": tensors["weight_scale"].to(device.torch_device),
        "weight_shape": torch.tensor([problem.out_features, problem.in_features]),
    }


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    seen = x if problem.activation_bits == 16 else round_activations(x, problem.group_size)
    return torch.nn.functional.linear(seen, disk.decode(packed, problem.bits, problem.group_size, problem.dtype))


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    chosen = {
        "weight_packed": packed["weight_packed"][ids],
        "weight_scale": packed["weight_scale"][ids],
        "weight_shape": torch.tensor([ids.numel(), problem.in_features]),
    }
    return disk.decode(chosen, problem.bits, problem.group_size, problem.dtype)


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
