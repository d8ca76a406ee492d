"""From stored tensors to linear layers: fuses what can be fused and chooses a kernel for each stored weight."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pressd.runtime.artifact.families import FusedGroup
from pressd.runtime.artifact.families import Linear as StoredLinear
from pressd.runtime.artifact.specs import Chain, LinearSpec, Masked, Packed, Sum, child_tensors
from pressd.runtime.kernels.catalogue import linear_kernels
from pressd.runtime.kernels.integer_codes import INPUT_SCALE
from pressd.runtime.kernels.mask import format as mask
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Preference, Tensors, select
from pressd.runtime.layers.embedding import Embedding
from pressd.runtime.layers.linear import ChainLinear, Linear, LinearLayer, SumLinear, UnfusedLinear
from pressd.runtime.report import KernelChoice

# Describes the shape of the stored weight, not its values; the problem carries the shape already.
_NOT_ROWS = "weight_shape"


class WeightSource(Protocol):
    """Where weights come from, by the names and prefixes of Hugging Face: a checkpoint, or what was just made."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor that is no linear's weight."""
        ...

    def linear(self, prefix: str) -> LinearSpec:
        """Return how the weight at `prefix` is stored."""
        ...

    def linear_tensors(self, prefix: str) -> Tensors:
        """Return the stored tensors of the weight at `prefix` by suffix."""
        ...

    def kv_scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scales of a layer's keys and values, float32 [1] each, where they have some."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one member of a fused group brings: a node of its spec with the tensors below it, and a bias or none."""

    spec: LinearSpec
    tensors: Tensors
    bias: torch.Tensor | None

    def child(self, name: str, *, keeps_bias: bool) -> "_Part":
        tensors = child_tensors(self.tensors, name)
        return _Part(spec=self.spec.children()[name], tensors=tensors, bias=self.bias if keeps_bias else None)


