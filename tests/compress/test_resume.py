"""A run that was killed, wherever, and is taken up: what comes out is what an uninterrupted run would have written."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import KILLED, Kind, Presses, forked_for_runs, same_but_the_report

from pressd.runtime.artifact.reader import Checkpoint

pytestmark = pytest.mark.system

TEXT = """
[calibration]
data = "{text}"
tokens = 192
seq_len = 48
{passes}
[scheme]
"*" = "w4a16g32"
"""
KINDS: tuple[Kind, ...] = ("any", "files", "time")
PASSES = {
    "gptq": '[[pass]]\nuse = "gptq"\nsweeps = 1\nclip = false\n',
    "all": '[[pass]]\nuse = "smooth"\n[[pass]]\nuse = "awq"\nsteps = 3\nclip = false\n'
    '[[pass]]\nuse = "gptq"\nsweeps = 0\ncorrect = true\nclip = false\n[[pass]]\nuse = "static"\nkv = "int8"\n',
    "rtn": "",
}


@pytest.fixture(scope="module")
def source(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama of four layers, with a bias in each linear and a tokenizer of single characters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "four"
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(path)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe file for each of PASSES, and their calibration text."""
    folder = tmp_path_factory.mktemp("recipes")
    letters = random.Random(4)
    text = "\n".join("".join(letters.choices("abcdefgh ,.", k=60)) for _ in range(20))
    (folder / "text.txt").write_text(text)
    files = {name: folder / f"{name}.toml" for name in PASSES}
    for name, file in files.items():
        file.write_text(TEXT.format(text=folder / "text.txt", passes=PASSES[name]))
    return files


@pytest.fixture(scope="module")
def process(source: Path, recipes: dict[str, Path]) -> "Iterator[subprocess.Popen[str]]":
    with forked_for_runs(source, recipes["all"]) as started:
        yield started


@pytest.fixture(scope="module", params=PASSES)
def runs(
    request: pytest.FixtureRequest, process: "subprocess.Popen[str]", source: Path, recipes: dict[str, Path]
) -> Presses:
    return Presses(process=process, source=source, recipe=recipes[request.param], shard_bytes=15_000)


@pytest.fixture(scope="module")
def whole(runs: Presses, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Kind, int]]:
    """An artifact that nobody has interrupted, and how many calls or milliseconds it took."""
    calls: dict[Kind, int] = {}
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        code, calls[kind] = runs.press(folder / kind, kind=kind)
        assert code == 0
    same_but_the_report(folder / "any", folder / "files")
    assert len(Checkpoint.open(folder / "any").weight_files) > 3
    return folder / "any", calls


def kill_and_resume(
    runs: Presses, whole: tuple[Path, dict[Kind, int]], out: Path, dice: random.Random
) -> tuple[int, int]:
    """Kill a run and those that take it up until one comes through; return how many were killed and how many go on."""
    expected, calls = whole
    killed = resumed = 0
    while not out.exists():
        (kind,) = dice.choices(KINDS, (1, 4, 1))
        # A third of those that resume are let through; the others are killed in their turn.
        kill_at = -1 if killed and dice.random() < 1 / 3 else dice.randint(1, calls[kind])
        has_work = any((path / "pressd/journal.jsonl").is_file() for path in out.parent.iterdir())
        code, _ = runs.press(out, kind=kind, kill_at=kill_at, resume=True)
        resumed += has_work
        assert code in (0, KILLED)
        # One that resumes makes fewer calls than one that begins, and may get through before the moment comes; one
        # that is killed after it has moved the directory to its place has nothing left to do.
        killed += code == KILLED
    same_but_the_report(expected, out)
    return killed, resumed


@pytest.mark.parametrize("num_killed", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_it_does_not_show_that_a_run_was_killed(
    runs: Presses, whole: tuple[Path, dict[Kind, int]], num_killed: int, tmp_path: Path
) -> None:
    dice, killed, resumed = random.Random(5), 0, 0
    while killed < num_killed:
        (folder := tmp_path / str(killed)).mkdir(exist_ok=True)
        now, again = kill_and_resume(runs, whole, folder / "out", dice)
        killed, resumed = killed + now, resumed + again
        shutil.rmtree(folder)
    assert resumed >= num_killed // 4
