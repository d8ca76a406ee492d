"""Linears that gradients pass through while a layer is tuned: those that are learnt, and those that stay."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.decision import Decision
from pressd.runtime.kernels.integer_codes import quantize_activations_by, round_activations
from pressd.runtime.kernels.registry import CodeType, Rows
from pressd.runtime.layers.linear import LinearLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningLinear:
    """A linear whose weight is being learnt; x is rounded as it will be where activations are."""

    weight: Callable[[], Tensor]
    decision: Decision
    bias: Tensor | None

    @property
    def wants(self) -> CodeType | None:
        return None

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        return torch.nn.functional.linear(self._seen(x), self.weight(), self.bias)

    def tensors(self) -> list[Tensor]:
        return []

    def _seen(self, x: Tensor) -> Tensor:
        spec = self.decision.quantised.grid.spec
        if spec.activation_bits == 16:
            return x
        with torch.no_grad():
            if self.decision.input_scale is None:
                seen = round_activations(x, spec.group_size)
            else:
                codes, scale = quantize_activations_by(x, self.decision.input_scale.to(x.device))
                seen = (codes * scale).to(x.dtype)
        return x + (seen - x).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassingLinear:
    """A linear as it is, whose gradient is that of its weight [R, C] alone: none would pass where x is rounded."""

    linear: LinearLayer
    weight: Tensor

    @property
    def wants(self) -> CodeType | None:
        return None

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        passing = torch.nn.functional.linear(x, self.weight)
        with torch.no_grad():
            difference = self.linear(x) - passing
        return passing + difference

    def tensors(self) -> list[Tensor]:
        return self.linear.tensors()
