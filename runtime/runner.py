"""One step on the device: a plan in, drawn tokens out."""

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun
from pressd.runtime.kv_cache import BlockCopy, KVGroup
from pressd.runtime.layers.attention import LayerKV
from pressd.runtime.models.decoder import Decoder
from pressd.runtime.readback import Readback
from pressd.runtime.request import TokenLogprobs
from pressd.runtime.sampling import Drawn, LogprobColumns, RaceKernel, Sampler, TokenMasks, log_probabilities, upload
from pressd.runtime.scheduler import Scheduled, StepPlan
from pressd.runtime.state import RequestTable, StepInput

# Rows of a prompt's logits that exist at once: 64 x 150,000 in float32 are 38 MB.
PROMPT_TILE = 64
# What is read back of log-probabilities: ids, their values and ranks, the likeliest ids and their values.
NUM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities, on the device, of the prompt tokens that follow `first` ... in a sequence of the plan."""

    item: Scheduled
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def columns(self) -> tuple[torch.Tensor, ...]:
        return (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs)


@dataclass(frozen=True, slots=True)
class Computed:
    """What the layers made of a step: `finite`, bool [sequences], tells whose hidden states are numbers.

    `logits` [B, V] are of the sequences that draw, in the order of the plan; `rows` and `places`, int64 [B], are theirs
    in the request table, and where the drawn token goes. `hidden` [T, H] is None if a graph was replayed.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    finite: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose work is under way; its results are on their way to the host.

    The host was busy with the launch for `seconds`, for `model_seconds` of them with layers (on a CPU, which computes
    them then; a GPU is only told to). `is_replay`: a graph was replayed.
    """

    plan: StepPlan
    results: Readback
    is_replay: bool
    logprobs: LogprobColumns | None
    prompts: tuple[PromptScores, ...]
    seconds: float
    model_seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step has for one of its sequences. `token_id` None: it drew nothing."""

    item: Scheduled
    token_id: int | None = None
    finite: bool = True
    possible: bool = True
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Runner:
    """Owns the memory of the KV groups and of the request table, and turns plans into tensors."""

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
        """`race` is a kernel for draws without filters, where there is one."""
        self.decoder = decoder
        self.block_size = block_size
        self.num_gathers = 0
        self.groups = tuple(groups)
        self._group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
        num_layers = len(decoder.blocks)
        self.kv: list[LayerKV] = [
            decoder.new_kv(self.groups[self._group_of[layer]].num_blocks, block_size) for layer in range(num_layers)
        ]
        self.table = RequestTable(
            num_rows=max_batch,
            max_length=max_length,
            num_groups=len(groups),
            block_size=block_size,
            device=decoder.device,
        )
        self.sampler = Sampler(
            num_rows=max_batch,
            vocab_size=decoder.config.vocab_size,
            eos_token_ids=decoder.config.eos_token_ids,
            device=decoder.device,
            token_table=self.table.token_ids,
            race=race,
        )

    @property
    def graphs_bytes(self) -> int:
        """Bytes that captured steps keep on the device."""
        return 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all layers, with the scales beside them."""
        return sum(tensor.nbytes for layer in self.kv for tensor in layer.tensors())

    def warm_up(self) -> None:
        """Compile what steps run on, before anybody waits for it."""

    def launch(self, plan: StepPlan, allowed: TokenMasks | None = None) -> Launched:
        """Start a step; `allowed` masks the sequences that draw, counted in the order of the plan."""
        began = time.perf_counter()
        for row in plan.released:
            self.sampler.release(row)
        for sequence in plan.admitted:
            assert sequence.row is not None
            self.table.admit(sequence)
            self.sampler.admit(sequence.row, sequence.request, sequence.index, len(sequence.token_ids))
        self.table.update_blocks([item.sequence for item in plan.rows])
        for copy in plan.copies:
            self._copy(copy)
        model_began = time.perf_counter()
        computed = self._compute(plan)
        model_seconds = time.perf_counter() - model_began
        drawn = self._draw(plan, computed, allowed)
        prompts = tuple(self._score_prompt(item, computed.hidden, first) for item, first in reporting(plan))
        results = [drawn.token_ids, drawn.finite, drawn.possible, computed.finite]
        results += drawn.logprobs.columns() if drawn.logprobs is not None else ()
        results += [column for scores in prompts for column in scores.columns()]
        seconds = time.perf_counter() - began
        return Launched(
            plan, Readback(results), computed.hidden is None, drawn.logprobs, prompts, seconds, model_seconds
        )

    def collect(self, launched: Launched) -> list[Outcome]:
        """Wait for a step and return an outcome for each sequence of its plan, in order."""
        token_ids, finite, possible, whole, *columns = launched.results.wait()
        logprobs: dict[int, TokenLogprobs] = {}
        if launched.logprobs is not None:
            own, columns = columns[:NUM_COLUMNS], columns[NUM_COLUMNS:]
            logprobs = launched.logprobs.by_place(own)
        prompts = {
            scores.item.sequence: _read(columns[NUM_COLUMNS * place : NUM_COLUMNS * (place + 1)])
            for place, scores in enumerate(launched.prompts)
        }
        tokens, are_finite, are_possible = token_ids.tolist(), finite.tolist(), possible.tolist()
        outcomes, place = [], 0
        for item, is_finite in zip(launched.plan.rows, whole.tolist(), strict=True):
            report = prompts.get(item.sequence, ())
            if item.draws:
                is_finite = is_finite and are_finite[place]
                scores = (logprobs[place],) if place in logprobs else ()
                outcomes.append(Outcome(item, tokens[place], is_finite, are_possible[place], scores, report))
                place += 1
            else:
                outcomes.append(Outcome(item, finite=is_finite, prompt_logprobs=report))
        return outcomes

    def _compute(self, plan: StepPlan) -> Computed:
        """Run the layers over the tokens of a step."""
        step = self.table.prepare(plan.rows)
        hidden = self.decoder.forward(step.token_ids, step.positions, self.kv, self._batches(plan, step))
        return Computed(
            logits=self.decoder.lm_head(hidden.index_select(0, step.ends)),
            rows=upload([item.row for item in plan.rows if item.draws], torch.int64, self.decoder.device),
            places=step.positions.index_select(0, step.ends) + 1,
            finite=finite_parts(hidden, step.stops),
            hidden=hidden,
        )

    def _draw(self, plan: StepPlan, computed: Computed, allowed: TokenMasks | None) -> Drawn:
        rows = [item.row for item in plan.rows if item.draws]
        wide = computed.logits.to(torch.promote_types(computed.logits.dtype, torch.float32))
        drawn = self.sampler.sample(wide, rows, computed.places, allowed)
        self.table.append(computed.rows, computed.places, drawn.token_ids)
        return drawn

    def _batches(self, plan: StepPlan, step: StepInput) -> list[AttentionBatch]:
        """Return each layer's batch; layers of a group share theirs."""
        batches = []
        for number, group in enumerate(self.groups):
            batches.append(AttentionBatch(runs=query_runs(plan, number), slot_mapping=step.slots[number]))
            self.num_gathers += batches[-1].num_gathers * len(group.layers)
        return [batches[self._group_of[layer]] for layer in range(len(self.kv))]

    def _copy(self, copy: BlockCopy) -> None:
        device = self.decoder.device
        sources, targets = (upload(blocks, torch.int64, device) for blocks in (copy.sources, copy.targets))
        for layer in self.groups[copy.group].layers:
            self.kv[layer].copy_blocks(sources, targets)

    def _score_prompt(self, item: Scheduled, hidden: torch.Tensor | None, first_row: int) -> PromptScores:
        """Score the prompt tokens that come after those of this chunk."""
        assert hidden is not None
        sequence = item.sequence
        stop = min(item.stop, sequence.num_prompt_tokens - 1)
        rows = hidden[first_row : first_row + stop - item.start]
        following = self.table.token_ids[item.row, item.start + 1 : stop + 1]
        num_top = sequence.request.sampling.top_logprobs
        tiles = []
        for begin in range(0, rows.size(0), PROMPT_TILE):
            logits = self.decoder.lm_head(rows[begin : begin + PROMPT_TILE])
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            tiles.append(log_probabilities(wide, following[begin : begin + PROMPT_TILE], num_top))
        scores, ranks, top_ids, top = (torch.cat(parts) for parts in zip(*tiles, strict=True))
        return PromptScores(item, following.clone(), scores, ranks, top_ids, top)


