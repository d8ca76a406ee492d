"""8-bit weights without groups on a CPU: the stored bytes, made signed, multiplied where they lie or widened."""

import torch

from pressd.runtime.kernels import byte_codes
from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    unsigned = tensors["weight_packed"].view(torch.uint8)[:, : problem.in_features]
    return {
        # Taking 128 off an unsigned byte is flipping its highest bit.
        "codes": (unsigned ^ 0x80).view(torch.int8).contiguous(),
        "scale": tensors["weight_scale"],
    }


KERNEL = LinearKernel(
    name="cpu-bytes",
    storage=disk.NAME,
    why_not=byte_codes.why_not,
    pack=pack,
    run=byte_codes.run,
    rows=byte_codes.rows,
)
