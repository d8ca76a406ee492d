"""What passes are for: on the example model, on stored tokens, they lose less than rounding to nearest and than peers.

A KL is measured on the same rows for all, so that differences of the text cancel.
"""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_fixtures import SOURCE, calibration_ids, heldout_ids, measure, peer_results

from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows
from pressd.compress.recipe import parse_recipe

# Eight rows are looked at and eight are measured on: with all that is done to codes, seconds.
FEW = 8
# GPTQ of either tool moves by this part when sums are made in another order (one thread instead of two: 2.7 %).
REPEATS = 0.03


def press(scheme: str, passes: str, ids: torch.Tensor, seed: int, out: Path) -> None:
    named = "".join(f'[[pass]]\nuse = "{name}"\n' for name in passes.split("+"))
    recipe = parse_recipe(f'{named}[scheme]\n"*" = "{scheme}"\n', "recipe")
    compress(SOURCE, recipe, out, rows=CalibrationRows(name="stored", text_sha256="", seed=seed, ids=ids))


def kl(scheme: str, passes: str, out: Path) -> float:
    press(scheme, passes, calibration_ids(0)[:FEW], 0, out)
    found: dict[str, Any] = measure(out, heldout_ids()[:FEW])
    return float(found["kl_mean"])


@pytest.mark.parametrize(
    "scheme",
    [pytest.param("w4a16g128", marks=pytest.mark.slow), pytest.param("w3a16g32", marks=pytest.mark.slow), "w2a16g32"],
)
def test_gptq_loses_less_than_rounding_to_nearest_and_awq_no_more(scheme: str, tmp_path: Path) -> None:
    """Even with 4,096 tokens: GPTQ at most half of it, which 65,536 tokens only improve."""
    nearest = kl(scheme, "rtn", tmp_path / "rtn")
    assert kl(scheme, "awq", tmp_path / "awq") <= nearest
    assert kl(scheme, "gptq", tmp_path / "gptq") <= 0.5 * nearest


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16g128", "w4a16g32", "w3a16g32", "w2a16g32"])
def test_gptq_is_no_worse_than_another_tool_s_on_the_same_tokens(scheme: str, tmp_path: Path) -> None:
    """Against llm-compressor's GPTQ, in the mean over three choices of 32,768 calibration tokens."""
    theirs = [r.kl_mean for r in peer_results() if (r.tool, r.method, r.scheme) == ("llmcompressor", "gptq", scheme)]
    assert len(theirs) == 3
    ours = []
    for seed in range(3):
        press(scheme, "gptq", calibration_ids(seed), seed, tmp_path / str(seed))
        ours.append(float(measure(tmp_path / str(seed), heldout_ids())["kl_mean"]))
    assert statistics.mean(ours) <= statistics.mean(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16g128", "w3a16g32"])
def test_gptq_and_round_match_learnt_rounding(scheme: str, tmp_path: Path) -> None:
    """Against auto-round, which was run once: within its standard error and what repeats differ by."""
    (theirs,) = (r for r in peer_results() if (r.tool, r.scheme) == ("auto-round", scheme))
    press(scheme, "gptq+round", calibration_ids(0), 0, tmp_path / "ours")
    found = measure(tmp_path / "ours", heldout_ids())
    bound = theirs.kl_mean * (1 + REPEATS) + 2 * theirs.kl_stderr
    assert float(found["kl_mean"]) <= bound
