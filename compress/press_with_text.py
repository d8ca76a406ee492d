"""Presses blocks while the calibration text runs through them, so that passes see the inputs of what they round."""

from collections.abc import Iterator, Sequence

import torch

from pressd.compress.block_work import BlockWork
from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import Clock
from pressd.compress.encoding import decode
from pressd.compress.group_plan import GroupPlan
from pressd.compress.plan import BlockPlan, Plan
from pressd.compress.press_block import Pressed, dense_tensor, named
from pressd.compress.press_group import collect, describe, press_group
from pressd.compress.press_layer import press_layer
from pressd.compress.statistics import Statistics
from pressd.compress.streams import Lane, LayerPass, Stream, final_inputs, open_streams
from pressd.runtime.artifact.families import EMBED, EMBED_PREFIX
from pressd.runtime.artifact.manifest import PlannedGroup
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.registry import Tensors
from pressd.runtime.models import decoder_config
from pressd.runtime.models.loading import GROUP_KINDS

_HEAD = "head"


class TextPresser:
    """Presses block after block; between them it holds the residual stream of every calibration token."""

    def __init__(
        self, source: Checkpoint, plan: Plan, rows: CalibrationRows, devices: Sequence[torch.device], clock: Clock
    ) -> None:
        """Prepare to compute on `devices`, the rows dealt to them in turn; in float32 on a CPU, else as stored."""
        self._source = source
        self._plan = plan
        self._rows = rows
        self._clock = clock
        self._config = decoder_config(source)
        seq_len = rows.ids.size(1)
        self._lanes = [
            Lane.open(self._config, device, torch.float32 if device.type == "cpu" else plan.dtype, seq_len)
            for device in devices
        ]
        self._streams: list[Stream] = []
        self._compares = plan.runs_source
        self._source_streams: list[Stream] = []

    @torch.no_grad()
    def press(self, block: BlockPlan, done: list[PlannedGroup]) -> Iterator[Pressed]:
        """Yield all of a block's tensors, and put an entry for each of its groups into `done`."""
        work = BlockWork.begun(self._source, block, self._plan.dtype)
        if block.block.name == EMBED:
            done.append(self._press_group(work, block.groups[0], None))
            self._open(work)
        elif block.block.name == _HEAD:
            for group in block.groups:
                inputs = final_inputs(self._config, work.others[self._config.final_norm], self._streams)
                done.append(self._press_group(work, group, collect(inputs, len(self._lanes), group, self._clock)))
        else:
            layer = LayerPass(self._config, _index(block), work, self._streams)
            seed = self._rows.seed + _index(block)
            done += press_layer(layer, self._source_layer(block), work, self._plan, self._clock, seed)
        for group in block.groups:
            for prefix, spec in group.specs.items():
                yield Pressed(tensors=named(prefix, work.stored(prefix)), is_pressed=not spec.is_dense)
        for name, tensor in work.others.items():
            yield Pressed(tensors={name: tensor})
        self._source.close()  # the pages of this block are not wanted again

    @torch.no_grad()
    def replay(self, block: BlockPlan, tensors: Tensors) -> None:
        """Run the text through a block that is stored already; the next cannot tell it from one just pressed."""
        work = BlockWork.finished(block, tensors)
        if block.block.name == EMBED:
            self._open(work)
        elif block.block.name != _HEAD:
            layer = LayerPass(self._config, _index(block), work, self._streams)
            for one in filter(None, (layer, self._source_layer(block))):
                for kind in GROUP_KINDS:
                    one.advance(kind)

    def _press_group(self, work: BlockWork, group: GroupPlan, statistics: Statistics | None) -> PlannedGroup:
        """Press a group outside of the layers."""
        return describe(press_group(work, group, statistics, self._plan, self._clock), work, self._plan)

    def _source_layer(self, block: BlockPlan) -> LayerPass | None:
        """The layer as the source has it, over the source's own streams, if passes compare with it."""
        if not self._compares:
            return None
        work = BlockWork.begun(self._source, block, self._plan.dtype)
        return LayerPass(self._config, _index(block), work, self._source_streams)

    def _open(self, work: BlockWork) -> None:
        """Look the tokens up in the embedding as it is stored."""
        table = decode(work.stored(EMBED_PREFIX), work.linear(EMBED_PREFIX), torch.float32)
        self._streams = open_streams(self._rows.ids, self._lanes, table)
        if self._compares:
            source = dense_tensor(self._source, f"{EMBED_PREFIX}.weight", self._plan.dtype).float()
            self._source_streams = open_streams(self._rows.ids, self._lanes, source)


def _index(block: BlockPlan) -> int:
    """Number of the layer that a block is."""
    return int(block.block.name.rpartition(".")[2])
