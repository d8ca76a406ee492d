"""Dense bfloat16 on a CPU without bfloat16 arithmetic.

There, PyTorch's matrix product falls to a fifth of float32's rate while its matrix-vector product still reads half the
bytes: few rows use the latter, more rows widen the weight tile by tile. Elsewhere the reference is the library's best.
"""

import torch

from pressd.runtime.kernels.dense import format as disk
from pressd.runtime.kernels.dense import reference
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors
from pressd.runtime.kernels.widened import matmul_rows

# Rows up to which the bfloat16 product is faster, on 2 Zen 3 cores at 2048 x 2048 (tests/bench/linears.py).
FEW_ROWS = 8


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.dtype != torch.bfloat16:
        return f"serves bfloat16; {problem.dtype} is native"
    if "bf16" in device.features:
        return "this CPU has bfloat16 arithmetic"
    return None


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    weight = packed["weight"]
    if x.size(0) <= FEW_ROWS:
        return torch.nn.functional.linear(x, weight)

    def widen(rows: slice, tile: torch.Tensor) -> None:
        tile.copy_(weight[rows])

    return matmul_rows(x, problem.out_features, widen).to(problem.dtype)


KERNEL = LinearKernel(name="cpu-widened", storage=disk.NAME, why_not=why_not, pack=reference.pack, run=run)
