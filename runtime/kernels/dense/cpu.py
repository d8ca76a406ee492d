"""Dense 16-bit weights on a CPU without arithmetic for them.

There, PyTorch's matrix product falls far below float32's rate while its matrix-vector product still reads half the
bytes: few rows use the latter, more rows widen the weight tile by tile. Elsewhere the reference is the library's best.
"""

import torch

from pressd.runtime.kernels.crossovers import few_rows
from pressd.runtime.kernels.dense import format as disk
from pressd.runtime.kernels.dense import reference
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors
from pressd.runtime.kernels.widened import matmul_rows

BRANCHES = {torch.bfloat16: "dense bf16", torch.float16: "dense fp16"}


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.dtype not in BRANCHES:
        return f"serves 16-bit types; {problem.dtype} is native"
    if problem.dtype == torch.bfloat16 and "bf16" in device.features:
        return "this CPU has bfloat16 arithmetic"
    return None


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    weight = packed["weight"]
    if x.size(0) <= few_rows(BRANCHES[problem.dtype]):
        return torch.nn.functional.linear(x, weight)

    def widen(rows: slice, tile: torch.Tensor) -> None:
        tile.copy_(weight[rows])

    return matmul_rows(x, problem.out_features, torch.float32, widen).to(problem.dtype)


KERNEL = LinearKernel(
    name="cpu-widened", storage=disk.NAME, why_not=why_not, pack=reference.pack, run=run, rows=reference.rows
)