@dataclass(slots=True, kw_only=True)
class LinearLoader:
    """Loads linears from one source for one device and remembers which kernels were chosen."""

    checkpoint: WeightSource
    device: Device
    dtype: torch.dtype
    prefer: Preference
    unfused_groups: int = 0
    _choices: dict[tuple[str, str, str, tuple[str, ...]], int] = field(default_factory=dict)

    def load(self, group: FusedGroup) -> LinearLayer:
        """Load the members of a fused group, which share their input, as one layer with their outputs concatenated."""
        return self._layer([self._part(member) for member in group.members])

    def load_embedding(self, group: FusedGroup) -> Embedding:
        """Load the embedding with a kernel that can look up rows; a tied head multiplies with what that keeps."""
        (member,) = group.members
        part = self._part(member)
        problem = self._problem([part])
        kernel = self._choose(problem, looks_up=True)
        return Embedding(problem=problem, kernel=kernel, packed=kernel.pack(part.tensors, problem, self.device))

    def choices(self) -> tuple[KernelChoice, ...]:
        """Return each distinct choice with the number of layers it serves."""
        return tuple(
            KernelChoice(op=op, storage=storage, implementation=name, layers=layers, refusals=refusals)
            for (op, storage, name, refusals), layers in sorted(self._choices.items())
        )

    def _part(self, member: StoredLinear) -> _Part:
        bias = self.checkpoint.tensor(f"{member.prefix}.bias") if member.bias else None
        return _Part(
            spec=self.checkpoint.linear(member.prefix),
            tensors=self.checkpoint.linear_tensors(member.prefix),
            bias=None if bias is None else bias.to(self.device.torch_device, self.dtype),
        )

    def _layer(self, parts: Sequence[_Part]) -> LinearLayer:
        """Make one layer of members that share their input."""
        specs = [part.spec for part in parts]
        if all(isinstance(spec, Sum) for spec in specs):
            base = self._layer([part.child("base", keeps_bias=True) for part in parts])
            return SumLinear(
                base=base, residual=self._layer([part.child("residual", keeps_bias=False) for part in parts])
            )
        chains = [spec for spec in specs if isinstance(spec, Chain)]
        if len(chains) == len(parts):
            return ChainLinear(
                first=self._layer([part.child("b", keeps_bias=False) for part in parts]),
                seconds=tuple(self._layer([part.child("a", keeps_bias=True)]) for part in parts),
                ranks=tuple(chain.rank for chain in chains),
            )
        if len({_signature(spec) for spec in specs}) == 1 and _share_scales(parts):
            return self._fused(parts)
        self.unfused_groups += 1
        return UnfusedLinear(members=tuple(self._layer([part]) for part in parts))

    def _fused(self, parts: Sequence[_Part]) -> Linear:
        fused = {suffix: _joined(parts, suffix) for suffix in parts[0].tensors if not suffix.endswith(_NOT_ROWS)}
        problem = self._problem(parts)
        kernel = self._choose(problem)
        packed = kernel.pack(fused, problem, self.device)
        return Linear(problem=problem, kernel=kernel, packed=packed, bias=self._fuse_biases(parts))

    def _fuse_biases(self, parts: Sequence[_Part]) -> torch.Tensor | None:
        if all(part.bias is None for part in parts):
            return None
        device = self.device.torch_device
        rows = [
            torch.zeros(part.spec.out_features, dtype=self.dtype, device=device) if part.bias is None else part.bias
            for part in parts
        ]
        return torch.cat(rows)

    def _problem(self, parts: Sequence[_Part]) -> LinearProblem:
        spec = parts[0].spec
        stored = _stored(spec)
        assert stored is not None
        return LinearProblem(
            storage=mask.NAME if isinstance(spec, Masked) else stored.storage,
            bits=stored.bits,
            group_size=stored.group_size,
            activation_bits=stored.activation_bits,
            out_features=sum(part.spec.out_features for part in parts),
            in_features=spec.in_features,
            dtype=self.dtype,
            symmetric=stored.symmetric,
            block_size=stored.block_size,
            static_activations=stored.static_activations,
        )

    def _choose(self, problem: LinearProblem, *, looks_up: bool = False) -> LinearKernel:
        def why_not(kernel: LinearKernel) -> str | None:
            if looks_up and kernel.rows is None:
                return "its layout has no way to single rows"
            return kernel.why_not(problem, self.device)

        candidates = [kernel for kernel in linear_kernels(self.device) if kernel.storage == problem.storage]
        kernel, refusals = select(candidates, why_not, self.prefer)
        key = ("embedding" if looks_up else "linear", problem.storage, kernel.name, refusals)
        self._choices[key] = self._choices.get(key, 0) + 1
        return kernel


def _stored(spec: LinearSpec) -> Packed | None:
    """Return the one stored weight of a node, None for one with children of its own."""
    stored = spec.values if isinstance(spec, Masked) else spec
    return stored if isinstance(stored, Packed) else None


def _signature(spec: LinearSpec) -> tuple[object, ...]:
    """What members must agree in to be one matrix; a node with children of its own agrees with nothing."""
    stored = _stored(spec)
    if stored is None:
        return (id(spec),)
    # All that says how a weight is stored and multiplied, whatever its shape.
    return type(spec), dataclasses.replace(stored, out_features=0, in_features=0)


def _share_scales(parts: Sequence[_Part]) -> bool:
    """Whether scales of more than one output keep their place in one matrix.

    Activations that meet it have one scale; blocks of rows begin where those of each member do.
    """
    stored = _stored(parts[0].spec)
    if stored is None or len(parts) == 1:
        return True
    if stored.block_size is not None and any(part.spec.out_features % stored.block_size for part in parts[:-1]):
        return False
    return not stored.static_activations or len({part.tensors[INPUT_SCALE].item() for part in parts}) == 1


def _joined(parts: Sequence[_Part], suffix: str) -> torch.Tensor:
    """Return a tensor of all members as the fused weight has it."""
    members = [part.tensors[suffix] for part in parts]
    if len(members) == 1 or suffix == INPUT_SCALE:
        return members[0]
    stored = _stored(parts[0].spec)
    if stored is not None and suffix.endswith(packed_int.ZERO_POINT):
        return packed_int.join_zero_points(members, stored.bits, [part.spec.out_features for part in parts])
    # Every other stored tensor has one row (or one row of groups or blocks) per output, or per block of them.
    return torch.cat(members)
