"""Perturbed text against transformers' perplexity on it, and the ratio of ratios against numpy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pressd.compress import compress, corpus
from pressd.compress.evaluate import evaluate
from pressd.compress.fidelity import PerToken, compare
from pressd.compress.perturb import KINDS
from pressd.compress.robustness import summarise_robustness
from pressd.compress.token_rows import read_rows
from pressd.runtime.artifact.reader import Checkpoint


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text(
        '{"text": "def spam(eggs):\\n    return Ham or eggs\\n"}\n{"text": "class Ham:\\n    pass  # indeed\\n"}\n' * 6
    )
    return str(path)


def test_perplexities_are_transformers_on_the_perturbed_text(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    compress(tiny_llama, "w3a16g32", tmp_path / "w3")
    found: Any = evaluate(tmp_path / "w3", tiny_llama, data=text, tokens=200, seq_len=40, robustness=True)
    plain: Any = evaluate(tmp_path / "w3", tiny_llama, data=text, tokens=200, seq_len=40)
    assert {key: found[key] for key in plain if key != "cost"} == {
        key: value for key, value in plain.items() if key != "cost"
    }
    assert list(found["robustness"]) == ["typos", "case", "whitespace"]
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    documents = corpus.load(text, "heldout").documents
    for kind, entry in found["robustness"].items():
        changed = [KINDS[kind].apply(document, number) for number, document in enumerate(documents)]
        assert changed != list(documents)
        stream = [token for document in changed for token in tokenizer.encode(document)][1:]
        rows = torch.tensor([[0, *stream[39 * row : 39 * (row + 1)]] for row in range(5)])
        with torch.no_grad():
            logits = model(rows).logits[:, :-1].double()
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        # Logits agree to 1e-4 of about 20 (the bound of the decoder's conformance test): so do means of differences.
        assert math.log(entry["ppl_source"]) == pytest.approx(float(loss), abs=2e-3)
        assert entry["tokens"] == 200
        assert entry["ppl_ratio"] == pytest.approx(entry["ppl"] / entry["ppl_source"], rel=1e-12)
        assert entry["ratio_of_ratios"] == pytest.approx(entry["ppl_ratio"] / plain["ppl_ratio"], rel=1e-12)
        assert entry["kl_mean"] > 0
        assert 0 < entry["stderr"]["ratio_of_ratios"] < 1


def test_ratio_of_ratios_and_its_error_are_numpys() -> None:
    def tokens(seed: int, rows: int) -> PerToken:
        made = torch.Generator().manual_seed(seed)
        source, ours = (torch.randn(rows * 6, 11, generator=made) for _ in range(2))
        return PerToken.join([compare(source, ours, torch.arange(rows * 6) % 11)], rows)

    clean, typos = tokens(1, 8), tokens(2, 7)
    found: Any = summarise_robustness(clean, {"typos": typos})["typos"]
    losses = [(part.nll - part.nll_source).numpy() for part in (typos, clean)]
    ratio = np.exp(losses[0].mean() - losses[1].mean())
    errors = [loss.mean(axis=1).std(ddof=1) / np.sqrt(len(loss)) for loss in losses]
    # Sums of a hundred float64 numbers of size one.
    assert found["ratio_of_ratios"] == pytest.approx(ratio, rel=1e-12)
    assert found["stderr"]["ratio_of_ratios"] == pytest.approx(ratio * np.sqrt(np.square(errors).sum()), rel=1e-12)
    alone: Any = summarise_robustness(clean, {"typos": tokens(3, 1)})["typos"]
    assert alone["stderr"]["ratio_of_ratios"] is None


def test_the_digest_is_of_the_text_before(tiny_llama: Path, text: str) -> None:
    source = Checkpoint.open(tiny_llama)
    plain = read_rows(text, source, tokens=200, seq_len=40)
    shouted = read_rows(text, source, tokens=200, seq_len=40, change=lambda document, number: document.upper())
    assert plain.sha256 == shouted.sha256
    assert not torch.equal(plain.ids, shouted.ids)


def test_text_that_an_artifact_was_calibrated_on_is_refused(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    from pressd.runtime.artifact.manifest import write_manifest

    manifest = compress(tiny_llama, "w4a16g32", tmp_path / "w4")
    assert manifest.calibration == {}
    digest = corpus.load(text, "calibration").sha256
    write_manifest(tmp_path / "w4", manifest.model_copy(update={"calibration": {"text_sha256": digest}}))
    with pytest.raises(ValueError, match=r"w4 was calibrated on this very text; give --data other text"):
        evaluate(tmp_path / "w4", data=text, tokens=80, seq_len=40)
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, which nobody has seen " * 4)
    assert evaluate(tmp_path / "w4", data=str(other), tokens=80, seq_len=40)["kl_mean"]
