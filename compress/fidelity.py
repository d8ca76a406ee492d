"""How far one model's predictions are from another's: per token, then in sum. Pure arithmetic, natural logarithms.

N tokens, V vocabulary. KL is KL(source || pressed) over the whole vocabulary; JS is Jensen-Shannon divergence (at most
log 2); agreement is of the most likely token.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PerToken:
    """One number per predicted token, float64, all of one shape."""

    nll_source: Tensor
    nll: Tensor
    kl: Tensor
    js: Tensor
    agrees: Tensor

    @classmethod
    def join(cls, parts: list["PerToken"], rows: int) -> "PerToken":
        """Return the tokens of all parts in order, as [rows, tokens per row]."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]).view(rows, -1) for name in names})


def compare(source_logits_NV: Tensor, logits_NV: Tensor, targets_N: Tensor) -> PerToken:
    """Compare two models' logits for the same tokens; between equal logits KL is exactly zero."""
    log_p = torch.log_softmax(source_logits_NV.double(), dim=-1)
    log_q = torch.log_softmax(logits_NV.double(), dim=-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    js = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
    targets_N1 = targets_N.unsqueeze(-1)
    return PerToken(
        nll_source=-log_p.gather(-1, targets_N1).squeeze(-1),
        nll=-log_q.gather(-1, targets_N1).squeeze(-1),
        kl=(p * (log_p - log_q)).sum(-1),
        js=js,
        agrees=(log_p.argmax(-1) == log_q.argmax(-1)).double(),
    )


def summarise(tokens: PerToken) -> dict[str, object]:
    """Return the metrics of tokens [rows, tokens per row], with standard errors over rows (None for a single row).

    Tokens of one row depend on each other, rows hardly do. Errors of ratios are first-order (delta method).
    """
    ppl_source = math.exp(float(tokens.nll_source.mean()))
    ppl = math.exp(float(tokens.nll.mean()))
    ratio = ppl / ppl_source
    return {
        "ppl_source": ppl_source,
        "ppl": ppl,
        "ppl_ratio": ratio,
        "kl_mean": float(tokens.kl.mean()),
        "kl_median": float(tokens.kl.median()),
        "kl_p99": float(tokens.kl.flatten().quantile(0.99)),
        "kl_max": float(tokens.kl.max()),
        "top1_agreement": float(tokens.agrees.mean()),
        "js_mean": float(tokens.js.mean()),
        "stderr": {
            "ppl_source": _scaled(ppl_source, standard_error(tokens.nll_source)),
            "ppl": _scaled(ppl, standard_error(tokens.nll)),
            "ppl_ratio": _scaled(ratio, standard_error(tokens.nll - tokens.nll_source)),
            "kl_mean": standard_error(tokens.kl),
            "top1_agreement": standard_error(tokens.agrees),
            "js_mean": standard_error(tokens.js),
        },
    }


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of values [rows, tokens], rows taken as the independent observations."""
    rows = values.size(0)
    return float(values.mean(dim=1).std()) / math.sqrt(rows) if rows > 1 else None


def _scaled(value: float, error_of_log: float | None) -> float | None:
    return None if error_of_log is None else value * error_of_log
