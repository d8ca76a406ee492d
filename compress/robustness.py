"""What perturbed text does to an artifact beyond what it does to its source."""

import math
from collections.abc import Mapping

from pressd.compress.fidelity import PerToken, standard_error, summarise
from pressd.compress.perturb import KINDS
from pressd.compress.token_rows import TokenRows, read_rows
from pressd.runtime.artifact.reader import Checkpoint

SEED = 0


def perturbed_rows(data: str, tokenizer_of: Checkpoint, *, tokens: int, seq_len: int) -> dict[str, TokenRows]:
    """Return the rows of the held-out text under each kind of perturbation; raises what read_rows raises.

    Perturbed text takes more tokens, so that the same number of them ends somewhat earlier in the text.
    """

    def rows(kind: str) -> TokenRows:
        perturbation = KINDS[kind]
        return read_rows(
            data,
            tokenizer_of,
            tokens=tokens,
            seq_len=seq_len,
            change=lambda document, number: perturbation.apply(document, SEED + number),
        )

    return {kind: rows(kind) for kind in KINDS}


def summarise_robustness(clean: PerToken, perturbed: Mapping[str, PerToken]) -> dict[str, object]:
    """Return the `robustness` entry of a measurement: an object per kind of perturbation.

    `ratio_of_ratios` is (ppl / ppl_source on perturbed text) / (ppl / ppl_source on clean text): above 1 the artifact
    suffers more than its source. Its error takes the two texts as independent; they share most words, which move both
    ratios alike, so it is an upper estimate.
    """
    return {kind: _entry(kind, clean, tokens) for kind, tokens in perturbed.items()}


def _entry(kind: str, clean: PerToken, tokens: PerToken) -> dict[str, object]:
    found = summarise(tokens)
    errors = found["stderr"]
    assert isinstance(errors, dict)
    names = ("ppl_source", "ppl", "ppl_ratio", "kl_mean", "top1_agreement")
    losses = [part.nll - part.nll_source for part in (tokens, clean)]
    ratio = math.exp(float(losses[0].mean()) - float(losses[1].mean()))
    parts = [standard_error(loss) for loss in losses]
    error = None if None in parts else ratio * math.hypot(*(part for part in parts if part is not None))
    return {
        "rate": KINDS[kind].rate,
        "seed": SEED,
        "tokens": tokens.nll.size(0) * (tokens.nll.size(1) + 1),
        **{name: found[name] for name in names},
        "ratio_of_ratios": ratio,
        "stderr": {**{name: errors[name] for name in names}, "ratio_of_ratios": error},
    }
