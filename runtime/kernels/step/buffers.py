"""What a step on the device reads: made by one kernel from three numbers for each sequence."""

from dataclasses import dataclass
from typing import Protocol, Self

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBuffers:
    """Inputs of a step of T tokens at S places, S of which may be empty and T padded.

    `token_ids` and `positions` are int64 [T], 0 where padded; `slots` int64 [groups, T] tell where keys and values go
    (block * block_size + offset), -1 where padded. `stops` int64 [S] are the ends of the places' parts of the step,
    `kv_lengths` int32 [S] what each attends to, 0 where a place is empty.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    stops: torch.Tensor
    kv_lengths: torch.Tensor

    @classmethod
    def new(cls, num_tokens: int, num_places: int, num_groups: int, device: torch.device) -> Self:
        """Allocate, without clearing."""
        return cls(
            token_ids=torch.empty(num_tokens, dtype=torch.int64, device=device),
            positions=torch.empty(num_tokens, dtype=torch.int64, device=device),
            slots=torch.empty(num_groups, num_tokens, dtype=torch.int64, device=device),
            stops=torch.empty(num_places, dtype=torch.int64, device=device),
            kv_lengths=torch.empty(num_places, dtype=torch.int32, device=device),
        )


class Prepare(Protocol):
    """Fills the buffers of a step.

    `columns` int32 [3, S] are row, first position and number of tokens of each place (0: empty); `token_ids`
    [rows, max_length] and the `block_tables` [rows, max_blocks] of each KV group are the request table's. There are
    `num_tokens` tokens with those that pad.
    """

    def __call__(
        self,
        columns: torch.Tensor,
        token_ids: torch.Tensor,
        block_tables: tuple[torch.Tensor, ...],
        block_size: int,
        num_tokens: int,
        out: StepBuffers,
    ) -> None: ...
