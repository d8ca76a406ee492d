"""Self-attention: project, rotate and write keys and values to the pool, attend, project back."""

from dataclasses import dataclass, replace

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem
from pressd.runtime.kernels.attention.kv_codes import indexable
from pressd.runtime.kernels.registry import AttentionKernel, PointwiseKernels, Rows
from pressd.runtime.kernels.rotary.reference import write
from pressd.runtime.layers.linear import LinearLayer
from pressd.runtime.layers.rotary import Rotations


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer: each [blocks, block_size, kv_heads, head_dim].

    Codes that have scales of their own have them beside: float32 [blocks, block_size, kv_heads].
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        scales = (self.key_scales, self.value_scales)
        return [self.keys, self.values, *(tensor for tensor in scales if tensor is not None)]

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy whole blocks, int64 [blocks] each, whatever is stored of them."""
        for tensor in map(indexable, self.tensors()):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query self-attention of one block.

    `head_gain`, [num_heads + num_kv_heads, head_dim], normalises each head of the queries and keys before it is
    rotated, with `head_epsilon`. `key_scale` and `value_scale`, float32 [1], are there where the problem's format has
    one for a layer.
    """

    problem: AttentionProblem
    kernel: AttentionKernel
    kernels: PointwiseKernels
    qkv: LinearLayer
    output: LinearLayer
    head_gain: torch.Tensor | None = None
    head_epsilon: float = 0.0
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    def __call__(self, x_TH: Rows, rotations: Rotations, kv: LayerKV, batch: AttentionBatch) -> torch.Tensor:
        return self.output(self.attend(x_TH, rotations, kv, batch))

    def attend(self, x_TH: Rows, rotations: Rotations, kv: LayerKV, batch: AttentionBatch) -> torch.Tensor:
        """Return what the heads have gathered, [T, num_heads * head_dim], before it is projected back."""
        if self.problem.kv.scales == "layer":
            kv = replace(kv, key_scales=self.key_scale, value_scales=self.value_scale)
        qkv = self.qkv(x_TH)
        if self.problem.kv_dtype == self.problem.dtype:
            query = self._rotate(qkv, rotations, kv.keys, kv.values, batch.slot_mapping)
        else:
            query = self._rotate_and_encode(qkv, rotations, kv, batch.slot_mapping)
        # Keys and values are read back from the pool, in its dtype, also within the chunk that wrote them: how a prompt
        # was cut into chunks cannot change the output.
        attended = self.kernel.run(
            query.contiguous(), kv.keys, kv.values, batch, self.problem, kv.key_scales, kv.value_scales
        )
        return attended.flatten(1)

    def _rotate(
        self, qkv: torch.Tensor, rotations: Rotations, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        return self.kernels.rotate_and_write(
            qkv,
            rotations.positions,
            rotations.cos,
            rotations.sin,
            self.head_gain,
            self.head_epsilon,
            keys,
            values,
            slots,
            self.problem.num_heads,
            self.problem.num_kv_heads,
        )

    def _rotate_and_encode(
        self, qkv: torch.Tensor, rotations: Rotations, kv: LayerKV, slots: torch.Tensor
    ) -> torch.Tensor:
        """Let the kernel, which knows the compute type alone, write to one block of all tokens; encode from there.

        Every token has a slot: only steps that are replayed are padded, and kernels of those refuse other types.
        """
        shape = (1, qkv.size(0), self.problem.num_kv_heads, self.problem.head_dim)
        keys, values = qkv.new_empty(shape), qkv.new_empty(shape)
        query = self._rotate(qkv, rotations, keys, values, torch.arange(qkv.size(0), device=qkv.device))
        write(kv.keys, slots, keys[0], kv.key_scales)
        write(kv.values, slots, values[0], kv.value_scales)
        return query

    def tensors(self) -> list[torch.Tensor]:
        own = [tensor for tensor in (self.head_gain, self.key_scale, self.value_scale) if tensor is not None]
        return [*self.qkv.tensors(), *own, *self.output.tensors()]
