"""Linear layers: one stored weight with its kernel, and what sums, products and fused groups make of such."""

from dataclasses import dataclass
from typing import Protocol

import torch

from pressd.runtime.kernels.registry import CodeType, LinearKernel, LinearProblem, QuantizedRows, Rows, Tensors


class LinearLayer(Protocol):
    """Maps x [T, in] to [T, out]; `tensors` are all it keeps in memory.

    `wants` is what it would rather get x as, in QuantizedRows; None: it takes tensors only.
    """

    @property
    def wants(self) -> CodeType | None: ...

    def __call__(self, x: Rows) -> torch.Tensor: ...

    def tensors(self) -> list[torch.Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = x W^T (+ bias) for x [T, in], with the kernel that was chosen for this weight."""

    problem: LinearProblem
    kernel: LinearKernel
    packed: Tensors
    bias: torch.Tensor | None = None

    @property
    def wants(self) -> CodeType | None:
        return None if self.kernel.codes is None else self.kernel.codes(self.problem)

    def __call__(self, x: Rows) -> torch.Tensor:
        if isinstance(x, QuantizedRows):
            assert self.kernel.run_codes is not None, f"{self.kernel.name} takes no codes"
            y = self.kernel.run_codes(x, self.packed, self.problem)
        else:
            y = self.kernel.run(x, self.packed, self.problem)
        return y if self.bias is None else y + self.bias

    def tensors(self) -> list[torch.Tensor]:
        return [*self.packed.values(), *([] if self.bias is None else [self.bias])]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfusedLinear:
    """Members of a fused group that disagree in storage, scheme or group size: run apart, outputs side by side."""

    members: tuple[LinearLayer, ...]

    @property
    def wants(self) -> CodeType | None:
        return None

    def __call__(self, x: Rows) -> torch.Tensor:
        return torch.cat([member(x) for member in self.members], dim=-1)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for member in self.members for tensor in member.tensors()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLinear:
    """W = A B for each member of a fused group: all B in one layer, as they share x, then each A on its part."""

    first: LinearLayer
    seconds: tuple[LinearLayer, ...]
    ranks: tuple[int, ...]

    @property
    def wants(self) -> CodeType | None:
        return None

    def __call__(self, x: Rows) -> torch.Tensor:
        parts = torch.split(self.first(x), list(self.ranks), dim=-1)
        outputs = [second(part.contiguous()) for second, part in zip(self.seconds, parts, strict=True)]
        return torch.cat(outputs, dim=-1)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in (self.first, *self.seconds) for tensor in layer.tensors()]


@dataclass(frozen=True, slots=True, kw_only=True)
class SumLinear:
    """W = base + residual."""

    base: LinearLayer
    residual: LinearLayer

    @property
    def wants(self) -> CodeType | None:
        return None

    def __call__(self, x: Rows) -> torch.Tensor:
        return self.base(x) + self.residual(x)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.base.tensors(), *self.residual.tensors()]
