"""Token ids to vectors: rows of a matrix that may be stored in integers."""

from dataclasses import dataclass

import torch

from pressd.runtime.kernels.registry import LinearKernel, LinearProblem, Tensors
from pressd.runtime.layers.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Looks up rows of W [vocabulary, H] as its kernel keeps them; a tied head multiplies with the same tensors."""

    problem: LinearProblem
    kernel: LinearKernel
    packed: Tensors

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return [T, H] for ids int64 [T]."""
        assert self.kernel.rows is not None
        return self.kernel.rows(token_ids, self.packed, self.problem)

    def as_head(self) -> Linear:
        """Return the linear layer that shares these tensors."""
        return Linear(problem=self.problem, kernel=self.kernel, packed=self.packed)

    def tensors(self) -> list[torch.Tensor]:
        return list(self.packed.values())
