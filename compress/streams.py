"""The calibration tokens on their way through the model: one batch of rows after the other, on one device or several.

A layer is gone through stage by stage: what reads the inputs of a fused group comes first, then the group is pressed,
then its pressed form makes the inputs of the next. So every group is fitted to the inputs that it will really have, and
all of it costs little more than one forward pass.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.block_work import BlockWork
from pressd.compress.encoding import decode
from pressd.compress.learning_linears import PassingLinear
from pressd.runtime.artifact.families import FusedGroup
from pressd.runtime.kernels.attention.batch import AttentionBatch, KVFormat
from pressd.runtime.kernels.registry import Preference, describe_device
from pressd.runtime.layers.attention import LayerKV
from pressd.runtime.layers.linear import LinearLayer
from pressd.runtime.layers.linear_loader import LinearLoader
from pressd.runtime.layers.norm import RMSNorm
from pressd.runtime.layers.rotary import Rotary
from pressd.runtime.models.config import DecoderConfig
from pressd.runtime.models.decoder import Block
from pressd.runtime.models.loading import GROUP_KINDS, Kernels, choose_kernels, load_block
from pressd.runtime.models.sequences import independent

# Tokens that run through a layer at once.
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lane:
    """What a device needs to run any layer: `layers` are the kernels of each."""

    device: torch.device
    dtype: torch.dtype
    prefer: Preference
    layers: tuple[Kernels, ...]
    rotary: Rotary

    @classmethod
    def open(
        cls, config: DecoderConfig, device: torch.device, dtype: torch.dtype, seq_len: int, prefer: Preference = "fast"
    ) -> "Lane":
        """Choose kernels for a device."""
        layers, _ = choose_kernels(config, describe_device(device), dtype, prefer, KVFormat())
        rotary = Rotary(config.rope, config.head_dim, seq_len, device, dtype)
        return cls(device=device, dtype=dtype, prefer=prefer, layers=tuple(layers), rotary=rotary)

    def loader(self, work: BlockWork) -> LinearLoader:
        """Return what loads a block's linears for this device as they are now."""
        return LinearLoader(checkpoint=work, device=describe_device(self.device), dtype=self.dtype, prefer=self.prefer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the tokens of rows of one length stand: the step they make, their positions, the pool that they fill."""

    length: int
    batch: AttentionBatch
    positions: Tensor
    kv_shape: tuple[int, int]


@dataclass(slots=True, kw_only=True)
class Stream:
    """Some rows of tokens: the residual stream `x` [T, H] on the way, and what attention has gathered of it."""

    lane: Lane
    places: Places
    x: Tensor
    attended: Tensor | None = None


def open_streams(ids_RT: Tensor, lanes: Sequence[Lane], embedding: Tensor) -> list[Stream]:
    """Return streams of all rows int64 [R, T], dealt to the lanes in turn, as embedding [V, H] starts them."""
    num_rows, length = ids_RT.shape
    each = max(1, min(BATCH_TOKENS // length, -(-num_rows // len(lanes))))
    places: dict[tuple[int, int], Places] = {}
    streams = []
    for number, rows in enumerate(torch.split(ids_RT, each)):
        lane_number = number % len(lanes)
        lane = lanes[lane_number]
        key = (lane_number, len(rows))
        if key not in places:
            pages = lane.layers[0].attention.reads_tables and not lane.layers[0].pointwise.selects_rotations
            batch, positions, kv_shape = independent(len(rows), length, lane.device, pages=pages)
            places[key] = Places(length=length, batch=batch, positions=positions, kv_shape=kv_shape)
        x = embedding[rows.flatten()].to(lane.device, lane.dtype)
        streams.append(Stream(lane=lane, places=places[key], x=x))
    return streams


def lanes_of(streams: Sequence[Stream]) -> list[Lane]:
    """Return the lanes that streams are on, each once."""
    return list({id(stream.lane): stream.lane for stream in streams}.values())


def final_inputs(config: DecoderConfig, gain: Tensor, streams: Sequence[Stream]) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the lane, inputs [T, H]) of the head for every stream; `gain` is the final norm's."""
    lanes = lanes_of(streams)
    for stream in streams:
        kernels = stream.lane.layers[-1].pointwise
        own = gain.to(stream.lane.device, stream.lane.dtype)
        norm = RMSNorm(gain=own, epsilon=config.norm_epsilon, kernels=kernels)
        yield lanes.index(stream.lane), norm(stream.x)


class LayerPass:
    """One layer over all streams, a stage at a time; kinds of groups are qkv, o, gate_up and down, in this order."""

    def __init__(self, config: DecoderConfig, index: int, work: BlockWork, streams: Sequence[Stream]) -> None:
        self._config = config
        self._index = index
        self._work = work
        self.streams = streams
        self._groups: dict[str, FusedGroup] = {group.group.name: group.group for group in work.plan.groups}
        self._lanes = lanes_of(streams)
        self._blocks: dict[int, Block] = {}
        self.reload()

    def reload(self) -> None:
        """Load the whole layer as it is now."""
        for lane in self._lanes:
            kernels = lane.layers[self._index]
            block = load_block(lane.loader(self._work), self._groups, self._index, self._config, kernels)
            self._blocks[id(lane)] = block

    def inputs(self, kind: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the lane, inputs [T, C]) of a group for every stream, as the stages before it are now."""
        for stream in self.streams:
            yield self._lanes.index(stream.lane), self._inputs(kind, stream)

    def settle(self, kind: str) -> None:
        """Take a group as the work has it now: to be called when that has changed."""
        group = self._groups[f"layers.{self._index}.{kind}"]
        for lane in self._lanes:
            self._blocks[id(lane)] = with_linear(self._blocks[id(lane)], kind, lane.loader(self._work).load(group))

    def advance(self, kind: str) -> None:
        """Go on behind a group, as it was loaded or settled last."""
        for stream in self.streams:
            block = self._blocks[id(stream.lane)]
            if kind == "qkv":
                stream.attended = self._attend(stream)
            elif kind == "o":
                stream.x = stream.x + block.attention.output(self._inputs("o", stream))
                stream.attended = None
            elif kind == "down":
                stream.x = stream.x + block.mlp.down(self._inputs("down", stream))

    def keys_and_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rotated keys and the values [T, heads, head_dim] of every stream, as attention will find them."""
        for stream in self.streams:
            kv, slots = self._pool(stream), stream.places.batch.slot_mapping
            self._attend(stream, kv)
            yield kv.keys.flatten(0, 1)[slots], kv.values.flatten(0, 1)[slots]  # the last page may not be full

    def learnable(self, lane: Lane, linears: Mapping[str, LinearLayer]) -> Block:
        """Return the layer on one lane with other linears by kind, and such that gradients pass through for the rest.

        What lies between linears is not among these.
        """
        reference = dataclasses.replace(lane, prefer="reference").loader(self._work)
        block = self._blocks[id(lane)]
        for kind in GROUP_KINDS:
            linear = linears.get(kind)
            if linear is None:
                group = self._groups[f"layers.{self._index}.{kind}"]
                parts = [
                    decode(self._work.linear_tensors(one.prefix), self._work.linear(one.prefix), torch.float32)
                    for one in group.members
                ]
                weight = torch.cat(parts).to(lane.device, lane.dtype)
                linear = PassingLinear(linear=reference.load(group), weight=weight)
            block = with_linear(block, kind, linear)
        return block

    def bias(self, kind: str, lane: Lane) -> Tensor | None:
        """Return the bias [R] of a group on a lane, None if it has none."""
        members = self._groups[f"layers.{self._index}.{kind}"].members
        if not members[0].bias:
            return None
        parts = [self._work.tensor(f"{member.prefix}.bias") for member in members]
        return torch.cat(parts).to(lane.device, lane.dtype)

    @property
    def num_lanes(self) -> int:
        """Devices that streams are on."""
        return len(self._lanes)

    def _inputs(self, kind: str, stream: Stream) -> Tensor:
        block = self._blocks[id(stream.lane)]
        if kind == "qkv":
            return block.input_norm(stream.x)
        if kind == "o":
            return self._attend(stream) if stream.attended is None else stream.attended
        normed = block.post_attention_norm(stream.x)
        if kind == "gate_up":
            return normed
        gated = block.mlp.kernels.silu_mul(block.mlp.gate_up(normed), None)
        assert isinstance(gated, Tensor)
        return gated

    def _attend(self, stream: Stream, kv: LayerKV | None = None) -> Tensor:
        block = self._blocks[id(stream.lane)]
        rotations = stream.lane.rotary.of(
            stream.places.positions, select=stream.lane.layers[self._index].pointwise.selects_rotations
        )
        normed = block.input_norm(stream.x)
        return block.attention.attend(normed, rotations, kv or self._pool(stream), stream.places.batch)

    def _pool(self, stream: Stream) -> LayerKV:
        shape = (*stream.places.kv_shape, self._config.num_kv_heads, self._config.head_dim)
        keys = torch.empty(shape, dtype=stream.lane.dtype, device=stream.lane.device)
        return LayerKV(keys=keys, values=torch.empty_like(keys))


def with_linear(block: Block, kind: str, linear: LinearLayer) -> Block:
    """The same layer with another linear for a group."""
    match kind:
        case "qkv":
            return dataclasses.replace(block, attention=dataclasses.replace(block.attention, qkv=linear))
        case "o":
            return dataclasses.replace(block, attention=dataclasses.replace(block.attention, output=linear))
        case "gate_up":
            return dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, gate_up=linear))
    assert kind == "down"
    return dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, down=linear))
