"""Int8 weights, with int8 activations per token (W8A8) or without, plain torch."""

import torch

from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.integer_codes import dequantize
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors

# The symmetric 8-bit range is 255 steps wide: compressed-tensors' convention for activations as for weights.
HALF_RANGE = 127.5


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its own maximum: codes (whole numbers in -128..127, float) and scale [rows, 1].

    In float32 or wider; a row of zeros gets scale 1.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1, keepdim=True) / HALF_RANGE
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale).round_().clamp_(-128, 127), scale


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    wide = torch.promote_types(problem.dtype, torch.float32)
    return {
        "codes": tensors["weight"].to(device.torch_device),
        "scale": tensors["weight_scale"].to(device.torch_device, wide),
    }


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes, scale = packed["codes"], packed["scale"]
    if problem.activation_bits == 16:
        return torch.nn.functional.linear(x, dequantize(codes, scale, problem.dtype))
    x_codes, x_scale = quantize_rows(x)
    products = torch.nn.functional.linear(x_codes, codes.to(x_codes.dtype))
    return (products * x_scale * scale.T).to(problem.dtype)


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run)
