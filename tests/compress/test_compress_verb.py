"""`pressd compress`: which recipe its flags mean, the text, the devices, and runs that are interrupted."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pressd.compress import corpus, devices, press
from pressd.compress.press import BlockDone, compress
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.manifest import read_manifest
from pressd.server import cli

TEXT = ("--tokens", "256", "--seq-len", "64")


def run(*words: str | Path) -> int:
    return cli.main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a failure says."""
    assert run(*words) == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("scheme", "given", "passes"),
    [
        ("w4a16g32", (), ("gptq",)),
        ("fp8", (), ("gptq",)),
        ("w8a8-static", (), ("gptq", "static")),
        ("w8a8", ("--pass", "awq,rtn"), ("awq", "rtn")),
    ],
)
def test_one_scheme_is_pressed_with_the_passes_that_suit_it(
    scheme: str, given: tuple[str, ...], passes: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("compress", tiny_llama, "-o", out, "-s", scheme, *given, *TEXT, "--seed", "3") == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert {name: manifest.calibration[name] for name in ("data", "tokens", "seq_len", "seed")} == {
        "data": "stdlib",
        "tokens": 256,
        "seq_len": 64,
        "seed": 3,
    }
    by_name = {group.name: group.passes for group in manifest.plan}
    assert by_name["layers.1.down"] == passes
    assert by_name["embed"] == ()
    # The recipe beside it is all that it takes to press it again.
    again = compress(tiny_llama, out / "pressd/recipe.toml", tmp_path / "again")
    assert (again.id, again.plan, again.recipe) == (manifest.id, manifest.plan, manifest.recipe)


@pytest.mark.parametrize("scheme", ["bf16", "sparse24:w4a16", "lowrank8:w8a16", "w4a16g32+residual4"])
def test_what_is_no_single_rounded_weight_reads_no_text(scheme: str, tiny_llama: Path, tmp_path: Path) -> None:
    assert run("compress", tiny_llama, "-o", tmp_path / "out", "-s", scheme) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.calibration == {}
    assert parse_recipe(manifest.recipe.text, "").passes == ()


def test_flags_replace_what_a_recipe_says_of_its_text(tiny_llama: Path, tmp_path: Path) -> None:
    recipe, text = tmp_path / "r.toml", tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    recipe.write_text('[calibration]\ntokens = 128\nseed = 5\n[[pass]]\nuse = "gptq"\n[scheme]\n"*" = "w4a16g32"\n')
    words = ("--calibration", text, "--seq-len", "32")
    assert run("compress", tiny_llama, "-o", tmp_path / "out", "--recipe", recipe, *words) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    found = {name: manifest.calibration[name] for name in ("data", "tokens", "seq_len", "seed")}
    assert found == {"data": "text.txt", "tokens": 128, "seq_len": 32, "seed": 5}
    assert manifest.recipe.text == recipe.read_text()


def test_what_does_not_go_together_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[pass]]\nuse = "rtn"\n[scheme]\n"*" = "w8a8"\n')
    press = ("compress", tiny_llama, "-o", tmp_path / "out")
    for flag, value in (("--tokens", "64"), ("--seq-len", "64"), ("--seed", "0"), ("--calibration", "stdlib")):
        said = refusal(capsys, *press, "--recipe", recipe, flag, value)
        assert said.startswith(f"pressd compress: {flag} is given, but nothing reads text (passes: rtn); leave it out")
    assert "nothing reads text (passes: none)" in refusal(capsys, *press, "-s", "bf16", "--tokens", "64")
    assert "--pass goes with -s" in refusal(capsys, *press, "--recipe", recipe, "--pass", "rtn")
    assert "pass 'gtpq' is not known; known now: rtn, gptq" in refusal(capsys, *press, "-s", "w8a8", "--pass", "gtpq")
    assert "has static activations, which the pass 'static' measures; add it" in refusal(
        capsys, *press, "-s", "w8a8-static", "--pass", "rtn"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "seq_len is 512; {source} reads 256 tokens at once: set seq_len to at most 256"),
        (("--seq-len", "128", "--tokens", "100"), "tokens is 100, less than one row of seq_len 128; set tokens to at"),
        (("--seq-len", "1"), "scheme w4a16g32: calibration.seq_len: Input should be greater than or equal to 2"),
        (("--seq-len", "64", "--calibration", "wiki"), "data 'wiki' is not known; use `stdlib`, the path of"),
        (("--calibration", "hf:a/b.txt", *TEXT), "data 'hf:a/b.txt' names no file of text; write hf:OWNER/NAME/FILE"),
        (("--calibration", "hf:a/b/c.parquet", *TEXT), "where FILE ends in .txt or .jsonl"),
        (("--calibration", "hf:nobody/nothing/c.txt", *TEXT), "data hf:nobody/nothing/c.txt cannot be fetched: "),
    ],
)
def test_text_that_cannot_be_read_is_refused(
    words: tuple[str, ...], said: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refusal(capsys, "compress", tiny_llama, "-o", tmp_path / "out", "-s", "w4a16g32", *words)
    assert said.format(source=tiny_llama) in found
    assert list(tmp_path.iterdir()) == []


def test_text_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--some-org--texts"
    file = repository / "snapshots" / ("0" * 40) / "part" / "a.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    found = corpus.load("hf:some-org/texts/part/a.jsonl", "calibration")
    assert (found.name, found.documents) == ("hf:some-org/texts/part/a.jsonl", ("one", "two"))


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cpu", 2, ["cpu"]),
        ("cuda", 2, ["cuda:0"]),
        ("cuda:1,cuda:0", 2, ["cuda:1", "cuda:0"]),
        ("cpu,cuda", 1, ["cpu", "cuda:0"]),
        ("cuda", 0, "device 'cuda' is not there: torch sees no CUDA device; give auto or cpu"),
        ("cpu,cuda:2", 2, "device 'cuda:2' is not there: it sees 2 CUDA devices"),
        ("cuda,cuda:0", 1, "device 'cuda:0' is named twice in 'cuda,cuda:0'"),
        ("gpu", 1, "device 'gpu' is not known; give auto, cpu, cuda, or a list"),
        ("", 1, "device '' is not known"),
    ],
)
def test_devices_have_names(text: str, gpus: int, expected: list[str] | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            devices.find_devices(text)
    else:
        assert [str(device) for device in devices.find_devices(text)] == expected


def test_a_device_that_would_be_idle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.chosen_devices("auto", reads_text=False) == (torch.device("cpu"),)
    assert devices.chosen_devices("auto", reads_text=True) == (torch.device("cuda:0"),)
    with pytest.raises(ValueError, match="device is 'cuda', but no pass reads text"):
        devices.chosen_devices("cuda", reads_text=False)


def interrupt_after(number: int) -> Callable[[BlockDone], None]:
    def stop(block: BlockDone) -> None:
        if block.done == number:
            raise KeyboardInterrupt

    return stop


def test_an_interrupted_run_says_how_to_go_on_and_does(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ("compress", tiny_llama, "-o", out, "-s", "w4a16g32", *TEXT)
    real = press.compress

    def interrupted(*args: object, **options: object) -> object:
        return real(*args, **(options | {"progress": interrupt_after(3)}))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(press, "compress", interrupted)
        assert run(*words) == 128 + signal.SIGINT
    (left,) = tmp_path.iterdir()
    said = f"{left} keeps what is finished; the same command with --resume goes on with it"
    assert said in capsys.readouterr().err
    # As the next process sees it: one that left it and is gone.
    gone = left.rename(left.with_name(f"out.partial-{_a_process_that_is_gone()}"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*words, "--resume") == 0
    shown = capsys.readouterr().err
    assert shown.startswith(f"going on with {gone}\n")
    assert shown.split("\r\x1b[K")[1:] == [
        "1/4 embed (resumed)",
        "2/4 layers.0 (resumed)",
        "3/4 layers.1 (resumed)",
        "4/4 head\n",
    ]
    manifest = read_manifest(out)
    assert manifest is not None
    assert run("compress", tiny_llama, "-o", tmp_path / "whole", *words[4:]) == 0
    assert read_manifest(tmp_path / "whole") == manifest


def _a_process_that_is_gone() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_killed_runs_left_is_told(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "out", ("compress", tiny_llama, "-o", tmp_path / "out", "-s", "bf16")
    assert run(*words, "--resume") == 0
    assert capsys.readouterr().err.splitlines()[0] == "note: there is nothing to resume; pressing anew"
    number = _a_process_that_is_gone()
    empty, begun = tmp_path / f"out.partial-{number}1", tmp_path / f"out.partial-{number}"
    (begun / "pressd").mkdir(parents=True)
    (begun / "pressd" / "journal.jsonl").write_text(json.dumps({"fingerprint": {}}) + "\n")
    empty.mkdir()
    assert run(*words, "--overwrite") == 0
    notes = capsys.readouterr().err.splitlines()[:2]
    assert sorted(notes) == sorted(
        [
            f"note: {begun} is left from a run that was killed; --resume goes on with it, or it can be removed",
            f"note: {empty} is left from a run that was killed; it can be removed",
        ]
    )
    assert "cannot resume: " in refusal_after_notes(capsys, *words, "--overwrite", "--resume")
    assert begun.exists()
    assert read_manifest(out) is not None


def refusal_after_notes(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert run(*words) == cli.FAILED
    return capsys.readouterr().err.splitlines()[-1]


def test_inspect_shows_passes_notes_and_text(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("compress", tiny_llama, "-o", out, "-s", "w4a16g32", "--pass", "awq,gptq", *TEXT) == 0
    capsys.readouterr()
    assert run("inspect", out) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    assert rows["layers.1.qkv"][1:4] == ["w4a16g32", "awq", "gptq"]
    assert rows["embed"][1:3] == ["keep", "-"]
    assert rows["layers.1.qkv:"][1] == "awq:"
    assert "calibrated on 256 tokens of stdlib in rows of 64, seed 0\n" in shown
