"""4- and 8-bit weights with 8-bit activations on a CPU that multiplies bytes."""

import torch

from pressd.runtime.kernels import vnni_linear
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import Device, LinearProblem, Tensors


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    words = tensors["weight_packed"]

    def codes(rows: slice) -> torch.Tensor:
        return disk.unpack(words[rows], problem.bits, problem.in_features)

    return vnni_linear.pack(codes, tensors["weight_scale"], problem)


KERNEL = vnni_linear.kernel(disk.NAME, pack)
