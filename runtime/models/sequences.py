"""A step of sequences of one length, each with its own run of blocks in a pool that nobody else uses."""

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun, page

# Tokens in a block of sequences that are computed without a cache to keep, where block tables are followed.
PAGE = 16


def independent(
    num_sequences: int, length: int, device: torch.device, *, pages: bool
) -> tuple[AttentionBatch, torch.Tensor, tuple[int, int]]:
    """Return a step of whole new sequences of one length: the batch, positions int64 [T], and the pool it needs.

    The pool is given as (blocks, block size). Whoever reads views has one block a sequence.
    """
    block_size = PAGE if pages else length
    blocks = -(-length // block_size)
    positions, batch = step_of_equals(num_sequences, length, 0, blocks, block_size, device=device, pages=pages)
    return batch, positions, (num_sequences * blocks, block_size)


def step_of_equals(
    num_sequences: int,
    length: int,
    start: int,
    blocks: int,
    block_size: int,
    *,
    device: torch.device,
    pages: bool,
) -> tuple[torch.Tensor, AttentionBatch]:
    """Return positions int64 [B x length] and the batch of the next `length` tokens after `start` of B sequences.

    Sequence i has blocks [i * blocks, (i + 1) * blocks). `pages`: kernels follow block tables on the device.
    """
    kv_length = start + length
    assert kv_length <= blocks * block_size, f"{kv_length} tokens in {blocks} blocks of {block_size}"
    runs = tuple(
        QueryRun(
            start=index * length,
            length=length,
            kv_length=kv_length,
            block_table=range(index * blocks, (index + 1) * blocks),
            first_block=index * blocks,
        )
        for index in range(num_sequences)
    )
    new = torch.arange(start, kv_length, device=device)
    sequences = torch.arange(num_sequences, device=device)[:, None] * (blocks * block_size)
    decoding, prompts = page(runs, block_size, device) if pages else (None, None)
    batch = AttentionBatch(runs=runs, slot_mapping=(sequences + new).flatten(), decoding=decoding, prompts=prompts)
    return new.repeat(num_sequences), batch
