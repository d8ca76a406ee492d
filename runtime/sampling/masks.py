"""Tokens that must not be drawn: they get a logit of minus infinity before anything else looks at it.

Legend: B rows of a batch, V vocabulary, W words, J tokens of the longest word but its last, N entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pressd.runtime.request import Request
from pressd.runtime.sampling.scratch import upload

_MINUS_INFINITY_BITS = 0xFF800000 - 2**32
_PADDING, _NO_TOKEN = -1, -2


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """What a constraint allows: bit t % 32 of word t // 32 is set if token t may come next.

    `places` are rows of the batch, each at most once; `bits` is int32 [len(places), ceil(V / 32)]. Bits past V are
    not looked at.
    """

    places: list[int]
    bits: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Bans:
    """What one request forbids, on the device.

    The token `last` [W] is forbidden where the tokens before it are `before` [W, J], nearest first, padded with -1.
    `early` [N] are forbidden before position `early_until`. `outside` float32 [V] is added: 0 at allowed ids, minus
    infinity elsewhere.
    """

    before: torch.Tensor
    last: torch.Tensor
    early: torch.Tensor
    early_until: int
    outside: torch.Tensor | None


def bans_of(request: Request, eos_token_ids: Sequence[int], vocab_size: int, device: torch.device) -> Bans | None:
    """Return what the request forbids, or None if that is nothing."""
    words, allowed = request.sampling.bad_words, request.sampling.allowed_token_ids
    early = _ending_ids(request, eos_token_ids) if request.stopping.min_new_tokens else []
    if not words and allowed is None and not early:
        return None
    longest = max((len(word) for word in words), default=1) - 1
    before = [[*word[-2::-1], *[_PADDING] * (longest + 1 - len(word))] for word in words]
    outside = None
    if allowed is not None:
        outside = torch.full((vocab_size,), float("-inf"), device=device)
        outside.index_fill_(0, upload(allowed, torch.int64, device), 0.0)
    return Bans(
        before=upload([token for row in before for token in row], torch.int64, device).view(len(words), longest),
        last=upload([word[-1] for word in words], torch.int64, device),
        early=upload(early, torch.int64, device),
        early_until=len(request.prompt_token_ids) + request.stopping.min_new_tokens,
        outside=outside,
    )


def _ending_ids(request: Request, eos_token_ids: Sequence[int]) -> list[int]:
    """Return what ends the request. Under a constraint EOS is the end of the text, wished for or not."""
    ignored = request.stopping.ignore_eos and request.constraint is None
    return sorted({*request.stopping.stop_token_ids, *(() if ignored else eos_token_ids)})


class BatchBans:
    """The bans of sequences, ready to be applied at once; each has a place in the batch and a row of the table."""

    def __init__(self, places: Sequence[int], rows: Sequence[int], bans: Sequence[Bans], device: torch.device) -> None:
        self._places = upload(places, torch.int64, device)
        self._rows = upload(rows, torch.int64, device)
        worded = [index for index, ban in enumerate(bans) if ban.last.shape[0]]
        self._worded = upload(worded, torch.int64, device)
        self._longest = max((bans[index].before.shape[1] for index in worded), default=0)
        self._word_owner = _owners([bans[index].last.shape[0] for index in worded], device)
        if worded:
            self._before = torch.cat([self._padded(bans[index].before) for index in worded])
            self._last = torch.cat([bans[index].last for index in worded])
        hasty = [index for index, ban in enumerate(bans) if ban.early.shape[0]]
        self._hasty = upload(hasty, torch.int64, device)
        self._early_owner = _owners([bans[index].early.shape[0] for index in hasty], device)
        if hasty:
            self._early = torch.cat([bans[index].early for index in hasty])
            self._early_until = upload([bans[index].early_until for index in hasty], torch.int64, device)
        outside = [(place, ban.outside) for place, ban in zip(places, bans, strict=True) if ban.outside is not None]
        self._bounded = upload([place for place, _ in outside], torch.int64, device)
        if outside:
            self._outside = torch.stack([mask for _, mask in outside])

    def apply(self, logits: torch.Tensor, positions: torch.Tensor, token_table: torch.Tensor) -> None:
        """Change logits [B, V], contiguous, in place; positions int64 [B] are those of the tokens to draw."""
        if self._bounded.shape[0]:
            logits.index_add_(0, self._bounded, self._outside.to(logits.dtype))
        if self._worded.shape[0]:
            places = self._places.index_select(0, self._worded)
            tails = self._tails(positions.index_select(0, places), token_table).index_select(0, self._word_owner)
            found = ((tails == self._before) | (self._before == _PADDING)).all(dim=-1)
            _forbid(logits, places.index_select(0, self._word_owner), self._last, found)
        if self._hasty.shape[0]:
            places = self._places.index_select(0, self._hasty)
            too_early = positions.index_select(0, places) < self._early_until
            owner = self._early_owner
            _forbid(logits, places.index_select(0, owner), self._early, too_early.index_select(0, owner))

    def _tails(self, positions: torch.Tensor, token_table: torch.Tensor) -> torch.Tensor:
        """Return the J tokens before each position, nearest first, int64 [rows with words, J]."""
        back = torch.arange(1, self._longest + 1, device=positions.device)
        at = positions.unsqueeze(1) - back
        row = self._rows.index_select(0, self._worded).unsqueeze(1)
        tokens = torch.take(token_table, row * token_table.shape[1] + at.clamp(min=0))
        return torch.where(at >= 0, tokens, _NO_TOKEN)

    def _padded(self, before: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(before, (0, self._longest - before.shape[1]), value=_PADDING)


def apply_token_masks(logits: torch.Tensor, masks: TokenMasks) -> None:
    """Forbid what a constraint does not allow, in place; logits [B, V]."""
    vocab_size = logits.shape[1]
    shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=logits.device)
    # Each bit moves to the sign, which an arithmetic shift spreads over the word: all ones where a token is forbidden.
    forbidden = masks.bits.bitwise_not().unsqueeze(-1).bitwise_left_shift(shifts).bitwise_right_shift_(31)
    addend = forbidden.bitwise_and_(_MINUS_INFINITY_BITS).view(torch.float32).flatten(1).narrow(1, 0, vocab_size)
    logits.index_add_(0, upload(masks.places, torch.int64, logits.device), addend.to(logits.dtype))


def _forbid(logits: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor, where: torch.Tensor) -> None:
    """Add minus infinity at (place, token), int64 [N] each, where bool [N] says so."""
    addend = torch.where(where, float("-inf"), 0.0).to(logits.dtype)
    logits.view(-1).index_add_(0, places * logits.shape[1] + tokens, addend)


def _owners(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return for each entry which of the counted it belongs to."""
    return upload([index for index, count in enumerate(counts) for _ in range(count)], torch.int64, device)
