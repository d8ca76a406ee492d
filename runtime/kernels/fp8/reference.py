"""Eight-bit floats, with activations of the same kind or without, plain torch."""

import torch

from pressd.runtime.kernels.fp8 import format as disk
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return {
        "codes": tensors["weight"].to(device.torch_device),
        "scale": tensors["weight_scale"].to(device.torch_device),
    }


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x [T, in] by the largest value of each row: codes e4m3 [T, in] and scale [T, 1], float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(dim=-1, keepdim=True) / disk.LARGEST).clamp_min(torch.finfo(wide.dtype).tiny)
    return (wide / scale).clamp(-disk.LARGEST, disk.LARGEST).to(disk.CODES), scale


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes, scale = packed["codes"], packed["scale"]
    if problem.activation_bits == 16:
        weight = disk.decode({"weight": codes, "weight_scale": scale}, problem.dtype)
        return torch.nn.functional.linear(x, weight)
    x_codes, x_scale = quantize_activations(x)
    # Products of two codes have 8 bits of significand: exact in float32, as the sums of a tensor core are meant to be.
    products = torch.nn.functional.linear(x_codes.to(x_scale.dtype), codes.to(x_scale.dtype))
    return (products * x_scale * scale.to(products.dtype).T).to(problem.dtype)


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    # Bytes are gathered: not every device indexes this type.
    chosen = packed["codes"].view(torch.uint8)[ids].view(disk.CODES)
    return disk.decode({"weight": chosen, "weight_scale": packed["scale"][ids]}, problem.dtype)


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
