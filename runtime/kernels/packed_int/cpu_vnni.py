"""4- and 8-bit weights with 8-bit activations on a CPU that multiplies bytes."""

import torch

from pressd.runtime.kernels import vnni_linear
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    words = tensors["weight_packed"]

    def codes(rows: slice) -> torch.Tensor:
        return disk.unpack(words[rows], problem.bits, problem.in_features)

    return vnni_linear.pack(codes, tensors["weight_scale"], problem)


KERNEL = LinearKernel(
    name="cpu-vnni",
    storage=disk.NAME,
    why_not=vnni_linear.why_not,
    pack=pack,
    run=vnni_linear.run,
    rows=vnni_linear.rows,
    codes=vnni_linear.codes_wanted,
    run_codes=vnni_linear.run_codes,
)
