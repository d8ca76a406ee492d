"""Self-attention: project, rotate, write keys and values to the pool, attend, project back."""

from dataclasses import dataclass

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem
from pressd.runtime.kernels.registry import AttentionKernel
from pressd.runtime.layers.linear import LinearLayer
from pressd.runtime.layers.norm import RMSNorm
from pressd.runtime.layers.rotary import rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer: each [blocks, block_size, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [T, kv_heads, head_dim] at slots int64 [T] (block * block_size + offset)."""
        self.keys.flatten(0, 1).index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values.flatten(0, 1).index_copy_(0, slots, values.to(self.values.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query self-attention of one block.

    `query_key_norm` normalises each head of the queries and keys before it is rotated; its gain is
    [num_heads + num_kv_heads, head_dim].
    """

    problem: AttentionProblem
    kernel: AttentionKernel
    qkv: LinearLayer
    output: LinearLayer
    query_key_norm: RMSNorm | None = None

    def __call__(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: LayerKV, batch: AttentionBatch
    ) -> torch.Tensor:
        num_heads, num_kv_heads = self.problem.num_heads, self.problem.num_kv_heads
        heads = self.qkv(x_TH).view(-1, num_heads + 2 * num_kv_heads, self.problem.head_dim)
        query_key, values = heads.tensor_split([num_heads + num_kv_heads], dim=1)
        if self.query_key_norm is not None:
            query_key = self.query_key_norm(query_key)
        query, keys = rotate(query_key, cos, sin).tensor_split([num_heads], dim=1)
        kv.write(batch.slot_mapping, keys, values)
        # Keys and values are read back from the pool, in its dtype, also within the chunk that wrote them: how a prompt
        # was cut into chunks cannot change the output.
        attended = self.kernel.run(query.contiguous(), kv.keys, kv.values, batch, self.problem)
        return self.output(attended.flatten(1))

    def tensors(self) -> list[torch.Tensor]:
        norm = [] if self.query_key_norm is None else self.query_key_norm.tensors()
        return [*self.qkv.tensors(), *norm, *self.output.tensors()]
