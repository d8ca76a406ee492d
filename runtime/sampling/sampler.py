"""The one sampler: logits in, token ids out, for any mixture of settings in a batch.

A row's result depends on its logits, its request, its sequence's index and tokens, and the position; never on other
rows.
On a GPU nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from pressd.runtime.request import Request
from pressd.runtime.sampling import filters
from pressd.runtime.sampling.blocks import block_maxima, first_maximum
from pressd.runtime.sampling.logprobs import LogprobColumns, log_probabilities
from pressd.runtime.sampling.masks import TokenMasks, apply_token_masks, bans_of
from pressd.runtime.sampling.noise import position_keys, sequence_key, spread_tokens
from pressd.runtime.sampling.penalties import Penalties, add_biases, has_penalties
from pressd.runtime.sampling.plan import Admitted, Filters, Group, Plan
from pressd.runtime.sampling.race import Race
from pressd.runtime.sampling.scratch import Scratch, upload

# (logits [B, V], keys int32 [B, 2], temperatures float64 [B], 0 for greedy) to tokens int64 [B] and largest logits [B].
RaceKernel: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# Rows are drawn in chunks of about as many logits, which bounds the memory of a step: some six buffers of 4 bytes each.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One token per row of a batch, int64 [B].

    Where `finite`, bool [B], is False, logits were NaN, plus infinity, or all minus infinity; where `possible`, bool
    [B], is False, they were finite and what is forbidden left no token. In both cases the token means nothing.
    `logprobs` is None if no row asked.
    """

    token_ids: torch.Tensor
    finite: torch.Tensor
    possible: torch.Tensor
    logprobs: LogprobColumns | None


