"""Eight-bit floats, with activations of the same kind or without, plain torch."""

import torch

from pressd.runtime.kernels.fp8 import format as disk
from pressd.runtime.kernels.integer_codes import INPUT_SCALE
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    packed = {
        "codes": tensors["weight"].to(device.torch_device),
        "scale": tensors["weight_scale"].to(device.torch_device),
    }
    if problem.static_activations:
        packed["input_scale"] = tensors[INPUT_SCALE].to(device.torch_device)
    return packed


def quantize_activations(x: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x [T, in] by the largest value of each row, or of each group of columns of a row.

    Returns codes e4m3 [T, in] and scale [T, groups] in float32 or wider.
    """
    num_rows, in_features = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    group = group_size or in_features
    groups = wide.view(num_rows, in_features // group, group)
    scale = (groups.abs().amax(dim=-1) / disk.LARGEST).clamp_min(torch.finfo(wide.dtype).tiny)
    codes = (groups / scale.unsqueeze(-1)).clamp(-disk.LARGEST, disk.LARGEST).to(disk.CODES)
    return codes.view(x.shape), scale


def quantize_activations_by(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x [T, in] by the scale [1] that is stored for all of x, and clamp what is beyond +-448.

    Returns codes e4m3 [T, in] and that scale in float32 or wider. Static quantisation as compressed-tensors does it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = input_scale.to(wide.dtype)
    return (wide / scale).clamp(-disk.LARGEST, disk.LARGEST).to(disk.CODES), scale


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes, scale = packed["codes"], packed["scale"]
    if problem.activation_bits == 16:
        weight = disk.decode({"weight": codes, "weight_scale": scale}, problem.dtype)
        return torch.nn.functional.linear(x, weight)
    if problem.block_size is not None:
        return _run_blocks(x, packed, problem, problem.block_size)
    if problem.static_activations:
        x_codes, x_scale = quantize_activations_by(x, packed["input_scale"])
    else:
        x_codes, x_scale = quantize_activations(x)
    # Products of two codes have 8 bits of significand: exact in float32, as the sums of a tensor core are meant to be.
    products = torch.nn.functional.linear(x_codes.to(x_scale.dtype), codes.to(x_scale.dtype))
    return (products * x_scale * scale.to(products.dtype).T).to(problem.dtype)


def _run_blocks(x: torch.Tensor, packed: Tensors, problem: LinearProblem, block_size: int) -> torch.Tensor:
    """Multiply rows and weights that are decoded in float32 or wider: their scales differ within a sum."""
    x_codes, x_scale = quantize_activations(x, block_size)
    seen = disk.dequantize(x_codes, x_scale, x_scale.dtype)
    weight = disk.decode({"weight": packed["codes"], "weight_scale": packed["scale"]}, seen.dtype, block_size)
    return torch.nn.functional.linear(seen, weight).to(problem.dtype)


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    # Bytes are gathered: not every device indexes this type.
    chosen = packed["codes"].view(torch.uint8)[ids].view(disk.CODES)
    return disk.dequantize(chosen, disk.of_rows(packed["scale"], ids, problem.block_size), problem.dtype)


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
