"""Steps on a GPU: its kernels follow block tables there, and decoding replays graphs.

A decoding step costs the host one upload (row, position and length of each place) and one replay. A step that computes
prompts as well is launched operator by operator: its shapes are never the same twice, and it is long enough to hide it.
"""

import functools
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from pressd.runtime.graphs import Capture, Replay, batch_buckets, bucket_of, kv_bounds
from pressd.runtime.kernels.attention.batch import MAX_DECODE, AttentionBatch, PagedBatch
from pressd.runtime.kernels.step.buffers import Prepare, StepBuffers
from pressd.runtime.kv_cache import KVGroup
from pressd.runtime.models.decoder import Decoder
from pressd.runtime.runner import Computed, Runner, finite_parts, reporting
from pressd.runtime.sampling import RaceKernel, upload
from pressd.runtime.scheduler import Scheduled, StepPlan

# Rows of what is uploaded for each place of a step.
COLUMNS = ROW, START, LENGTH = range(3)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Outputs of a graph: logits [S, V], positions of the tokens to be drawn int64 [S], and finite bool [S]."""

    logits: torch.Tensor
    places: torch.Tensor
    finite: torch.Tensor


class CudaRunner(Runner):
    """A runner whose attention reads block tables on the device."""

    def __init__(
        self,
        decoder: Decoder,
        groups: Many[KVGroup],
        *,
        block_size: int,
        max_batch: int,
        max_length: int,
        prepare: Prepare,
        race: RaceKernel | None,
        capture: Capture | None,
    ) -> None:
        """`prepare` turns columns into the inputs of a step; without `capture`, steps are launched one by one."""
        super().__init__(decoder, groups, block_size=block_size, max_batch=max_batch, max_length=max_length, race=race)
        self._graphs_bytes = 0
        self._prepare = prepare
        self._race = race
        self._capture = capture
        self._buckets = batch_buckets(max_batch)
        self._bounds = kv_bounds(max_length)
        # Every graph reads the front of one buffer. A step in flight has read it before the next one writes it: both
        # stand in one queue.
        self._sent = torch.zeros(len(COLUMNS) * max_batch, dtype=torch.int32, device=decoder.device)
        self._graphs: dict[tuple[int, int], Replay[Decoded]] = {}

    @property
    def graphs_bytes(self) -> int:
        return self._graphs_bytes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what draws; capture every graph, the largest first, so that the others find its memory."""
        device = self.decoder.device
        if self._race is not None:
            logits = torch.zeros(1, self.decoder.config.vocab_size, device=device)
            keys = torch.zeros(1, 2, dtype=torch.int32, device=device)
            self._race(logits, keys, torch.ones(1, dtype=torch.float64, device=device))
        if self._capture is None:
            return
        before = _allocated(device)
        for bound in reversed(self._bounds):
            for places in reversed(self._buckets):
                self._graphs[places, bound] = self._capture(functools.partial(self._decode, places, bound))
        self._graphs_bytes = _allocated(device) - before

    def _compute(self, plan: StepPlan) -> Computed:
        if self._graphs and not reporting(plan) and all(item.stop - item.start == 1 for item in plan.rows):
            return self._replay(plan)
        return self._launch_all(plan)

    def _replay(self, plan: StepPlan) -> Computed:
        """Decode one token of each sequence."""
        count = len(plan.rows)
        places = bucket_of(count, self._buckets)
        bound = bucket_of(max(item.stop for item in plan.rows), self._bounds)
        assert places is not None
        assert bound is not None
        fresh = np.zeros((len(COLUMNS), places), dtype=np.int32)
        fresh[:, :count] = _columns(plan.rows)
        columns = self._columns(places)
        columns.copy_(self._pinned(fresh), non_blocking=True)
        graph = self._graphs[places, bound]
        graph.run()
        out, rows = graph.outputs, columns[ROW]
        if all(item.draws for item in plan.rows):
            return Computed(out.logits[:count], rows[:count].long(), out.places[:count], out.finite[:count], None)
        drawing = upload([place for place, item in enumerate(plan.rows) if item.draws], torch.int64, rows.device)
        logits, ends, own = (tensor.index_select(0, drawing) for tensor in (out.logits, out.places, rows))
        return Computed(logits, own.long(), ends, out.finite[:count], None)

    def _pinned(self, values: np.ndarray) -> torch.Tensor:
        """Return the values where a GPU can read them later."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self.decoder.device.type == "cuda" else tensor

    def _columns(self, places: int) -> torch.Tensor:
        """Return where the columns int32 [3, places] of a graph are."""
        return self._sent[: len(COLUMNS) * places].view(len(COLUMNS), places)

    def _decode(self, places: int, bound: int) -> Decoded:
        """What a graph captures: one token at each of `places`, of sequences of at most `bound` tokens."""
        columns = self._columns(places)
        step = StepBuffers.new(places, places, len(self.groups), self.decoder.device)
        self._prepare(columns, self.table.token_ids, self.table.block_tables, self.block_size, places, step)
        starts = torch.arange(places, dtype=torch.int32, device=self.decoder.device)
        decoding = [
            PagedBatch(
                starts=starts,
                lengths=columns[LENGTH],
                kv_lengths=step.kv_lengths,
                rows=columns[ROW],
                block_tables=table,
                max_query=1,
                max_kv=bound,
            )
            for table in self.table.block_tables
        ]
        hidden = self.decoder.forward(step.token_ids, step.positions, self.kv, self._batches_of(step, decoding, None))
        return Decoded(
            logits=self.decoder.lm_head(hidden), places=step.positions + 1, finite=hidden.isfinite().all(dim=-1)
        )

    def _launch_all(self, plan: StepPlan) -> Computed:
        """Compute a step of any shape."""
        device, items = self.decoder.device, plan.rows
        columns = _columns(items)
        lengths, stops = columns[LENGTH], columns[START] + columns[LENGTH]
        paged = np.stack((np.cumsum(lengths) - lengths, lengths, stops, columns[ROW]))
        decoding, prompts = lengths <= MAX_DECODE, lengths > MAX_DECODE
        order = np.concatenate((np.flatnonzero(decoding), np.flatnonzero(prompts)))
        sent = self._pinned(np.concatenate((columns, paged[:, order])).astype(np.int32)).to(device, non_blocking=True)
        num_tokens, split = int(lengths.sum()), int(decoding.sum())
        step = StepBuffers.new(num_tokens, len(items), len(self.groups), device)
        own = sent[: len(COLUMNS)]
        self._prepare(own, self.table.token_ids, self.table.block_tables, self.block_size, num_tokens, step)

        def paged_batches(chosen: np.ndarray, part: torch.Tensor) -> list[PagedBatch] | None:
            if not chosen.any():
                return None
            longest, furthest = int(lengths[chosen].max()), int(stops[chosen].max())
            return [
                PagedBatch(
                    starts=part[0],
                    lengths=part[1],
                    kv_lengths=part[2],
                    rows=part[3],
                    block_tables=table,
                    max_query=longest,
                    max_kv=furthest,
                )
                for table in self.table.block_tables
            ]

        part = sent[len(COLUMNS) :]
        batches = self._batches_of(
            step, paged_batches(decoding, part[:, :split]), paged_batches(prompts, part[:, split:])
        )
        hidden = self.decoder.forward(step.token_ids, step.positions, self.kv, batches)
        places = [place for place, item in enumerate(items) if item.draws]
        drawing = upload(places, torch.int64, device)
        ends = step.stops.index_select(0, drawing) - 1
        return Computed(
            logits=self.decoder.lm_head(hidden.index_select(0, ends)),
            rows=own[ROW].index_select(0, drawing).long(),
            places=step.positions.index_select(0, ends) + 1,
            finite=finite_parts(hidden, step.stops),
            hidden=hidden,
        )

    def _batches_of(
        self, step: StepBuffers, decoding: Many[PagedBatch] | None, prompts: Many[PagedBatch] | None
    ) -> list[AttentionBatch]:
        """Return each layer's batch; layers of a group share theirs."""
        batches = [
            AttentionBatch(
                runs=(),
                slot_mapping=step.slots[group],
                decoding=None if decoding is None else decoding[group],
                prompts=None if prompts is None else prompts[group],
            )
            for group in range(len(self.groups))
        ]
        return [batches[self._group_of[layer]] for layer in range(len(self.kv))]


def _columns(items: Many[Scheduled]) -> np.ndarray:
    """Return row, start and length of each part, int64 [3, S]."""
    return np.array([(item.row, item.start, item.stop - item.start) for item in items], dtype=np.int64).T


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
