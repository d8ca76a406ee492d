"""Step preparation in one launch: tokens, positions, slots and lengths from three numbers for each sequence."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.step.buffers import StepBuffers
from pressd.runtime.kernels.variants import Variant

TOKENS = 64


@triton.jit(
    do_not_specialize=["num_places", "num_tokens"],
    do_not_specialize_on_alignment=["columns", "token_ids", "positions", "slots", "stops", "kv_lengths"],
)
def prepare_step(
    columns,
    token_table,
    block_table,
    token_ids,
    positions,
    slots,
    stops,
    kv_lengths,
    num_places,
    num_tokens,
    max_length,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    TOKENS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """One program for TOKENS tokens; the first of all writes what is told of places. `FIRST`: of the KV groups."""
    place = tl.arange(0, PLACES)
    is_place = place < num_places
    row = tl.load(columns + place, mask=is_place, other=0)
    start = tl.load(columns + num_places + place, mask=is_place, other=0)
    length = tl.load(columns + 2 * num_places + place, mask=is_place, other=0)
    stop = tl.cumsum(length, 0)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # Places of no tokens own nothing: their part begins where it ends.
    owns = (token[:, None] >= (stop - length)[None, :]) & (token[:, None] < stop[None, :])
    own_row = tl.sum(tl.where(owns, row[None, :], 0), 1)
    shift = tl.sum(tl.where(owns, (start - (stop - length))[None, :], 0), 1)
    is_real = tl.sum(owns.to(tl.int32), 1) > 0
    position = tl.where(is_real, token + shift, 0)
    is_token = token < num_tokens
    entry = block_table + own_row.to(tl.int64) * max_blocks + position // BLOCK_SIZE
    block = tl.load(entry, mask=is_real & is_token, other=0).to(tl.int64)
    slot = tl.where(is_real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slots + token, slot, mask=is_token)
    if FIRST:
        own = token_table + own_row.to(tl.int64) * max_length + position
        tl.store(token_ids + token, tl.load(own, mask=is_real & is_token, other=0), mask=is_token)
        tl.store(positions + token, position.to(tl.int64), mask=is_token)
        if tl.program_id(0) == 0:
            tl.store(stops + place, stop.to(tl.int64), mask=is_place)
            tl.store(kv_lengths + place, tl.where(length > 0, start + length, 0), mask=is_place)


def prepare(
    columns: torch.Tensor,
    token_ids: torch.Tensor,
    block_tables: tuple[torch.Tensor, ...],
    block_size: int,
    num_tokens: int,
    out: StepBuffers,
) -> None:
    """As `Prepare` in buffers.py says; columns are contiguous. One launch for each KV group."""
    assert columns.is_contiguous(), "columns are read by rows"
    num_places = columns.size(1)
    for group, table in enumerate(block_tables):
        prepare_step[(triton.cdiv(num_tokens, TOKENS),)](
            columns,
            token_ids,
            table,
            out.token_ids,
            out.positions,
            out.slots[group],
            out.stops,
            out.kv_lengths,
            num_places,
            num_tokens,
            token_ids.size(1),
            table.size(1),
            BLOCK_SIZE=block_size,
            PLACES=max(16, triton.next_power_of_2(num_places)),
            TOKENS=TOKENS,
            FIRST=group == 0,
            num_warps=4,
        )


def variants() -> Iterator[Variant]:
    for places in (16, 128, 256):
        pointers = {"columns": "*i32", "token_table": "*i64", "block_table": "*i32", "token_ids": "*i64"}
        pointers |= {"positions": "*i64", "slots": "*i64", "stops": "*i64", "kv_lengths": "*i32"}
        yield Variant(
            name=f"prepare {places} places",
            kernel=prepare_step,
            signature=pointers | dict.fromkeys(("num_places", "num_tokens", "max_length", "max_blocks"), "i32"),
            constants={"BLOCK_SIZE": 16, "PLACES": places, "TOKENS": TOKENS, "FIRST": True},
        )
