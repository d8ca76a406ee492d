"""The draw itself, as a race: token t arrives at an exponential time over its weight, and the first to arrive is drawn.

P(t is first) = weight of t / sum of weights, so no sum is needed: this is the Gumbel-max trick (Maddison et al. 2014,
https://arxiv.org/abs/1411.0030) after exp, which spares a second logarithm. A token of weight 0 never arrives, so that
a filter is a weight set to 0, and the others' times stay as they are.

Legend: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from pressd.runtime.sampling.blocks import block_maxima, tokens_of
from pressd.runtime.sampling.noise import exact_times, rough_times
from pressd.runtime.sampling.scratch import Scratch

# A row of float32 decides which few blocks of tokens are looked at in float64. Rounding makes it wrong by some 1e-6 of
# a time, so the true first would be overlooked only if in each of four other blocks a token came within that of it: the
# odds of one are about 1e-6, of four together 1e-24. The last word is float64's, so that a result depends on the shape
# of a batch (the ends of a row may be computed by other instructions than its middle) about once in 1e15 draws.
_BLOCKS = 4
# Differences of logits over less than this are infinite or nothing for every token but the likeliest ones.
MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """A draw of each row: logits [B, V] and their largest [B], temperatures float64 [B], keys int32 [B, 2], and minus
    the times at weight 1, float32 [B, V], from `rough_times`."""

    logits: torch.Tensor
    peak: torch.Tensor
    temperature: torch.Tensor
    keys: torch.Tensor
    minus_times: torch.Tensor
    scratch: Scratch

    @classmethod
    def begin(
        cls,
        logits: torch.Tensor,
        peak: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        spread: torch.Tensor,
        scratch: Scratch,
    ) -> "Race":
        """Make the noise. A row without a finite logit gets one that yields no NaN; its result means nothing."""
        peak = torch.where(peak.isfinite(), peak, 0.0)
        return cls(
            logits=logits,
            peak=peak,
            temperature=temperature.clamp(min=MIN_TEMPERATURE),
            keys=keys,
            minus_times=rough_times(keys, spread, scratch),
            scratch=scratch,
        )

    def weights(self, *, same_everywhere: bool) -> torch.Tensor:
        """Return exp((logit - peak) / temperature), float32 [B, V], 1 for the likeliest.

        `same_everywhere` asks for equal bits for equal logits, wherever in a batch: torch's exp has that property and
        takes three times as long as exp2, whose last elements of a row go through other instructions.
        """
        weights = self.scratch.take("weights", self.logits.shape)
        # Near the peak the difference is exact, and far from it a token is never first: no temperature is too low.
        torch.sub(self.logits, self.peak.unsqueeze(1), out=weights)
        scale = self.temperature.reciprocal() * (1.0 if same_everywhere else 1 / math.log(2))
        weights.mul_(scale.float().unsqueeze(1))
        return weights.exp_() if same_everywhere else weights.exp2_()

    def winner(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the id of the first token to arrive, int64 [B], given float32 [B, V]; only their being 0 is exact."""
        score = self.scratch.take("score", weights.shape)
        maxima = block_maxima(torch.div(self.minus_times, weights, out=score))
        blocks = maxima.topk(min(_BLOCKS, maxima.shape[1]), dim=-1).indices.sort(dim=-1).values
        tokens = tokens_of(blocks, weights.shape[1])
        logits = self.logits.gather(1, tokens).double()
        exact = torch.exp((logits - self.peak.double().unsqueeze(1)) / self.temperature.unsqueeze(1))
        exact.mul_(weights.gather(1, tokens) > 0)
        arrival = exact_times(self.keys, tokens) / exact
        return tokens.gather(1, arrival.argmin(dim=-1, keepdim=True)).squeeze(1)

    def of_rows(self, rows: torch.Tensor) -> "Race":
        """Return the race of these rows only, int64 [any]."""
        return Race(
            logits=self.logits.index_select(0, rows),
            peak=self.peak.index_select(0, rows),
            temperature=self.temperature.index_select(0, rows),
            keys=self.keys.index_select(0, rows),
            minus_times=self.minus_times.index_select(0, rows),
            scratch=self.scratch,
        )
