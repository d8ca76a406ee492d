"""Greedy continuations with the engine's own decoder: the most likely token, again and again."""

from collections.abc import Iterator

from torch import Tensor

from pressd.runtime.models import Decoder
from pressd.runtime.models.sequences import PAGE, step_of_equals


def greedy(decoder: Decoder, prompts_BT: Tensor, most: int) -> Iterator[Tensor]:
    """Yield `most` times the next token [B] of each of B prompts int64 [B, T], every one given all before it.

    Keys and values are kept for T + most tokens in every layer. An end of text ends nothing.
    """
    num_sequences, length = prompts_BT.shape
    block_size = PAGE if decoder.reads_tables else length + most
    blocks = -(-(length + most) // block_size)
    kv = [decoder.new_kv(num_sequences * blocks, block_size) for _ in decoder.blocks]
    new_BT, start = prompts_BT.to(decoder.device), 0
    for _ in range(most):
        positions, batch = step_of_equals(
            num_sequences,
            new_BT.size(1),
            start,
            blocks,
            block_size,
            device=decoder.device,
            pages=decoder.reads_tables,
        )
        hidden = decoder.forward(new_BT.flatten(), positions, kv, batch)
        picked_B = decoder.lm_head(hidden.view(num_sequences, new_BT.size(1), -1)[:, -1]).argmax(-1)
        yield picked_B
        start += new_BT.size(1)
        new_BT = picked_B[:, None]
