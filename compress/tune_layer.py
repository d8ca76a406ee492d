"""Tunes the codes and scales of a whole layer to the outputs that the source's layer has (passes/round.py)."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pressd.compress.decision import Decision
from pressd.compress.learning_linears import LearningLinear
from pressd.compress.pass_options import Round
from pressd.compress.passes.round import LatentWeight, can_be_learnt, sign_descent
from pressd.compress.streams import Lane, LayerPass, Stream
from pressd.runtime.kernels.attention import cpu as attention_cpu
from pressd.runtime.kernels.attention import reference as attention_reference
from pressd.runtime.kernels.catalogue import POINTWISE
from pressd.runtime.layers.attention import LayerKV
from pressd.runtime.models.decoder import Block
from pressd.runtime.models.sequences import independent


def tune(
    layer: LayerPass,
    inputs: Sequence[Tensor],
    targets: Sequence[Stream],
    decisions: Mapping[str, Decision],
    options: Round,
    seed: int,
    *,
    leans: bool,
) -> tuple[dict[str, Decision], float]:
    """Return better decisions by kind, of what can be learnt, and the layer's squared error, as a part of before.

    `inputs` are the streams before the layer, [T, H] each, and `targets` the source's streams after it. What is not
    better over all tokens is not taken: the part is 1 then, and the decisions are the ones that were given. Without
    `leans` codes stay, and scales alone are tuned.
    """
    tuned = {kind: decision for kind, decision in decisions.items() if can_be_learnt(decision.quantised.grid.spec)}
    if not tuned:
        return {}, 1.0
    lane = layer.streams[0].lane
    device = lane.device
    latent = {kind: _latent(one, device, leans=leans) for kind, one in tuned.items()}
    linears = {
        kind: LearningLinear(weight=weight.value, decision=tuned[kind], bias=layer.bias(kind, lane))
        for kind, weight in latent.items()
    }
    block = _differentiable(layer.learnable(lane, linears), device)
    rows = _RowsOfText(block, lane, inputs, targets, options.rows)
    before = rows.error()
    generator = torch.Generator().manual_seed(seed)
    rate = 1 / options.steps if options.rate is None else options.rate
    sign_descent(lambda _: rows.loss(rows.draw(generator)), list(latent.values()), steps=options.steps, rate=rate)
    after = rows.error()
    if not after < before:
        return tuned, 1.0
    return {kind: tuned[kind].moved_to(*latent[kind].rounded()) for kind in tuned}, after / before


def _latent(decision: Decision, device: torch.device, *, leans: bool) -> LatentWeight:
    quantised = decision.quantised
    return LatentWeight(decision.weight.to(device), quantised.grid.to(device), quantised.codes.to(device), leans=leans)


class _RowsOfText:
    """A layer's inputs and targets, row by row, and how far its outputs for them are off."""

    def __init__(
        self, block: Block, lane: Lane, inputs: Sequence[Tensor], targets: Sequence[Stream], num_rows: int
    ) -> None:
        self._block = block
        self._lane = lane
        length = targets[0].places.length
        self._inputs = [row for x in inputs for row in x.view(-1, length, x.size(1))]
        self._targets = [row for stream in targets for row in stream.x.view(-1, length, stream.x.size(1))]
        self._length = length
        self._num_rows = min(num_rows, len(self._inputs))

    def draw(self, generator: torch.Generator) -> list[int]:
        """Return numbers of some rows, none twice."""
        rows: list[int] = torch.randperm(len(self._inputs), generator=generator)[: self._num_rows].tolist()
        return rows

    def loss(self, rows: list[int]) -> Tensor:
        """Return the mean squared difference of the outputs to the targets."""
        lane = self._lane
        x = torch.cat([self._inputs[row].to(lane.device) for row in rows])
        wanted = torch.cat([self._targets[row].to(lane.device) for row in rows])
        batch, positions, kv_shape = independent(len(rows), self._length, lane.device, pages=False)
        heads = (self._block.attention.problem.num_kv_heads, self._block.attention.problem.head_dim)
        keys = x.new_empty((*kv_shape, *heads))
        kv = LayerKV(keys=keys, values=torch.empty_like(keys))
        x, delta = self._block(x, None, lane.rotary.of(positions, select=True), kv, batch)
        return torch.nn.functional.mse_loss((x + delta).float(), wanted.float())

    @torch.no_grad()
    def error(self) -> float:
        """Return the mean loss over all rows."""
        total = 0.0
        for group in torch.split(torch.arange(len(self._inputs)), self._num_rows):
            total += float(self.loss(group.tolist())) * len(group)
        return total / len(self._inputs)


def _differentiable(block: Block, device: torch.device) -> Block:
    """The same layer with kernels that gradients pass through."""
    kernel = attention_cpu.KERNEL if device.type == "cpu" else attention_reference.KERNEL
    return dataclasses.replace(
        block,
        input_norm=dataclasses.replace(block.input_norm, kernels=POINTWISE),
        post_attention_norm=dataclasses.replace(block.post_attention_norm, kernels=POINTWISE),
        attention=dataclasses.replace(block.attention, kernel=kernel, kernels=POINTWISE),
        mlp=dataclasses.replace(block.mlp, kernels=POINTWISE),
    )
