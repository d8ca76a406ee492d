"""Runs rows of tokens through two models, one after the other, and compares what they predict.

R rows, T tokens of a row, H hidden.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pressd.compress.fidelity import PerToken, compare
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import Decoder, decoder_config, load_decoder

# Tokens that run through a decoder at once, and numbers per temporary of the comparison (32 MiB in float64).
_BATCH_TOKENS = 4096
_CHUNK_LOGITS = 1 << 22

Progress: TypeAlias = Callable[[str, int, int], None]
Head: TypeAlias = Callable[[Tensor], Tensor]


def check_context(checkpoint: Checkpoint, needed: int, what: str) -> None:
    """Raise ValueError if the model reads fewer than `needed` tokens at once; `what` needs them."""
    context = decoder_config(checkpoint).max_context
    if needed > context:
        raise ValueError(f"{checkpoint.path} reads {context} tokens at once; {what} is {needed}")


def load(checkpoint: Checkpoint) -> Decoder:
    """Return the decoder with which a model is measured."""
    return load_decoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32, prefer="fast")


def final_hidden(decoder: Decoder, ids_RT: Tensor, label: str, progress: Progress) -> Tensor:
    """Return hidden states [R, T - 1, H] after the final norm.

    Logits of every token would take V / H times the memory; they are computed again where they are compared.
    """
    parts = []
    for batch_BT in _batches(ids_RT):
        parts.append(decoder.hidden_states(batch_BT)[:, :-1])
        progress(label, sum(len(part) for part in parts), len(ids_RT))
    return torch.cat(parts)


def compare_rows(
    decoder: Decoder, ids_RT: Tensor, source_hidden_RTH: Tensor, source_head: Head, label: str, progress: Progress
) -> PerToken:
    """Run the rows through `decoder`, and compare each prediction with that of the source."""
    parts: list[PerToken] = []
    done = 0
    for batch_BT in _batches(ids_RT):
        hidden = decoder.hidden_states(batch_BT)[:, :-1].flatten(0, 1)
        source_hidden = source_hidden_RTH[done : done + len(batch_BT)].flatten(0, 1)
        targets = batch_BT[:, 1:].flatten()
        chunk = max(1, _CHUNK_LOGITS // decoder.config.vocab_size)
        for piece in zip(
            torch.split(source_hidden, chunk), torch.split(hidden, chunk), torch.split(targets, chunk), strict=True
        ):
            parts.append(compare(source_head(piece[0]), decoder.head(piece[1]), piece[2]))
        done += len(batch_BT)
        progress(label, done, len(ids_RT))
    return PerToken.join(parts, len(ids_RT))


def _batches(ids_RT: Tensor) -> tuple[Tensor, ...]:
    return torch.split(ids_RT, max(1, _BATCH_TOKENS // ids_RT.size(1)))
