"""Evaluation against transformers on the same rows, and the ways in which it can be asked for wrongly."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pressd.compress import compress
from pressd.compress.evaluate import evaluate, missed_gates, record_quality
from pressd.compress.protocol import TOKENS
from pressd.compress.token_rows import read_rows
from pressd.runtime.artifact.manifest import read_manifest
from pressd.runtime.artifact.reader import Checkpoint

TEXT = "".join(chr(33 + index * index % 90) + ("\n" if index % 11 == 0 else "") for index in range(700))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def pressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pressed") / "w4"
    compress(tiny_llama, "w4a16g32", path)
    return path


def test_a_model_is_its_own_equal(tiny_llama_tied: Path, text: str) -> None:
    found = evaluate(tiny_llama_tied, tiny_llama_tied, data=text, tokens=256, seq_len=64)
    assert (found["kl_mean"], found["kl_max"], found["ppl_ratio"], found["top1_agreement"]) == (0.0, 0.0, 1.0, 1.0)


def test_the_numbers_are_transformers(tiny_llama: Path, pressed: Path, text: str) -> None:
    told: list[tuple[str, int, int]] = []
    found = evaluate(pressed, data=text, tokens=600, seq_len=60, progress=lambda *args: told.append(args))
    ids = read_rows(text, Checkpoint.open(tiny_llama), tokens=600, seq_len=60).ids
    p, q = (torch.log_softmax(_logits(path, ids)[:, :-1].double(), -1) for path in (tiny_llama, pressed))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    # Logits agree to 1e-4 of about 20 (the bound of the decoder's conformance test): so do means of their differences.
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), abs=2e-3)
    for name, logs in (("ppl_source", p), ("ppl", q)):
        loss = F.nll_loss(logs.flatten(0, 1), ids[:, 1:].flatten())
        assert math.log(float(str(found[name]))) == pytest.approx(float(loss), abs=2e-3)
    assert found["source"] == str(tiny_llama.resolve())
    assert told == [("source", 10, 10), ("artifact", 10, 10)]


def test_chunks_and_batches_change_nothing(
    tiny_llama: Path, pressed: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pressd.compress import forwards as module

    whole = evaluate(pressed, tiny_llama, data=text, tokens=256, seq_len=64)
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 97 * 5)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 64)
    pieces = evaluate(pressed, tiny_llama, data=text, tokens=256, seq_len=64)
    assert pieces["kl_mean"] == pytest.approx(whole["kl_mean"], rel=1e-4)
    assert pieces["ppl"] == pytest.approx(whole["ppl"], rel=1e-4)


def test_rows_begin_with_bos_and_say_what_they_are(tiny_llama: Path, text: str) -> None:
    from transformers import AutoTokenizer

    rows = read_rows(text, Checkpoint.open(tiny_llama), tokens=300, seq_len=50)
    assert rows.ids.shape == (6, 50)
    assert rows.ids[:, 0].tolist() == [0] * 6
    stream = rows.ids[:, 1:].flatten().tolist()
    assert AutoTokenizer.from_pretrained(tiny_llama).encode(TEXT)[1:][: len(stream)] == stream
    described = rows.describe()
    assert (described["tokens"], described["seq_len"], described["rows"]) == (300, 50, 6)


def test_a_short_text_gives_fewer_rows_and_a_tiny_one_none(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    assert len(read_rows(text, Checkpoint.open(tiny_llama), tokens=10**6, seq_len=200).ids) == 3
    (tmp_path / "tiny.txt").write_text("ab")
    with pytest.raises(ValueError, match=r"2 tokens do not fill one row of 200"):
        read_rows(str(tmp_path / "tiny.txt"), Checkpoint.open(tiny_llama), tokens=400, seq_len=200)


@pytest.mark.parametrize(("tokens", "seq_len"), [(10, 1), (10, 20), (0, 0), (-5, 2)])
def test_sizes_must_make_sense(tiny_llama: Path, text: str, tokens: int, seq_len: int) -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        evaluate(tiny_llama, tiny_llama, data=text, tokens=tokens, seq_len=seq_len)


def test_rows_longer_than_the_context_are_refused(tiny_llama: Path, text: str) -> None:
    with pytest.raises(ValueError, match="reads 256 tokens at once; seq_len is 300"):
        evaluate(tiny_llama, tiny_llama, data=text, tokens=300, seq_len=300)


def test_without_a_tokenizer_there_are_no_rows(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "bare"))
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="bare: its tokenizer cannot be loaded") as caught:
        evaluate(source, source, data=text, tokens=64, seq_len=64)
    assert "\n" not in str(caught.value)


def test_a_source_must_be_known_present_and_unchanged(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say what it was pressed from; give --against SOURCE"):
        evaluate(tiny_llama, data=text)
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    compress(source, "w8a8", tmp_path / "out")
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"config\.json has changed since .*; give --against SOURCE"):
        evaluate(tmp_path / "out", data=text)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="which is not here; give --against SOURCE"):
        evaluate(tmp_path / "out", data=text)


def test_quality_is_recorded_for_enough_tokens_only(tiny_llama: Path, pressed: Path, text: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pressed, tmp_path / "copy"))
    quality = evaluate(path, data=text, tokens=128, seq_len=64)
    assert not record_quality(path, quality)
    assert _quality(path) == {}
    data = quality["data"]
    assert isinstance(data, dict)
    enough = quality | {"data": data | {"tokens": TOKENS}}
    assert record_quality(path, enough)
    assert _quality(path) == {name: value for name, value in enough.items() if name not in ("artifact", "cost")}
    assert not record_quality(tiny_llama, enough)
    assert not (tiny_llama / "pressd").exists()


def test_gates_are_bounds_from_the_right_side(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[scheme]\n"*" = "w8a8"\n[gates]\nkl_mean = 0.05\ntop1_agreement = 0.93\n')
    manifest = compress(tiny_llama, recipe, tmp_path / "out")
    assert missed_gates(manifest, {"kl_mean": 0.05, "top1_agreement": 0.93}) == []
    assert missed_gates(manifest, {"kl_mean": 0.06, "top1_agreement": 0.92}) == [
        "gate missed: kl_mean is 0.06, the recipe asks for 0.05",
        "gate missed: top1_agreement is 0.92, the recipe asks for 0.93",
    ]
    assert len(missed_gates(manifest, {"kl_mean": math.nan, "top1_agreement": math.nan})) == 2
    assert missed_gates(None, {}) == []


def _quality(path: Path) -> dict[str, object]:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest.quality


@torch.no_grad()
def _logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    logits: torch.Tensor = model(ids).logits
    return logits
