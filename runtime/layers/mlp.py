"""The gated feed-forward network (SwiGLU; Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from dataclasses import dataclass

import torch

from pressd.runtime.kernels.registry import PointwiseKernels, Rows
from pressd.runtime.layers.linear import LinearLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)) with gate and up in one fused linear."""

    gate_up: LinearLayer
    down: LinearLayer
    kernels: PointwiseKernels

    def __call__(self, x_TH: Rows) -> torch.Tensor:
        return self.down(self.kernels.silu_mul(self.gate_up(x_TH), self.down.wants))

    def tensors(self) -> list[torch.Tensor]:
        return [*self.gate_up.tensors(), *self.down.tensors()]
