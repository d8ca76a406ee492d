"""Filters as weights set to 0, without a sort of the vocabulary.

Each keeps the first tokens of an order, largest key first and equal keys by id, until enough of a measure is kept: for
top_k the key is the logit and the measure counts, for top_p it is the logit and the weight. What is kept is a threshold
of the key and, among the tokens equal to it, a last id.

Legend: B rows, V vocabulary.
"""

import torch

from pressd.runtime.sampling.blocks import nth_true
from pressd.runtime.sampling.race import Race
from pressd.runtime.sampling.scratch import Scratch

# Up to here torch's partial selection takes less than a search for the threshold.
_MAX_SELECTED = 256


def keep_top_k(weights: torch.Tensor, logits: torch.Tensor, top_k: torch.Tensor, max_k: int, scratch: Scratch) -> None:
    """Zero weights float32 [B, V] but those of the `top_k` likeliest tokens; top_k int64 [B], at most max_k."""
    if max_k <= _MAX_SELECTED:
        values = logits.topk(min(max_k, logits.shape[1]), dim=-1).values
        threshold = values.gather(1, (top_k - 1).clamp(max=values.shape[1] - 1).unsqueeze(1))
        above = (values > threshold).sum(dim=-1)
    else:
        threshold = _threshold(logits, None, top_k.double(), scratch)
        above = _above(logits, None, threshold, scratch)
    _keep_until(weights, logits, threshold, (top_k - above).double(), scratch)


def keep_top_p(weights: torch.Tensor, keys: torch.Tensor, top_p: torch.Tensor, scratch: Scratch) -> None:
    """Zero weights float32 [B, V] but the first, by key [B, V], whose sum reaches `top_p` of all; float64 [B].

    With logits as keys: nucleus sampling (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).
    """
    limit = top_p * scratch.sums(weights)
    threshold = _threshold(keys, weights, limit, scratch)
    equal = scratch.take("equal", weights.shape)
    heaviest = torch.eq(keys, threshold, out=equal).mul_(weights).amax(dim=-1).double()
    missing = ((limit - _above(keys, weights, threshold, scratch)) / heaviest).ceil()
    _keep_until(weights, keys, threshold, missing, scratch)


def typicality(weights: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return keys [B, V] for `keep_top_p`, largest where the surprise is nearest to the expected, from weights [B, V].

    Locally typical sampling (Meister et al. 2022, https://arxiv.org/abs/2202.00666, section 3). The logarithm of a
    weight is that of its probability up to a constant, which the difference does not hold.
    """
    surprise = weights.log().neg_()
    expected = scratch.sums(weights * surprise.clamp(max=1e4)) / scratch.sums(weights)
    return surprise.sub_(expected.float().unsqueeze(1)).abs_().neg_()


def keep_min_p(weights: torch.Tensor, min_p: torch.Tensor, scratch: Scratch) -> None:
    """Zero weights float32 [B, V] below `min_p`, float64 [B], of the largest left (Nguyen et al. 2024, 2407.01082)."""
    least = (weights.amax(dim=-1).double() * min_p).float().unsqueeze(1)
    weights.mul_(torch.ge(weights, least, out=scratch.take("kept", weights.shape)))


def draw_in_top_p(race: Race, weights: torch.Tensor, choice: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Draw from the part of `choice` that `keep_top_p` would keep of `weights`, int64 [B].

    `choice` float32 [B, V] is `weights` less what a filter after top_p, which keeps the likeliest, removes. The first
    of all to arrive is the first of the kept if it is kept; and if not, no token from it on in the order of logits is.
    So a try that fails narrows the choice, at random as in quickselect, and most rows need one. The device is asked for
    the outcome of every try: this is for the CPU, where that costs nothing.
    """
    scratch, drawn = race.scratch, race.winner(choice)
    limit = top_p * scratch.sums(weights)
    # Where nothing may be drawn there is nothing to look for.
    limit = torch.where(limit > 0, limit, float("inf"))
    rows, token = torch.arange(len(drawn)), drawn
    while True:
        before = _before(race.logits, token, scratch)
        mass = torch.mul(before, weights, out=scratch.take("kept", weights.shape))
        failed = (scratch.sums(mass) >= limit).nonzero().squeeze(1)
        if not len(failed):
            return drawn
        rows, limit, race, weights = rows[failed], limit[failed], race.of_rows(failed), weights[failed]
        choice = choice[failed].mul_(before[failed])
        token = race.winner(choice)
        drawn[rows] = token


def _before(logits: torch.Tensor, token: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return marks float32 [B, V]: 1 at the tokens before `token` [B] in the order of logits."""
    value = logits.gather(1, token.unsqueeze(1))
    before = torch.lt(
        scratch.ids(logits.shape[1]), token.float().unsqueeze(1), out=scratch.take("before", logits.shape)
    )
    before.mul_(torch.eq(logits, value, out=scratch.take("equal", logits.shape)))
    return before.add_(torch.gt(logits, value, out=scratch.take("equal", logits.shape)))


def _threshold(keys: torch.Tensor, measure: torch.Tensor | None, limit: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return the least of all floats that the tokens above measure less than `limit`, [B, 1], by halving.

    Floats are searched by their bits, in the order of the numbers: as many steps as they have bits. The answer is a
    key, or minus infinity where all tokens together measure less.
    """
    high = _bits(keys.amax(dim=-1, keepdim=True))
    low = _bits(torch.full_like(high, float("-inf"), dtype=keys.dtype))
    for _ in range(8 * keys.element_size() + 1):
        middle = (low & high) + ((low ^ high) >> 1)
        fits = (_above(keys, measure, _float(middle, keys.dtype), scratch) < limit).unsqueeze(1)
        high, low = torch.where(fits, middle, high), torch.where(fits, low, middle)
    return _float(high, keys.dtype)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return integers of the size of the floats, in their order."""
    return _ordered(values.view(torch.int32 if values.element_size() == 4 else torch.int64))


def _float(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _ordered(bits).view(dtype)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Turn the bits of floats into integers of their order, and back: a negative one's are flipped but for the sign."""
    width = 8 * bits.element_size()
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _above(keys: torch.Tensor, measure: torch.Tensor | None, threshold: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return what tokens with a key above the threshold [B, 1] measure, float64 [B]; None counts them."""
    above = torch.gt(keys, threshold, out=scratch.take("kept", keys.shape))
    return scratch.sums(above if measure is None else above.mul_(measure))


def _keep_until(
    weights: torch.Tensor, keys: torch.Tensor, threshold: torch.Tensor, num_equal: torch.Tensor, scratch: Scratch
) -> None:
    """Zero weights [B, V] below the threshold [B, 1], and at it but for the first `num_equal` [B] by id."""
    kept = torch.eq(keys, threshold, out=scratch.take("kept", keys.shape))
    last = nth_true(kept, num_equal)
    kept.mul_(torch.le(scratch.ids(keys.shape[1]), last.float().unsqueeze(1), out=scratch.take("equal", keys.shape)))
    kept.add_(torch.gt(keys, threshold, out=scratch.take("equal", keys.shape)))
    weights.mul_(kept)
