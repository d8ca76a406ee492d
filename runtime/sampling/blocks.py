"""The largest few of a long row without a sort: a row is looked at in blocks, and only the best blocks again.

Every function orders by value, largest first, and equal values by token id, lowest first. A NaN is the largest.
Legend: B rows, V vocabulary, N blocks of a row.
"""

import torch

BLOCK = 32


def block_maxima(values: torch.Tensor) -> torch.Tensor:
    """Return the largest value of each block of [B, V]: [B, N]; the last block may be short."""
    maxima = [part.amax(dim=-1) for part in _parts(values)]
    return torch.cat(maxima, dim=-1) if len(maxima) > 1 else maxima[0]


def block_sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of each block of [B, V]: [B, N]."""
    sums = [part.sum(dim=-1) for part in _parts(values)]
    return torch.cat(sums, dim=-1) if len(sums) > 1 else sums[0]


def tokens_of(blocks: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the token ids of blocks int64 [B, K]: int64 [B, K * BLOCK]; past the end the last id repeats."""
    within = torch.arange(BLOCK, device=blocks.device)
    return (blocks.unsqueeze(-1) * BLOCK + within).flatten(1).clamp_(max=vocab_size - 1)


def first_maximum(values: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """Return the id of the largest of [B, V], int64 [B], given its block maxima."""
    tokens = tokens_of(maxima.argmax(dim=-1, keepdim=True), values.shape[1])
    return _pick(tokens, values.gather(1, tokens).argmax(dim=-1))


def nth_true(marks: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Return the id of the n-th token (from 1) whose mark is 1, int64 [B], for marks float32 [B, V] of 0 and 1.

    Where there are fewer the answer is some id of the vocabulary.
    """
    sums = block_sums(marks)
    until = sums.cumsum(dim=-1, dtype=torch.float64)
    block = (until < n.unsqueeze(1)).sum(dim=-1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    before = (until - sums).gather(1, block)
    tokens = tokens_of(block, marks.shape[1])
    within = marks.gather(1, tokens).cumsum(dim=-1, dtype=torch.float64)
    return _pick(tokens, (within < n.unsqueeze(1) - before).sum(dim=-1).clamp_(max=BLOCK - 1))


def largest(values: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and ids, each [B, num], of the largest of [B, V] in order; num is at most V.

    Whatever is among the first `num` lies in one of the first `num` blocks, by their maxima.
    """
    maxima = block_maxima(values)
    order = maxima.sort(dim=-1, descending=True, stable=True).indices
    blocks = order.narrow(1, 0, min(num, maxima.shape[1])).sort(dim=-1).values
    tokens = tokens_of(blocks, values.shape[1])
    # The last id, where it repeats, counts once.
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated.narrow(1, 1, tokens.shape[1] - 1).copy_(tokens.diff(dim=-1) == 0)
    found = values.gather(1, tokens)
    order = torch.where(repeated, float("-inf"), found).sort(dim=-1, descending=True, stable=True).indices
    order = order.narrow(1, 0, num)
    return found.gather(1, order), tokens.gather(1, order)


def _parts(values: torch.Tensor) -> list[torch.Tensor]:
    """Return views of the whole blocks [B, N, BLOCK] and of a last short one [B, 1, rest], where there are any."""
    vocab_size = values.shape[1]
    whole = vocab_size // BLOCK
    parts = []
    if whole:
        parts.append(values.narrow(1, 0, whole * BLOCK).view(-1, whole, BLOCK))
    if whole * BLOCK < vocab_size:
        parts.append(values.narrow(1, whole * BLOCK, vocab_size - whole * BLOCK).unsqueeze(1))
    return parts


def _pick(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, at.unsqueeze(1)).squeeze(1)
