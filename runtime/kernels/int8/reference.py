"""Int8 weights, with int8 activations (W8A8) or without, plain torch."""

import torch

from pressd.runtime.kernels.byte_codes import activations, keep_input_scale, rows
from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.integer_codes import dequantize, round_activations
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    packed = {
        "codes": tensors["weight"].to(device.torch_device),
        "scale": tensors["weight_scale"].to(device.torch_device),
    }
    return keep_input_scale(packed, tensors, problem, device)


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes, scale = packed["codes"], packed["scale"]
    if problem.activation_bits == 16 or problem.group_size is not None:
        seen = x if problem.activation_bits == 16 else round_activations(x, problem.group_size)
        return torch.nn.functional.linear(seen, dequantize(codes, scale, problem.dtype))
    x_codes, x_scale = activations(x, packed, problem)
    products = torch.nn.functional.linear(x_codes, codes.to(x_codes.dtype))
    return (products * x_scale * scale.to(products.dtype).T).to(problem.dtype)


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
