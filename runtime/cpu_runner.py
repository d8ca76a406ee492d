"""Steps on a CPU: those that decode are recorded once for each number of sequences, and then done in one call."""

import functools
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch
from pressd.runtime.kernels.attention.cpu_generated import Split, segments_of, single_tokens, split_key
from pressd.runtime.kernels.codegen.recording import Arena, NotRecordable, Replay, record
from pressd.runtime.kv_cache import KVGroup
from pressd.runtime.models.decoder import Decoder
from pressd.runtime.runner import Computed, Runner, query_runs, reporting
from pressd.runtime.sampling import RaceKernel, upload
from pressd.runtime.scheduler import Scheduled, StepPlan


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recording of a step reads: for each of S sequences its vector [S, H], position and, by group, its slot.

    `batches` are those of the groups; their memo has where keys and values lie.
    """

    stream: torch.Tensor
    positions: torch.Tensor
    batches: tuple[AttentionBatch, ...]


class CpuRunner(Runner):
    """A runner whose layers are all generated code."""

    def __init__(
        self,
        decoder: Decoder,
        groups: Many[KVGroup],
        *,
        block_size: int,
        max_batch: int,
        max_length: int,
        race: RaceKernel | None = None,
    ) -> None:
        super().__init__(decoder, groups, block_size=block_size, max_batch=max_batch, max_length=max_length, race=race)
        self._arena = Arena()
        self._steps: dict[int, tuple[Inputs, Replay]] = {}
        self._records_head = True
        self.why_not: str | None = None
        """Why steps are not recorded; None while they are."""

    def warm_up(self) -> None:
        """Compile what decoding runs on, before anybody waits for it."""
        self._record(1)

    def _compute(self, plan: StepPlan) -> Computed:
        if self.why_not is None and not reporting(plan) and all(map(_decodes, plan.rows)):
            if len(plan.rows) not in self._steps:
                self._record(len(plan.rows))
            found = self._steps.get(len(plan.rows))
            if found is not None and self._place(plan, found[0]):
                return self._replay(plan, *found)
        return super()._compute(plan)

    @torch.inference_mode()
    def _record(self, count: int) -> None:
        """Record a step of so many sequences, or note why it cannot be: what is run here computes nothing of use."""
        inputs = self._inputs(count)
        for with_head in dict.fromkeys((self._records_head, False)):
            try:
                replay = record(functools.partial(self._body, inputs, with_head=with_head), self._arena)
            except NotRecordable as reason:
                self.why_not = str(reason)
                continue
            self._steps[count] = (inputs, replay)
            self._records_head, self.why_not = with_head, None
            return

    def _inputs(self, count: int) -> Inputs:
        """Allocate what a step reads, such that it can be run: every key and value is the first slot's."""
        batches = []
        for group in self.groups:
            batch = AttentionBatch(runs=(), slot_mapping=torch.full((count,), -1))
            for layer in group.layers:
                problem = self.decoder.blocks[layer].attention.problem
                batch.memo.setdefault(split_key(problem, self.block_size), single_tokens(count))
            batches.append(batch)
        hidden = self.decoder.config.hidden_size
        return Inputs(
            stream=torch.zeros(count, hidden, dtype=self.decoder.dtype),
            positions=torch.zeros(count, dtype=torch.int64),
            batches=tuple(batches),
        )

    def _body(self, inputs: Inputs, *, with_head: bool) -> list[torch.Tensor]:
        batches = [inputs.batches[self._group_of[layer]] for layer in range(len(self.kv))]
        hidden = self.decoder.finish(inputs.stream, inputs.positions, self.kv, batches)
        return [hidden, self.decoder.lm_head(hidden)] if with_head else [hidden]

    def _place(self, plan: StepPlan, inputs: Inputs) -> bool:
        """Tell the recording where keys and values lie; False if some are in pieces."""
        for number, batch in enumerate(inputs.batches):
            runs = query_runs(plan, number)
            if any(run.first_block is None for run in runs):
                return False
            window = self.groups[number].window
            segments = torch.tensor([segments_of(run, run.first_visible(window), self.block_size)[0] for run in runs])
            for split in batch.memo.values():
                assert isinstance(split, Split)
                split.segments.copy_(segments)
        return True

    def _replay(self, plan: StepPlan, inputs: Inputs, replay: Replay) -> Computed:
        step = self.table.prepare(plan.rows)
        inputs.stream.copy_(self.decoder.embedding(step.token_ids))
        inputs.positions.copy_(step.positions)
        for batch, slots in zip(inputs.batches, step.slots, strict=True):
            batch.slot_mapping.copy_(slots)
        replay.run()
        hidden = replay.outputs[0]
        logits = replay.outputs[1] if self._records_head else self.decoder.lm_head(hidden)
        draws = [item.draws for item in plan.rows]
        return Computed(
            logits=logits if all(draws) else logits.index_select(0, step.ends),
            rows=upload([item.row for item in plan.rows if item.draws], torch.int64, self.decoder.device),
            places=step.positions.index_select(0, step.ends) + 1,
            finite=hidden.isfinite().all(dim=-1),
            hidden=None,
        )


def _decodes(item: Scheduled) -> bool:
    return item.stop - item.start == 1
