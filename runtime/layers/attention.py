"""Self-attention: project, rotate and write keys and values to the pool, attend, project back."""

from dataclasses import dataclass

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem
from pressd.runtime.kernels.registry import AttentionKernel, PointwiseKernels, Rows
from pressd.runtime.layers.linear import LinearLayer
from pressd.runtime.layers.rotary import Rotations


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer: each [blocks, block_size, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query self-attention of one block.

    `head_gain`, [num_heads + num_kv_heads, head_dim], normalises each head of the queries and keys before it is
    rotated, with `head_epsilon`.
    """

    problem: AttentionProblem
    kernel: AttentionKernel
    kernels: PointwiseKernels
    qkv: LinearLayer
    output: LinearLayer
    head_gain: torch.Tensor | None = None
    head_epsilon: float = 0.0

    def __call__(self, x_TH: Rows, rotations: Rotations, kv: LayerKV, batch: AttentionBatch) -> torch.Tensor:
        return self.output(self.attend(x_TH, rotations, kv, batch))

    def attend(self, x_TH: Rows, rotations: Rotations, kv: LayerKV, batch: AttentionBatch) -> torch.Tensor:
        """Return what the heads have gathered, [T, num_heads * head_dim], before it is projected back."""
        query = self.kernels.rotate_and_write(
            self.qkv(x_TH),
            rotations.positions,
            rotations.cos,
            rotations.sin,
            self.head_gain,
            self.head_epsilon,
            kv.keys,
            kv.values,
            batch.slot_mapping,
            self.problem.num_heads,
            self.problem.num_kv_heads,
        )
        # Keys and values are read back from the pool, in its dtype, also within the chunk that wrote them: how a prompt
        # was cut into chunks cannot change the output.
        return self.kernel.run(query.contiguous(), kv.keys, kv.values, batch, self.problem).flatten(1)

    def tensors(self) -> list[torch.Tensor]:
        gain = [] if self.head_gain is None else [self.head_gain]
        return [*self.qkv.tensors(), *gain, *self.output.tensors()]
