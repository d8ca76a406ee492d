"""What the device knows of the sequences in the batch: one fixed row each, from admission to the end."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from pressd.runtime.sampling import upload
from pressd.runtime.scheduler import Scheduled
from pressd.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepInput:
    """The tokens of a step, all sequences in one row of T; `ends` [B] are the last ones of the sequences that draw.

    `stops` [sequences] are the ends of their parts. `slots` has, for each KV group, where the keys and values of each
    token go (block * block_size + offset).
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: tuple[torch.Tensor, ...]
    stops: torch.Tensor
    ends: torch.Tensor


class RequestTable:
    """Token ids [rows, max_length] and block tables [rows, max_blocks] of each KV group, on the device.

    A drawn token is written here by the step that draws it, so that the next step can be prepared before the host has
    seen it. The host writes only what changed: a row when a sequence is admitted, blocks when it gets some.
    """

    def __init__(
        self, *, num_rows: int, max_length: int, num_groups: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.token_ids = torch.zeros(num_rows, max_length, dtype=torch.int64, device=device)
        shape = (num_rows, -(-max_length // block_size))
        self.block_tables = tuple(torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(num_groups))

    def admit(self, sequence: Sequence) -> None:
        """Write the tokens of a sequence into the row that it was given."""
        ids = upload(sequence.token_ids, torch.int64, self.token_ids.device)
        self.token_ids[sequence.row, : len(sequence.token_ids)] = ids
        for table in sequence.tables:
            table.num_written = 0

    def update_blocks(self, sequences: Many[Sequence]) -> None:
        """Write the entries of sequences' block tables that changed."""
        for group, rows in enumerate(self.block_tables):
            places: list[int] = []
            blocks: list[int] = []
            for sequence in sequences:
                table = sequence.tables[group]
                if table.num_written < len(table.blocks):
                    assert sequence.row is not None
                    first = sequence.row * rows.size(1)
                    places += range(first + table.num_written, first + len(table.blocks))
                    blocks += table.blocks[table.num_written :]
                    table.num_written = len(table.blocks)
            if blocks:
                device = rows.device
                rows.view(-1).index_copy_(0, upload(places, torch.int64, device), upload(blocks, torch.int32, device))

    def prepare(self, step: Many[Scheduled]) -> StepInput:
        """Return the inputs of a step of at least one token."""
        device = self.token_ids.device
        total = sum(item.stop - item.start for item in step)
        # One transfer: row, first position and number of tokens of each sequence.
        columns = upload([(i.row, i.start, i.stop - i.start) for i in step], torch.int64, device).t()
        rows, starts, lengths = columns.unbind()
        stops = lengths.cumsum(0)
        shift = torch.repeat_interleave(starts - (stops - lengths), lengths, output_size=total)
        positions = torch.arange(total, device=device) + shift
        row_of = torch.repeat_interleave(rows, lengths, output_size=total)
        blocks, offsets = positions // self.block_size, positions % self.block_size
        drawing = upload([place for place, item in enumerate(step) if item.draws], torch.int64, device)
        return StepInput(
            token_ids=_at(self.token_ids, row_of, positions),
            positions=positions,
            slots=tuple(_at(table, row_of, blocks) * self.block_size + offsets for table in self.block_tables),
            stops=stops,
            ends=stops.index_select(0, drawing) - 1,
        )

    def append(self, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write a drawn token at its position in each of the rows, int64 [B] all three."""
        self.token_ids.view(-1).index_copy_(0, rows * self.token_ids.size(1) + positions, token_ids)


def _at(table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return table.view(-1).index_select(0, rows * table.size(1) + columns)