class Sampler:
    """Draws the next token of every sequence; each has a row from `admit` to `release`.

    `token_table`, int64 [num_rows, max_length] on `device`, belongs to the caller: where a position is drawn, the row's
    entries before it are the sequence's tokens. It is read, never written.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        token_table: torch.Tensor,
        race: RaceKernel | None = None,
    ) -> None:
        """`race` draws whole batches on a device, but for rows with filters."""
        self._race = race
        self._vocab_size, self._eos_token_ids, self._device = vocab_size, tuple(eos_token_ids), device
        self._token_table = token_table
        self._admitted: list[Admitted | None] = [None] * num_rows
        self._scratch = Scratch(device)
        self._penalties = Penalties(vocab_size, self._scratch)
        self._spread = spread_tokens(vocab_size, device)
        self._planned: tuple[int, ...] | None = None
        self._plan: Plan | None = None

    def admit(self, row: int, request: Request, index: int, num_tokens: int) -> None:
        """Give a free row to the request's `index`-th sequence, whose first `num_tokens` tokens are in the table."""
        assert self._admitted[row] is None, f"row {row} is taken"
        sampling = request.sampling
        biases = None
        if sampling.logit_bias:
            tokens, addends = zip(*sampling.logit_bias, strict=True)
            biases = (upload(tokens, torch.int64, self._device), upload(addends, torch.float64, self._device))
        self._admitted[row] = Admitted(
            sampling=sampling,
            sequence_key=sequence_key(sampling.seed, index),
            filters=Filters.of(sampling, self._vocab_size) if sampling.temperature > 0 else None,
            bans=bans_of(request, self._eos_token_ids, self._vocab_size, self._device),
            biases=biases,
        )
        if has_penalties(sampling):
            known = self._token_table.select(0, row).narrow(0, 0, num_tokens)
            self._penalties.admit(row, sampling, known, min(num_tokens, len(request.prompt_token_ids)))
        self._planned = None

    def release(self, row: int) -> None:
        """Free the row."""
        assert self._admitted[row] is not None, f"row {row} is free"
        self._admitted[row] = None
        self._penalties.release(row)
        self._planned = None

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        positions: torch.Tensor,
        allowed: TokenMasks | None = None,
    ) -> Drawn:
        """Draw a token for each of `rows` from logits [B, V], float32 or float64, which are not modified.

        `positions`, int64 [B], are the places of the drawn tokens in their sequences, that is the numbers of tokens
        before them. `allowed` are the constraints' masks. What was drawn counts for the rows' penalties at once: a row
        may come twice, at two positions, unless it has some.
        """
        plan = self._plan_for(rows)
        raw = logits
        if plan.changes_logits or (allowed is not None and allowed.places):
            logits = self._changed(logits, plan, positions, allowed)
        token_ids, peak = self._begin(logits, plan, positions)
        finite = (peak if logits is raw else block_maxima(raw).amax(dim=-1)).isfinite()
        possible = (peak != float("-inf")) | ~finite
        for group in plan.groups:
            if self._race is None or group.filters.any:
                self._draw_group(logits, peak, positions, group, token_ids)
        if plan.penalised is not None and plan.slots is not None:
            self._penalties.count(plan.slots, token_ids.index_select(0, plan.penalised))
        logprobs = self._logprobs(raw, token_ids, plan)
        return Drawn(token_ids=token_ids, finite=finite, possible=possible, logprobs=logprobs)

    def _begin(self, logits: torch.Tensor, plan: Plan, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens int64 [B], so far of greedy rows (by a kernel, of all without filters), and peaks [B]."""
        if self._race is not None:
            return self._race(logits, position_keys(plan.sequence_keys, positions), plan.temperatures)
        maxima = block_maxima(logits)
        token_ids = first_maximum(logits, maxima) if plan.any_greedy else torch.zeros_like(positions)
        return token_ids, maxima.amax(dim=-1)

    def _plan_for(self, rows: Sequence[int]) -> Plan:
        wanted = tuple(rows)
        if self._plan is None or wanted != self._planned:
            members = [member for row in wanted if (member := self._admitted[row]) is not None]
            assert len(members) == len(wanted), f"rows {wanted} are not all admitted"
            self._plan, self._planned = Plan(wanted, members, self._penalties, self._device), wanted
        return self._plan

    def _changed(
        self, logits: torch.Tensor, plan: Plan, positions: torch.Tensor, allowed: TokenMasks | None
    ) -> torch.Tensor:
        """Return a copy of the logits [B, V] with bans, masks, biases and penalties applied."""
        changed = self._scratch.take("changed", logits.shape, logits.dtype).copy_(logits)
        if plan.bans is not None:
            plan.bans.apply(changed, positions, self._token_table)
        if allowed is not None and allowed.places:
            apply_token_masks(changed, allowed)
        if plan.biases is not None:
            add_biases(changed, *plan.biases)
        if plan.penalised is not None and plan.slots is not None:
            self._penalties.apply(changed, plan.penalised, plan.slots)
        return changed

    def _draw_group(
        self, logits: torch.Tensor, peak: torch.Tensor, positions: torch.Tensor, group: Group, token_ids: torch.Tensor
    ) -> None:
        """Write what the rows of the group draw to token_ids [B]."""
        if group.places is not None:
            positions = positions.index_select(0, group.places)
        keys = position_keys(group.sequence_keys, positions)
        step = max(1, _CHUNK[self._device.type] // self._vocab_size)
        for start in range(0, group.num_rows, step):
            part = slice(start, min(start + step, group.num_rows))
            places = None if group.places is None else group.places[part]
            race = Race.begin(
                logits[part] if places is None else logits.index_select(0, places),
                peak[part] if places is None else peak.index_select(0, places),
                group.temperature[part],
                keys[part],
                self._spread,
                self._scratch,
            )
            drawn = draw(race, group, part, may_ask=self._device.type == "cpu")
            if places is None:
                token_ids[part] = drawn
            else:
                token_ids.index_copy_(0, places, drawn)

    def _logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, plan: Plan) -> LogprobColumns | None:
        if plan.asked_places is None:
            return None
        chosen, drawn = logits.index_select(0, plan.asked_places), token_ids.index_select(0, plan.asked_places)
        logprobs, ranks, top_ids, top_logprobs = log_probabilities(chosen, drawn, max(plan.num_top))
        return LogprobColumns(
            places=plan.asked,
            num_top=plan.num_top,
            token_ids=drawn,
            logprobs=logprobs,
            ranks=ranks,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
        )


def draw(race: Race, group: Group, part: slice, *, may_ask: bool) -> torch.Tensor:
    """Return the winners, int64, of a race among what the group's filters keep; `part` of its rows are in the race.

    `may_ask`: the host may read from the device. It changes the way, not the result.
    """
    used = group.filters
    weights = race.weights(same_everywhere=used.top_p or used.typical_p)
    if not (may_ask and used.top_p) or used.typical_p:
        keep_filtered(weights, race, group, part)
        return race.winner(weights)
    if used.top_k:
        filters.keep_top_k(weights, race.logits, group.top_k[part], group.max_k, race.scratch)
    choice = weights
    if used.min_p:
        choice = weights.clone()
        filters.keep_min_p(choice, group.min_p[part], race.scratch)
    return filters.draw_in_top_p(race, weights, choice, group.top_p[part])


def keep_filtered(weights: torch.Tensor, race: Race, group: Group, part: slice) -> None:
    """Zero the weights, float32 [rows, V], of what the group's filters remove."""
    used = group.filters
    if used.top_k:
        filters.keep_top_k(weights, race.logits, group.top_k[part], group.max_k, race.scratch)
    if used.top_p:
        filters.keep_top_p(weights, race.logits, group.top_p[part], race.scratch)
    if used.typical_p:
        keys = filters.typicality(weights, race.scratch)
        filters.keep_top_p(weights, keys, group.typical_p[part], race.scratch)
    if used.min_p:
        filters.keep_min_p(weights, group.min_p[part], race.scratch)
