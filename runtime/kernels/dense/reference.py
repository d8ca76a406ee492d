"""Dense linear, plain torch."""

import torch

from pressd.runtime.kernels.dense import format as disk
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return {"weight": disk.decode(tensors, problem.dtype).to(device.torch_device)}


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return torch.nn.functional.linear(x, packed["weight"])


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return torch.nn.functional.embedding(ids, packed["weight"])


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run, rows=rows)
