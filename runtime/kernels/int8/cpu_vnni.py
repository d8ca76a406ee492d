"""W8A8 on a CPU that multiplies bytes."""

from pressd.runtime.kernels import vnni_linear
from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return vnni_linear.pack(lambda rows: tensors["weight"][rows], tensors["weight_scale"], problem)


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
