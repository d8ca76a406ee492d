"""Log-probabilities of the raw model: before temperature, filters, penalties and masks.

Legend: T rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pressd.runtime.request import TokenLogprobs
from pressd.runtime.sampling.blocks import largest

# As many logits are widened at a time: on a CPU what its cache holds, on a GPU 64 MiB.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 23}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobColumns:
    """Log-probabilities of drawn tokens, for the rows of a batch that asked.

    The i-th entry is of row `places[i]`: `logprobs[i]` (float64) is that of the drawn token `token_ids[i]` (int64),
    which is the `ranks[i]`-th by probability, and the first `num_top[i]` of `top_ids[i]` (int64) and
    `top_logprobs[i]` (float64), each [rows, max(num_top)], are the likeliest tokens.
    """

    places: tuple[int, ...]
    num_top: tuple[int, ...]
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def columns(self) -> tuple[torch.Tensor, ...]:
        return (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs)

    def by_place(self, columns: Sequence[torch.Tensor] | None = None) -> dict[int, TokenLogprobs]:
        """Return them by place in the batch: from `columns`, copies on the host, or waiting for the device."""
        own = self.columns() if columns is None else columns
        entries = zip(self.places, self.num_top, *(column.tolist() for column in own), strict=True)
        return {
            place: TokenLogprobs(
                token_id=token, logprob=logprob, rank=rank, top=tuple(zip(ids[:num], tops[:num], strict=True))
            )
            for place, num, token, logprob, rank, ids, tops in entries
        }


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return natural log-probabilities of tokens, and the likeliest tokens, under the softmax of logits [T, V].

    Those of token_ids int64 [T] are float64 [T]; then come their ranks, int64 [T], from 1 and shared by equally likely
    ones; then ids, int64, and log-probabilities, float64, of the likeliest tokens of each row, [T, min(num_top, V)],
    likeliest first and equally likely ones by id.
    """
    num_rows, vocab_size = logits.shape
    num_top = min(num_top, vocab_size)
    step = max(1, _CHUNK[logits.device.type] // vocab_size)
    starts = range(0, max(num_rows, 1), step)
    parts = [_of_chunk(logits[start : start + step], token_ids[start : start + step], num_top) for start in starts]
    chosen, ranks, top_ids, top = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(ranks), torch.cat(top_ids), torch.cat(top)


def _of_chunk(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total = logits.double().logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits > own).sum(dim=-1).add_(1)
    chosen = own.double().sub_(total).squeeze(1)
    if not num_top:
        return chosen, ranks, token_ids.new_zeros(len(chosen), 0), chosen.new_zeros(len(chosen), 0)
    values, ids = largest(logits, num_top)
    return chosen, ranks, ids, values.double().sub_(total)
