"""From logits to tokens: penalties, masks, filters, and noise that depends on nothing but the request."""

from pressd.runtime.sampling.logprobs import LogprobColumns, log_probabilities
from pressd.runtime.sampling.masks import TokenMasks
from pressd.runtime.sampling.sampler import Drawn, RaceKernel, Sampler
from pressd.runtime.sampling.scratch import upload

__all__ = ["Drawn", "LogprobColumns", "RaceKernel", "Sampler", "TokenMasks", "log_probabilities", "upload"]
