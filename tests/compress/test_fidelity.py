"""Metrics against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pressd.compress.fidelity import PerToken, compare, summarise


def logits(seed: int, spread: float = 3.0, tokens: int = 12, vocab: int = 7) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * spread


TARGETS = torch.arange(12) % 7


@given(seed=st.integers(0, 1000), spread=st.floats(0.01, 30))
def test_per_token_values_are_torch_s(seed: int, spread: float) -> None:
    source, ours = logits(seed, spread), logits(seed + 1, spread)
    found = compare(source, ours, TARGETS)
    p, q = (torch.log_softmax(x.double(), -1) for x in (source, ours))
    mean = ((p.exp() + q.exp()) / 2).log()
    torch.testing.assert_close(found.kl, F.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    halves = [F.kl_div(mean, x, log_target=True, reduction="none").sum(-1) for x in (p, q)]
    torch.testing.assert_close(found.js, (halves[0] + halves[1]) / 2)
    torch.testing.assert_close(found.nll_source, F.cross_entropy(source.double(), TARGETS, reduction="none"))
    torch.testing.assert_close(found.nll, F.cross_entropy(ours.double(), TARGETS, reduction="none"))
    assert found.agrees.tolist() == [float(a == b) for a, b in zip(source.argmax(-1), ours.argmax(-1), strict=True)]
    assert bool((found.kl >= -1e-12).all())
    assert bool((found.js <= math.log(2) + 1e-12).all())


def test_a_model_does_not_differ_from_itself() -> None:
    found = summarise(PerToken.join([compare(logits(0), logits(0), TARGETS)], 3))
    assert (found["kl_mean"], found["kl_max"], found["ppl_ratio"], found["top1_agreement"]) == (0.0, 0.0, 1.0, 1.0)
    assert found["js_mean"] == pytest.approx(0, abs=1e-15)


def test_opposite_certainties_are_as_far_as_js_goes() -> None:
    certain = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    found = compare(certain, certain.flip(-1), torch.tensor([0, 0]))
    torch.testing.assert_close(found.js, torch.full((2,), math.log(2), dtype=torch.float64))
    torch.testing.assert_close(found.kl, torch.full((2,), 50.0, dtype=torch.float64))


def test_the_summary_is_over_tokens_and_its_errors_over_rows() -> None:
    tokens = PerToken.join([compare(logits(i), logits(i + 9, 2.0), TARGETS) for i in range(4)], 4)
    found = summarise(tokens)
    errors = found["stderr"]
    assert isinstance(errors, dict)
    kl = tokens.kl.flatten().sort().values
    assert found["kl_mean"] == pytest.approx(float(kl.sum()) / 48)
    assert found["kl_median"] == float(kl[23])
    assert found["kl_max"] == float(kl[-1])
    assert float(kl[-2]) <= float(str(found["kl_p99"])) <= float(kl[-1])
    assert found["ppl"] == pytest.approx(math.exp(float(tokens.nll.mean())))
    assert found["ppl_ratio"] == pytest.approx(float(str(found["ppl"])) / float(str(found["ppl_source"])))
    rows = [float(row.mean()) for row in tokens.kl]
    mean = sum(rows) / 4
    assert errors["kl_mean"] == pytest.approx(math.sqrt(sum((row - mean) ** 2 for row in rows) / 3 / 4))
    # d exp(x) = exp(x) dx
    assert errors["ppl"] == pytest.approx(float(str(found["ppl"])) * float(tokens.nll.mean(1).std()) / 2)


def test_one_row_has_no_standard_error() -> None:
    found = summarise(PerToken.join([compare(logits(0), logits(1), TARGETS)], 1))
    errors = found["stderr"]
    assert isinstance(errors, dict)
    assert set(errors.values()) == {None}
