"""Step preparation, plain torch."""

import torch

from pressd.runtime.kernels.step.buffers import StepBuffers


def prepare(
    columns: torch.Tensor,
    token_ids: torch.Tensor,
    block_tables: tuple[torch.Tensor, ...],
    block_size: int,
    num_tokens: int,
    out: StepBuffers,
) -> None:
    """As `Prepare` in buffers.py says."""
    rows, starts, lengths = columns.long().unbind()
    stops = lengths.cumsum(0)
    place = torch.arange(num_tokens, device=columns.device)
    # The place of a token: the first whose part ends behind it; tokens that pad have none.
    owner = torch.searchsorted(stops, place, right=True)
    is_real = owner < rows.numel()
    owner = owner.clamp(max=rows.numel() - 1)
    position = torch.where(is_real, starts[owner] + place - (stops - lengths)[owner], 0)
    row = torch.where(is_real, rows[owner], 0)
    out.token_ids.copy_(torch.where(is_real, token_ids[row, position], 0))
    out.positions.copy_(position)
    for slots, table in zip(out.slots, block_tables, strict=True):
        block = table[row, position // block_size].long()
        slots.copy_(torch.where(is_real, block * block_size + position % block_size, -1))
    out.stops.copy_(stops)
    out.kv_lengths.copy_(torch.where(lengths > 0, starts + lengths, 0))
