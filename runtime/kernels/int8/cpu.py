"""W8A8 on a CPU: int8 dot products where the hardware's are exact, widened weights where they are not.

Without VNNI, x86 multiplies unsigned by signed bytes into saturating 16-bit sums: oneDNN's int8 product was measured to
be off by a fifth of the largest output on full-range operands. There, activation codes (exact in bfloat16 and float32)
meet the int8 weight in floating point.
"""

import torch

from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.int8.reference import quantize_rows
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors
from pressd.runtime.kernels.widened import matmul_rows

# Rows up to which the bfloat16 x int8 kernel beats widening, on 2 Zen 3 cores at 2048 x 2048 (tests/bench/linears.py).
FEW_ROWS = 32


def _not_w8a8(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.activation_bits != 8 or problem.group_size is not None:
        return "serves int8 activations and one scale per output row"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32, less than {problem.dtype}"
    return None


def _not_prepacked(problem: LinearProblem, device: Device) -> str | None:
    if (reason := _not_w8a8(problem, device)) is not None:
        return reason
    if "vnni" not in device.features:
        return "this CPU has no VNNI: its int8 products saturate at 16 bits"
    return None


def _pack_prepacked(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return {
        "prepacked": torch.ops.onednn.qlinear_prepack(tensors["weight"], None),
        "scale": tensors["weight_scale"].float().flatten(),
        "zero_points": torch.zeros(problem.out_features, dtype=torch.int32),
    }


def _run_prepacked(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    if x.size(0) == 0:
        return x.new_zeros(0, problem.out_features)
    codes, x_scale = quantize_rows(x)
    # Unsigned activations and float32 output: signed ones or bfloat16 output fall to oneDNN's slow reference path.
    products: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes.add_(128).to(torch.uint8),
        1.0,
        128,
        packed["prepacked"],
        packed["scale"],
        packed["zero_points"],
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return products.mul_(x_scale).to(problem.dtype)


def _pack_widened(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return {
        "codes": tensors["weight"].contiguous(),
        "scale": tensors["weight_scale"].float().flatten(),
        "ones": torch.ones(problem.out_features, dtype=torch.bfloat16),
    }


def _run_widened(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    weight = packed["codes"]
    codes, x_scale = quantize_rows(x)
    if problem.dtype == torch.bfloat16 and 0 < x.size(0) <= FEW_ROWS:
        products = torch._weight_int8pack_mm(codes.to(torch.bfloat16), weight, packed["ones"]).float()
    else:

        def widen(rows: slice, tile: torch.Tensor) -> None:
            tile.copy_(weight[rows])

        products = matmul_rows(codes, problem.out_features, widen)
    return products.mul_(x_scale).mul_(packed["scale"]).to(problem.dtype)


PREPACKED = LinearKernel(
    name="cpu-onednn", storage=disk.NAME, why_not=_not_prepacked, pack=_pack_prepacked, run=_run_prepacked
)
WIDENED = LinearKernel(name="cpu-widened", storage=disk.NAME, why_not=_not_w8a8, pack=_pack_widened, run=_run_widened)
