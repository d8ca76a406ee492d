"""W8A8 on a CPU that multiplies bytes."""

from pressd.runtime.kernels import vnni_linear
from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.registry import Device, LinearProblem, Tensors


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return vnni_linear.pack(lambda rows: tensors["weight"][rows], tensors["weight_scale"], problem)


KERNEL = vnni_linear.kernel(disk.NAME, pack)
