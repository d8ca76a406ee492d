"""Biases and penalties: addends of single logits, and counts of the tokens that a sequence already has.

Legend: B rows of a batch, V vocabulary, A rows with penalties, P places for counts.
"""

from collections.abc import Sequence

import torch

from pressd.runtime.params import SamplingParams
from pressd.runtime.sampling.scratch import Scratch, upload


def has_penalties(sampling: SamplingParams) -> bool:
    """Return whether the request needs counts."""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def add_biases(logits: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor, biases: torch.Tensor) -> None:
    """Add each bias float64 [N] to the logit at (place, token), int64 [N] each; logits [B, V] contiguous, in place."""
    logits.view(-1).index_add_(0, places * logits.shape[1] + tokens, biases.to(logits.dtype))


class Penalties:
    """Counts of the tokens of sequences whose requests use penalties; memory grows with their number, and is kept."""

    def __init__(self, vocab_size: int, scratch: Scratch) -> None:
        device = scratch.device
        self._vocab_size, self._scratch, self._device = vocab_size, scratch, device
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._seen = torch.zeros(0, vocab_size, device=device)
        self._counts = torch.zeros(0, vocab_size, device=device)
        self._settings = torch.zeros(0, 3, dtype=torch.float64, device=device)

    def __contains__(self, row: int) -> bool:
        return row in self._slots

    def admit(self, row: int, sampling: SamplingParams, tokens: torch.Tensor, prompt_length: int) -> None:
        """Count the tokens int64 [T] that the sequence in `row` has; the first `prompt_length` are its prompt's."""
        if not self._free:
            self._grow()
        slot = self._slots[row] = self._free.pop()
        # 0 and 1, and whole numbers up to 2^24, are exact in float32, in whatever order they are added.
        seen, counts = self._seen.select(0, slot).zero_(), self._counts.select(0, slot).zero_()
        seen.index_fill_(0, tokens, 1.0)
        output = tokens.narrow(0, prompt_length, tokens.shape[0] - prompt_length)
        counts.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))
        values = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        for column, value in enumerate(values):
            self._settings.select(0, slot).select(0, column).fill_(value)

    def release(self, row: int) -> None:
        """Forget the sequence in `row`, if it has counts."""
        if row in self._slots:
            self._free.append(self._slots.pop(row))

    def slots(self, rows: Sequence[int]) -> torch.Tensor:
        """Return where the counts of these rows are, int64 [A]."""
        return upload([self._slots[row] for row in rows], torch.int64, self._device)

    def apply(self, logits: torch.Tensor, places: torch.Tensor, slots: torch.Tensor) -> None:
        """Change the rows `places` [A] of logits [B, V] in place, by the counts in `slots` [A]."""
        settings = self._settings.index_select(0, slots).to(logits.dtype)
        repetition, presence, frequency = (settings.narrow(1, column, 1) for column in range(3))
        shape = (slots.shape[0], self._vocab_size)
        counts, chosen, part, factor = (
            self._scratch.take("counts", shape),
            *(self._scratch.take(name, shape, logits.dtype) for name in ("chosen", "part", "factor")),
        )
        torch.index_select(logits, 0, places, out=chosen)
        torch.index_select(self._seen, 0, slots, out=counts)
        # The penalty where a token was seen, exactly, and 1 elsewhere.
        torch.mul(counts, repetition, out=factor).add_(counts.neg_().add_(1))
        torch.clamp(chosen, min=0, out=part)
        chosen.sub_(part).mul_(factor).add_(part.div_(factor))
        torch.index_select(self._counts, 0, slots, out=counts)
        chosen.sub_(torch.mul(counts, frequency, out=part))
        chosen.sub_(torch.mul(counts.clamp_(max=1), presence, out=part))
        logits.index_copy_(0, places, chosen)

    def count(self, slots: torch.Tensor, drawn: torch.Tensor) -> None:
        """Count a token int64 [A] drawn for each of `slots` [A], which are distinct."""
        at = slots * self._vocab_size + drawn
        self._seen.view(-1).index_fill_(0, at, 1.0)
        self._counts.view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.float32))

    def _grow(self) -> None:
        before = self._seen.shape[0]
        added = max(before, 1)
        self._free += range(before, before + added)
        self._seen, self._counts, self._settings = (
            torch.cat([old, old.new_zeros(added, old.shape[1])]) for old in (self._seen, self._counts, self._settings)
        )
