"""A linear layer: stored tensors, the kernel chosen for them at load, and what that costs in memory."""

from dataclasses import dataclass, field

import torch

from pressd.runtime.artifact.families import FusedGroup
from pressd.runtime.artifact.families import Linear as StoredLinear
from pressd.runtime.artifact.reader import Checkpoint, LinearSpec
from pressd.runtime.kernels.catalogue import LINEAR
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Preference, Tensors, select
from pressd.runtime.request import KernelChoice

# Describes the shape of the stored weight, not its values; the problem carries the shape already.
_NOT_ROWS = "weight_shape"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = x W^T (+ bias) for x [T, in], with the kernel that was chosen for this weight."""

    problem: LinearProblem
    kernel: LinearKernel
    packed: Tensors
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.kernel.run(x, self.packed, self.problem)
        return y if self.bias is None else y + self.bias

    def tensors(self) -> list[torch.Tensor]:
        return [*self.packed.values(), *([] if self.bias is None else [self.bias])]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfusedLinear:
    """Members of a fused group that disagree in storage, scheme or group size: run apart, outputs side by side."""

    members: tuple[Linear, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([member(x) for member in self.members], dim=-1)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for member in self.members for tensor in member.tensors()]


@dataclass(slots=True, kw_only=True)
class LinearLoader:
    """Loads linears of one checkpoint for one device and remembers which kernels were chosen."""

    checkpoint: Checkpoint
    device: Device
    dtype: torch.dtype
    prefer: Preference
    unfused_groups: int = 0
    _choices: dict[tuple[str, str, tuple[str, ...]], int] = field(default_factory=dict)

    def load(self, group: FusedGroup) -> Linear | UnfusedLinear:
        """Load the members of a fused group, which share their input, as one layer with their outputs concatenated."""
        specs = [self.checkpoint.linear(member.prefix) for member in group.members]
        if len({(s.storage, s.bits, s.group_size, s.activation_bits) for s in specs}) == 1:
            return self._load_fused(specs, group.members)
        self.unfused_groups += 1
        pairs = zip(specs, group.members, strict=True)
        return UnfusedLinear(members=tuple(self._load_fused([spec], (member,)) for spec, member in pairs))

    def from_dense(self, weight: torch.Tensor) -> Linear:
        """Make a linear of a weight [out, in] that is in memory already, without copying it (tied embeddings)."""
        spec = LinearSpec(
            storage="dense",
            bits=weight.dtype.itemsize * 8,
            group_size=None,
            activation_bits=16,
            out_features=weight.size(0),
            in_features=weight.size(1),
        )
        return self._choose([spec], {"weight": weight}, None)

    def choices(self) -> tuple[KernelChoice, ...]:
        """Return each distinct choice with the number of layers it serves."""
        return tuple(
            KernelChoice(op="linear", storage=storage, implementation=name, layers=layers, refusals=refusals)
            for (storage, name, refusals), layers in sorted(self._choices.items())
        )

    def _load_fused(self, specs: list[LinearSpec], members: tuple[StoredLinear, ...]) -> Linear:
        stored = [self.checkpoint.linear_tensors(member.prefix) for member in members]
        # Every stored tensor has one row (or one row of groups) per output, so fusing is concatenation.
        fused = {
            suffix: torch.cat([tensors[suffix] for tensors in stored]) if len(stored) > 1 else stored[0][suffix]
            for suffix in stored[0]
            if suffix != _NOT_ROWS
        }
        return self._choose(specs, fused, self._fuse_biases(members))

    def _fuse_biases(self, members: tuple[StoredLinear, ...]) -> torch.Tensor | None:
        if not any(member.bias for member in members):
            return None
        rows = [
            self.checkpoint.tensor(f"{member.prefix}.bias") if member.bias else torch.zeros(member.out_features)
            for member in members
        ]
        return torch.cat([row.to(self.device.torch_device, self.dtype) for row in rows])

    def _choose(self, specs: list[LinearSpec], tensors: Tensors, bias: torch.Tensor | None) -> Linear:
        problem = LinearProblem(
            storage=specs[0].storage,
            bits=specs[0].bits,
            group_size=specs[0].group_size,
            activation_bits=specs[0].activation_bits,
            out_features=sum(spec.out_features for spec in specs),
            in_features=specs[0].in_features,
            dtype=self.dtype,
        )
        candidates = [kernel for kernel in LINEAR if kernel.storage == problem.storage]
        kernel, refusals = select(candidates, lambda k: k.why_not(problem, self.device), self.prefer)
        key = (problem.storage, kernel.name, refusals)
        self._choices[key] = self._choices.get(key, 0) + 1
        packed = kernel.pack(tensors, problem, self.device)
        return Linear(problem=problem, kernel=kernel, packed=packed, bias=bias)
