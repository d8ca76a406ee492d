"""One step on the device: scheduled tokens in, logits of the sequences that reached their end out."""

from collections.abc import Sequence

import torch

from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun
from pressd.runtime.layers.attention import LayerKV
from pressd.runtime.models.decoder import Decoder
from pressd.runtime.scheduler import Scheduled


class Runner:
    """Owns the KV pool's memory and turns a step's schedule into tensors."""

    def __init__(self, decoder: Decoder, *, num_blocks: int, block_size: int) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.kv: list[LayerKV] = [decoder.new_kv(num_blocks, block_size) for _ in decoder.blocks]
        self.num_gathers = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool in all layers."""
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.kv)

    def run(self, step: Sequence[Scheduled]) -> torch.Tensor:
        """Compute the scheduled tokens; return logits [rows, vocab], a row per sequence that reached its end."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        runs: list[QueryRun] = []
        for scheduled in step:
            sequence, done = scheduled.sequence, scheduled.sequence.num_computed_tokens
            until = done + scheduled.num_tokens
            runs.append(
                QueryRun(
                    start=len(token_ids),
                    length=scheduled.num_tokens,
                    kv_length=until,
                    block_table=sequence.block_table,
                    first_block=sequence.first_block,
                )
            )
            token_ids += sequence.token_ids[done:until]
            positions += range(done, until)
            slots += self._slots(sequence.block_table, done, until)
            if scheduled.reaches_end:
                ends.append(len(token_ids) - 1)
        device = self.decoder.device
        batch = AttentionBatch(runs=tuple(runs), slot_mapping=torch.tensor(slots, device=device))
        self.num_gathers += batch.num_gathers * len(self.kv)
        ids, places = torch.tensor(token_ids, device=device), torch.tensor(positions, device=device)
        hidden = self.decoder.forward(ids, places, self.kv, batch)
        logits = self.decoder.lm_head(hidden[torch.tensor(ends, dtype=torch.int64, device=device)])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _slots(self, block_table: tuple[int, ...], start: int, stop: int) -> list[int]:
        size = self.block_size
        return [block_table[position // size] * size + position % size for position in range(start, stop)]
