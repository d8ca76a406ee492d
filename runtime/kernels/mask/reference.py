"""Two of four weights, put back in their places at every call, plain torch: small in memory, not fast."""

import torch

from pressd.runtime.kernels.dense import format as dense
from pressd.runtime.kernels.mask import format as disk
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import REFERENCE, Device, LinearKernel, LinearProblem, Tensors

_VALUES = "values."


def why_not(problem: LinearProblem, device: Device) -> str | None:
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    return {name: tensor.to(device.torch_device) for name, tensor in tensors.items()}


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    kept = disk.unpack(packed["mask"], problem.in_features)
    return torch.nn.functional.linear(x, disk.expand(_values(packed, problem), kept))


def _values(packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    """Decode [out, in / 2]; which format stored them shows in the names of its tensors."""
    stored = {name.removeprefix(_VALUES): tensor for name, tensor in packed.items() if name.startswith(_VALUES)}
    if "weight_packed" in stored:
        stored["weight_shape"] = torch.tensor([problem.out_features, problem.in_features // 2])
        return packed_int.decode(stored, problem.bits, problem.group_size, problem.dtype)
    return dense.decode(stored, problem.dtype)


KERNEL = LinearKernel(name=REFERENCE, storage=disk.NAME, why_not=why_not, pack=pack, run=run)