def query_runs(plan: StepPlan, group: int) -> tuple[QueryRun, ...]:
    """Return the parts of a plan as attention sees them in the layers of a KV group."""
    runs, start = [], 0
    for item in plan.rows:
        table = item.sequence.tables[group]
        length = item.stop - item.start
        runs.append(
            QueryRun(
                start=start,
                length=length,
                kv_length=item.stop,
                block_table=table.blocks,
                first_block=table.first_block,
            )
        )
        start += length
    return tuple(runs)


def finite_parts(hidden: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Return bool [sequences]: whether all hidden states [T, H] of each part, which end at `stops`, are numbers.

    A token that is none spoils keys and values of those before it in its chunk: what is masked counts as 0 times NaN.
    """
    faults = torch.logical_not(hidden.isfinite().all(dim=-1)).cumsum(0)
    until = faults.index_select(0, stops - 1)
    return until == torch.cat((torch.zeros_like(until[:1]), until[:-1]))


def reporting(plan: StepPlan) -> list[tuple[Scheduled, int]]:
    """Return the parts of the plan that have prompt tokens to score, and their first rows in the step."""
    found, row = [], 0
    for item in plan.rows:
        sequence = item.sequence
        if sequence.reports_prompt and item.start < sequence.num_prompt_tokens - 1:
            found.append((item, row))
        row += item.stop - item.start
    return found


def _read(columns: Many[torch.Tensor]) -> tuple[TokenLogprobs, ...]:
    ids, values, ranks, top_ids, top = (column.tolist() for column in columns)
    return tuple(
        TokenLogprobs(token_id=token, logprob=value, rank=rank, top=tuple(zip(others, tops, strict=True)))
        for token, value, rank, others, tops in zip(ids, values, ranks, top_ids, top, strict=True)
    )
