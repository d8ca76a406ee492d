"""The one decoder-only transformer, composed of layers.

Shapes: T new tokens of all sequences of a step in one row, H hidden, V vocabulary, B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun
from pressd.runtime.layers.attention import Attention, LayerKV
from pressd.runtime.layers.embedding import Embedding
from pressd.runtime.layers.linear import LinearLayer
from pressd.runtime.layers.mlp import GatedMLP
from pressd.runtime.layers.norm import RMSNorm
from pressd.runtime.layers.rotary import Rotary
from pressd.runtime.models.config import DecoderConfig
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
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: LayerKV, batch: AttentionBatch
    ) -> torch.Tensor:
        x_TH = x_TH + self.attention(self.input_norm(x_TH), cos, sin, kv, batch)
        return x_TH + self.mlp(self.post_attention_norm(x_TH))

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
    blocks: tuple[Block, ...]
    final_norm: RMSNorm
    head: LinearLayer
    kernels: tuple[KernelChoice, ...]
    unfused_groups: int

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, kv: Sequence[LayerKV], batch: Batches
    ) -> torch.Tensor:
        """Return hidden states [T, H] after the final norm, for ids and positions int64 [T]; writes the new KV."""
        return self.final_norm(self.run_layers(self.embedding(token_ids), positions, kv, batch))

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
        assert len(kv) == len(self.blocks), f"{len(kv)} layers of keys and values for {len(self.blocks)} blocks"
        batches = [batch] * len(kv) if isinstance(batch, AttentionBatch) else batch
        cos, sin = self.rotary.select(positions)
        for index in range(len(self.blocks)) if layers is None else layers:
            x_TH = self.blocks[index](x_TH, cos, sin, kv[index], batches[index])
        return x_TH

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., V] of hidden states [..., H]."""
        return self.head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], self.config.vocab_size)

    def hidden_states(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return [B, T, H] after the final norm for B independent sequences int64 [B, T], without a cache to keep."""
        num_sequences, length = token_ids_BT.shape
        # One block as long as a sequence each, and one pool for all layers: a layer's KV is dead once it has run.
        scratch = self.new_kv(num_sequences, length)
        runs = tuple(
            QueryRun(start=index * length, length=length, kv_length=length, block_table=(index,), first_block=index)
            for index in range(num_sequences)
        )
        slots = torch.arange(num_sequences * length, device=self.device)
        batch = AttentionBatch(runs=runs, slot_mapping=slots)
        positions = torch.arange(length, device=self.device).repeat(num_sequences)
        flat = token_ids_BT.to(self.device).flatten()
        hidden = self.forward(flat, positions, [scratch] * len(self.blocks), batch)
        return hidden.view(num_sequences, length, -1)

    def full_logits(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V] of B independent sequences int64 [B, T]."""
        return self.lm_head(self.hidden_states(token_ids_BT))

    def new_kv(self, num_blocks: int, block_size: int) -> LayerKV:
        """Allocate, without clearing, keys and values of one layer."""
        shape = (num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        return LayerKV(keys=keys, values=torch.empty_like(keys))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token occupies in all layers."""
        per_layer = 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize
        return per_layer * len(self.blocks)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights in memory as the kernels hold them; what is shared counts once."""
        tensors = [*self.embedding.tensors(), *self.final_norm.tensors(), *self.head.tensors()]
        tensors += [tensor for block in self.blocks for tensor in block.tensors()]
        distinct = {id(tensor): tensor for tensor in tensors}
        return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
