"""The verbs as the command line runs them: exit codes, what goes to which stream, and what is imported."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pressd.compress import evaluate, verbs
from pressd.compress.convert import DTYPES
from pressd.compress.progress import ProgressLine
from pressd.runtime.artifact.manifest import read_manifest
from pressd.runtime.artifact.reader import Checkpoint

# No text is read: these tests are about everything else.
RTN = ("--pass", "rtn")


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    verbs.add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    code: int = args.run(args)
    return code


@pytest.fixture
def pressed(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("compress", tiny_llama, "-o", tmp_path / "out", "-s", "w4a16g32", *RTN) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_compress_says_what_came_out(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compress", tiny_llama, "-o", tmp_path / "out", "-s", "w4a16g32", *RTN) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'out'}: 98,752 parameters, ")
    assert captured.out.count("\n") == 1
    assert captured.err == "4/4 head\n"


def test_compress_prints_one_object(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'source = "{tiny_llama}"\n[scheme]\n"*" = "w8a8"\n')
    assert run("compress", "-o", tmp_path / "out", "--recipe", recipe, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert printed == json.loads(manifest.to_json())
    assert printed["schema"] == 1


def test_compress_needs_a_source(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[scheme]\n"*" = "w8a8"\n')
    for how in (("-s", "w8a8"), ("--recipe", recipe)):
        with pytest.raises(ValueError, match="there is no source; give SOURCE"):
            run("compress", "-o", tmp_path / "out", *how)


def test_overwriting_is_asked_for(tiny_llama: Path, pressed: Path) -> None:
    with pytest.raises(ValueError, match="give --overwrite"):
        run("compress", tiny_llama, "-o", pressed, "-s", "w8a8", *RTN)
    assert run("compress", tiny_llama, "-o", pressed, "-s", "w8a8", *RTN, "--overwrite") == 0


def test_inspect_shows_every_group(pressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", pressed) == 0
    shown = capsys.readouterr().out
    assert re.search(r"layers\.1\.gate_up +w4a16g32 +rtn +320 x 64 ", shown)
    assert "quality: not measured yet" in shown
    assert run("inspect", pressed, "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"][1]["name"] == "layers.0.qkv"


def test_inspect_shows_a_measurement(
    pressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 512)
    (tmp_path / "long.txt").write_text("def f(x):\n    return x\n" * 30)
    assert run("eval", pressed, "--data", tmp_path / "long.txt", "--tokens", "512", "--seq-len", "64") == 0
    assert "recorded in the manifest" in capsys.readouterr().out
    assert run("inspect", pressed) == 0
    shown = capsys.readouterr().out
    assert "top1_agreement" in shown
    assert "512 tokens of long.txt (heldout) in rows of 64; standard errors are over rows" in shown


def test_inspect_refuses_what_is_no_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an artifact of pressd"):
        run("inspect", tiny_llama)
    with pytest.raises(ValueError, match="is not a directory"):
        run("inspect", tmp_path / "nothing")


def test_eval_prints_one_object_and_a_missed_gate_is_exit_3(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = tmp_path / "r.toml", tmp_path / "text.txt"
    data.write_text("import this\n" * 50)
    recipe.write_text('[scheme]\n"*" = "w2a16"\n[gates]\nkl_mean = 1e-9\nppl_ratio = 1e9\n')
    assert run("compress", tiny_llama, "-o", tmp_path / "out", "--recipe", recipe) == 0
    capsys.readouterr()
    assert run("eval", tmp_path / "out", "--data", data, "--tokens", "128", "--seq-len", "64", "--json") == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found.keys() == {
        *("source", "artifact", "data", "ppl_source", "ppl", "ppl_ratio", "kl_mean", "kl_median", "kl_p99", "kl_max"),
        *("top1_agreement", "js_mean", "stderr", "footprint", "cost"),
    }
    assert {"name", "split", "tokens", "seq_len", "sha256"} <= found["data"].keys()
    assert captured.err.splitlines()[-1].startswith("gate missed: kl_mean is ")
    assert captured.err.count("gate missed") == 1


def test_a_damaged_report_costs_no_measurement(
    pressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 512)
    (tmp_path / "long.txt").write_text("def f(x):\n    return x\n" * 30)
    (pressed / "pressd/report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json"):
        run("eval", pressed, "--data", tmp_path / "long.txt", "--tokens", "512", "--seq-len", "64")
    assert "kl_mean" in capsys.readouterr().out
    manifest = read_manifest(pressed)
    assert manifest is not None
    assert manifest.quality["kl_mean"]


def test_verify_notices_a_changed_file(pressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", pressed, "--full") == 0
    assert "files agree with the manifest; id " in capsys.readouterr().out
    path = pressed / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file that was written") as caught:
        run("verify", pressed, "--full")
    assert "\n" not in str(caught.value)


def test_verify_reads_foreign_headers(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", tiny_llama) == 0
    assert "headers agree with config.json" in capsys.readouterr().out


def test_plan_shows_what_compress_then_writes(
    tiny_llama_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'source = "{tiny_llama_tied}"\n[scheme]\n"*" = "w3a16g32"\n"lm_head" = "w8a16"\n')
    assert run("plan", "--recipe", recipe) == 0
    shown = capsys.readouterr()
    assert run("compress", "-o", tmp_path / "out", "--recipe", recipe) == 0
    written = capsys.readouterr().out.removeprefix(f"{tmp_path / 'out'}: ")
    assert re.search(r"layers\.0-1\.gate_up +w3a16g32 +rtn +320 x 64 ", shown.out)
    assert written in shown.out  # the line of sizes, to the digit
    assert "the head is no longer the embedding" in shown.out
    assert "measured now on samples" in shown.out
    assert shown.err.startswith("warning: w3a16g32: ")
    assert shown.err.count("\n") == 1


def test_plan_prints_one_object(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", tiny_llama, "-s", "w2a16", *RTN, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert len(found["warnings"]) == 1
    assert found["totals"]["params"] == 98_752
    assert found["time"]["compute_seconds"] > 0
    assert found["memory"]["process_bytes"] > 100 << 20  # torch is in it
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_as_compress_does(tiny_llama: Path, pressed: Path) -> None:
    with pytest.raises(ValueError, match="is pressed already; press the dense checkpoint it was made from"):
        run("plan", pressed, "-s", "w8a8")
    with pytest.raises(ValueError, match="scheme 'w9a16' is not known; choose one of"):
        run("plan", tiny_llama, "-s", "w9a16")
    with pytest.raises(ValueError, match="in_features 64 is not a multiple of group size 128"):
        run("plan", tiny_llama, "-s", "w4a16g128")
    with pytest.raises(ValueError, match="there is no source; give SOURCE"):
        run("plan", "-s", "w8a8")


def test_compare_shows_rows_and_draws(
    tiny_llama: Path, pressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 128)
    data = tmp_path / "text.txt"
    data.write_text("import this\n" * 50)
    assert run("compress", tiny_llama, "-o", tmp_path / "eight", "-s", "w8a8", *RTN) == 0
    for artifact in (pressed, tmp_path / "eight"):
        assert run("eval", artifact, "--data", data, "--tokens", "128", "--seq-len", "64") == 0
    capsys.readouterr()
    assert run("compare", pressed, tmp_path / "eight", "--png", tmp_path / "front.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["out", "w4a16g32"], ["eight", "w8a8"]]
    assert [line.split()[-1] for line in lines[1:3]] == ["*", "*"]
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert run("compare", pressed, tmp_path / "eight", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["out", "eight"]


def test_convert_says_what_is_left_behind(
    tiny_llama: Path, pressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", pressed, "--to", "dense", "-o", tmp_path / "dense") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'dense'}: 0.38 MiB of weights in float32\n"
    assert captured.err == "4/4 head\n"
    assert run("compress", tiny_llama, "-o", tmp_path / "eight", "-s", "w8a8", *RTN) == 0
    capsys.readouterr()
    out = tmp_path / "narrow"
    assert run("convert", tmp_path / "eight", "--to", "dense", "-o", out, "--dtype", "bfloat16") == 0
    assert "the rounding of activations is dropped" in capsys.readouterr().err
    assert Checkpoint.open(out).torch_dtype == DTYPES["bfloat16"]
    assert tuple(DTYPES) == verbs.DTYPES


def test_convert_to_something_else_is_wrong_usage(
    pressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("convert", pressed, "--to", "gptq", "-o", tmp_path / "x")
    assert caught.value.code == 2
    assert "invalid choice: 'gptq'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["compare", "inspect", "plan --help", "convert --help", "compress --help"])
def test_verbs_that_read_no_weights_import_no_torch(pressed: Path, verb: str, tmp_path: Path) -> None:
    program = (
        "import argparse, sys\n"
        "from pressd.compress import verbs\n"
        "parser = argparse.ArgumentParser()\n"
        "verbs.add_parsers(parser.add_subparsers())\n"
        "try:\n"
        "    args = parser.parse_args(sys.argv[1:])\n"
        "    code = args.run(args)\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    words = [*verb.split(), *([] if "--help" in verb else [pressed])]
    subprocess.run([sys.executable, "-c", program, *words], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_progress_is_sparse_in_a_log_and_one_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 1.0, 5.5, 6.0, 7.0])
    progress = ProgressLine(clock=lambda: next(times))
    for done in (1, 2, 3, 4):
        progress.tell("work", done, 4)
    assert capsys.readouterr().err == "2/4 work\n4/4 work\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProgressLine(clock=lambda: 0.0)
    for done in (1, 2):
        progress.tell("work", done, 2)
    assert capsys.readouterr().err == "\r\x1b[K1/2 work\r\x1b[K2/2 work\n"


def test_a_copy_of_an_artifact_is_the_same_artifact(pressed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pressed, tmp_path / "elsewhere"))
    assert run("verify", copy, "--full") == 0
    assert read_manifest(copy) == read_manifest(pressed)


def test_eval_tells_more_when_it_is_asked(
    pressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 128)
    data = tmp_path / "text.txt"
    data.write_text("import this\n" * 50)
    words = ("eval", pressed, "--data", data, "--tokens", "128", "--seq-len", "64", "--robustness", "--divergence")
    assert run(*words, "--price-per-hour", "3600", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"robustness", "divergence", "footprint", "cost"} <= found.keys()
    assert list(found["cost"]) == ["wall_seconds", "joules", "price_per_hour", "price"]
    assert found["cost"]["price"] == pytest.approx(found["cost"]["wall_seconds"])
    manifest = read_manifest(pressed)
    assert manifest is not None
    # What it cost differs from run to run, which the manifest must not.
    assert manifest.quality == {name: value for name, value in found.items() if name not in ("artifact", "cost")}
    assert run("inspect", pressed) == 0
    shown = capsys.readouterr().out
    for part in ("ratio_of_ratios", "whitespace", "first differ at token", "read_bytes_per_token"):
        assert part in shown
    assert "per hour" not in shown


def test_compress_tells_its_price_beside_the_factor(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run("compress", tiny_llama, "-o", tmp_path / "out", "-s", "w8a8", *RTN, "--price-per-hour", "2", "--json") == 0
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["schema"] == 1
    assert captured.err.splitlines()[-1].endswith(" at a price of 2 per hour")
    with pytest.raises(ValueError, match=r"price_per_hour is -2\.0; give a number of at least 0"):
        run("compress", tiny_llama, "-o", tmp_path / "two", "-s", "w8a8", *RTN, "--price-per-hour", "-2")
    assert not (tmp_path / "two").exists()
