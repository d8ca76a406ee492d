"""The one decoder-only transformer, composed of layers.

Shapes: T new tokens of all sequences of a step in one row, H hidden, V vocabulary, B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem
from pressd.runtime.kernels.host_memory import huge_empty
from pressd.runtime.kernels.registry import PointwiseKernels
from pressd.runtime.layers.attention import Attention, LayerKV
from pressd.runtime.layers.embedding import Embedding
from pressd.runtime.layers.linear import LinearLayer
from pressd.runtime.layers.mlp import GatedMLP
from pressd.runtime.layers.norm import RMSNorm
from pressd.runtime.layers.rotary import Rotary, Rotations
from pressd.runtime.models.config import DecoderConfig
from pressd.runtime.models.sequences import independent
from pressd.runtime.report import KernelChoice

Batches: TypeAlias = AttentionBatch | Sequence[AttentionBatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One transformer block: attention and feed-forward network, each behind a norm and around a residual."""

    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self,
        x_TH: torch.Tensor,
        delta_TH: torch.Tensor | None,
        rotations: Rotations,
        kv: LayerKV,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream and what is still to be added to it: the next norm does that while it reads it."""
        x_TH, normed = self.input_norm.add(x_TH, delta_TH, self.attention.qkv.wants)
        attended = self.attention(normed, rotations, kv, batch)
        x_TH, normed = self.post_attention_norm.add(x_TH, attended, self.mlp.gate_up.wants)
        return x_TH, self.mlp(normed)

    def tensors(self) -> list[torch.Tensor]:
        parts = (self.input_norm, self.attention, self.post_attention_norm, self.mlp)
        return [tensor for part in parts for tensor in part.tensors()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Token ids to hidden states to logits; keys and values live in a pool that the caller owns."""

    config: DecoderConfig
    device: torch.device
    dtype: torch.dtype
    embedding: Embedding
    rotary: Rotary
    pointwise: PointwiseKernels
    blocks: tuple[Block, ...]
    final_norm: RMSNorm
    head: LinearLayer
    kernels: tuple[KernelChoice, ...]
    unfused_groups: int

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, kv: Sequence[LayerKV], batch: Batches
    ) -> torch.Tensor:
        """Return hidden states [T, H] after the final norm, for ids and positions int64 [T]; writes the new KV."""
        return self.finish(self.embedding(token_ids), positions, kv, batch)

    def finish(
        self, x_TH: torch.Tensor, positions: torch.Tensor, kv: Sequence[LayerKV], batch: Batches
    ) -> torch.Tensor:
        """Return hidden states [T, H] after the final norm, given the residual stream as the embedding starts it."""
        x_TH, delta_TH = self._stream(x_TH, positions, kv, batch, range(len(self.blocks)))
        _, hidden = self.final_norm.add(x_TH, delta_TH)
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def run_layers(
        self,
        x_TH: torch.Tensor,
        positions: torch.Tensor,
        kv: Sequence[LayerKV],
        batch: Batches,
        layers: range | None = None,
    ) -> torch.Tensor:
        """Return the residual stream [T, H] after `layers` (None: all), given the one before them; writes their KV.

        The stream starts as the embedding and ends at the final norm; it may be taken on from wherever it was left.
        `kv` has an entry for each of the decoder's layers; so has `batch`, unless it is one for all of them.
        """
        x_TH, delta_TH = self._stream(x_TH, positions, kv, batch, range(len(self.blocks)) if layers is None else layers)
        return x_TH if delta_TH is None else x_TH + delta_TH

    def _stream(
        self, x_TH: torch.Tensor, positions: torch.Tensor, kv: Sequence[LayerKV], batch: Batches, layers: range
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert len(kv) == len(self.blocks), f"{len(kv)} layers of keys and values for {len(self.blocks)} blocks"
        batches = [batch] * len(kv) if isinstance(batch, AttentionBatch) else batch
        rotations = self.rotary.of(positions, select=self.pointwise.selects_rotations)
        delta_TH: torch.Tensor | None = None
        for index in layers:
            x_TH, delta_TH = self.blocks[index](x_TH, delta_TH, rotations, kv[index], batches[index])
        return x_TH, delta_TH

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., V] of hidden states [..., H]."""
        return self.head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], self.config.vocab_size)

    def hidden_states(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return [B, T, H] after the final norm for B independent sequences int64 [B, T], without a cache to keep."""
        num_sequences, length = token_ids_BT.shape
        # One pool for all layers: a layer's KV is dead once it has run. Whoever reads views has one block a sequence.
        batch, positions, kv_shape = independent(num_sequences, length, self.device, pages=self.reads_tables)
        scratch = self.new_kv(*kv_shape)
        flat = token_ids_BT.to(self.device).flatten()
        hidden = self.forward(flat, positions, [scratch] * len(self.blocks), batch)
        return hidden.view(num_sequences, length, -1)

    def full_logits(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V] of B independent sequences int64 [B, T]."""
        return self.lm_head(self.hidden_states(token_ids_BT))

    def new_kv(self, num_blocks: int, block_size: int) -> LayerKV:
        """Allocate, without clearing, keys and values of one layer, and the scales that lie beside them."""
        shape = (num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)
        keys, values = (self._allocate(shape, self._attention.kv_dtype) for _ in range(2))
        if self._attention.kv.scales != "token":
            return LayerKV(keys=keys, values=values)
        key_scales, value_scales = (self._allocate(shape[:-1], torch.float32) for _ in range(2))
        return LayerKV(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cpu":
            return huge_empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @property
    def _attention(self) -> AttentionProblem:
        """What is the same in every layer: heads, and how keys and values are stored."""
        return self.blocks[0].attention.problem

    @property
    def kv_dtype(self) -> torch.dtype:
        """The type that keys and values are stored in."""
        return self._attention.kv_dtype

    @property
    def reads_tables(self) -> bool:
        """Whether all that a step needs is on the device: block tables to follow, positions to rotate by."""
        follows = all(block.attention.kernel.reads_tables for block in self.blocks)
        return follows and not self.pointwise.selects_rotations

    @property
    def is_generated(self) -> bool:
        """Whether attention and what lies between linears is code that was generated for this CPU."""
        return self.pointwise.is_generated and all(block.attention.kernel.is_generated for block in self.blocks)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token occupy in all layers, their own scales included."""
        return self._attention.kv_token_bytes * len(self.blocks)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights in memory as the kernels hold them; what is shared counts once."""
        tensors = [*self.embedding.tensors(), *self.final_norm.tensors(), *self.head.tensors()]
        tensors += [tensor for block in self.blocks for tensor in block.tensors()]
        distinct = {id(tensor): tensor for tensor in tensors}
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
