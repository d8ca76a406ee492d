"""The calibration text: which rows it gives, and what may not be calibrated on."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pressd.compress import corpus
from pressd.compress.calibration import read_calibration
from pressd.compress.recipe import Calibration
from pressd.compress.token_rows import cut_rows, prepare
from pressd.runtime.artifact.reader import Checkpoint

CONTEXT = 256
LINES = [f"This is line number {number}, and it is long enough to tell texts apart." for number in range(300)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


def options(path: Path | str, tokens: int = 640, seq_len: int = 64, seed: int = 0) -> Calibration:
    return Calibration(data=str(path), tokens=tokens, seq_len=seq_len, seed=seed)


def test_rows_are_rows_of_the_text_in_its_order_each_once(tiny_llama: Path, text: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    found = read_calibration(options(text), source, CONTEXT)
    rows, _ = cut_rows((text.read_text(),), prepare(source), 64)
    assert found.ids.shape == (10, 64)
    numbers = [next(n for n, row in enumerate(rows) if torch.equal(row, one)) for one in found.ids]
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(10))  # drawn from all of the text, not its beginning
    assert found.describe() == {
        "data": "text.txt",
        "text_sha256": corpus.load(str(text), "calibration").sha256,
        "token_sha256": hashlib.sha256(found.ids.numpy().astype("<i8").tobytes()).hexdigest(),
        "tokens": 640,
        "seq_len": 64,
        "seed": 0,
    }


def test_a_seed_says_which_rows(tiny_llama: Path, text: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    one, again, other = (read_calibration(options(text, seed=seed), source, CONTEXT) for seed in (5, 5, 6))
    assert torch.equal(one.ids, again.ids)
    assert one.token_sha256 == again.token_sha256
    assert not torch.equal(one.ids, other.ids)
    assert one.token_sha256 != other.token_sha256
    assert one.text_sha256 == other.text_sha256
    rows, _ = cut_rows((text.read_text(),), prepare(source), 64)
    for seed in (1, 2):
        everything = read_calibration(options(text, len(rows) * 64, seed=seed), source, CONTEXT)
        assert torch.equal(everything.ids, rows)


def test_digests_change_with_the_text(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text().replace("line number 299", "line number 298"))
    source = Checkpoint.open(tiny_llama)
    one, other = (read_calibration(options(path, 320 * 64), source, CONTEXT) for path in (text, changed))
    assert one.text_sha256 != other.text_sha256
    assert one.token_sha256 != other.token_sha256


def test_the_built_in_text_is_enough_for_the_defaults() -> None:
    pylm = Path(__file__).parents[2] / "examples" / "pylm"
    found = read_calibration(Calibration(), Checkpoint.open(pylm), 1024)
    assert found.ids.shape == (128, 512)
    assert (found.name, found.seed) == ("stdlib", 0)


def test_too_short_a_text_says_how_much_there_is(tiny_llama: Path, text: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    rows, _ = cut_rows((text.read_text(),), prepare(source), 64)
    message = (
        rf"calibration: .*text\.txt fills {len(rows)} rows of 64 tokens, 1000 are asked for \(tokens = 64000\); "
        rf"give more text, or set tokens to at most {len(rows) * 64}$"
    )
    with pytest.raises(ValueError, match=message):
        read_calibration(options(text, 64_000), source, CONTEXT)
    read_calibration(options(text, len(rows) * 64), source, CONTEXT)


def test_one_row_too_few_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match="fills 0 rows of 64 tokens, 1 are asked for"):
        read_calibration(options(path, 64), Checkpoint.open(tiny_llama), CONTEXT)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"tokens": 63}, "calibration: tokens is 63, less than one row of seq_len 64"),
        ({"seq_len": 257, "tokens": 1000}, "calibration: seq_len is 257; .* reads 256 tokens at once"),
    ],
)
def test_rows_that_cannot_be(tiny_llama: Path, text: Path, wanted: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_calibration(options(text, **wanted), Checkpoint.open(tiny_llama), CONTEXT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.txt", b" \n\n\t ", "blank.txt holds no text"),
        ("latin1.txt", "Süßigkeit".encode("latin-1"), "latin1.txt: cannot be read"),
        ("no.jsonl", b'{"text": ""}\n{"text": "  "}\n', "no.jsonl holds no text"),
        ("other.jsonl", b'{"body": "x"}\n', "other.jsonl, line 1: needs an object with a string `text`"),
        ("text.csv", b"x", "is not known; use `stdlib`, the path of a .txt or .jsonl file, or hf:"),
    ],
)
def test_files_that_are_no_text(tiny_llama: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_calibration(options(tmp_path / name), Checkpoint.open(tiny_llama), CONTEXT)


def test_a_file_that_is_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt: cannot be read"):
        read_calibration(options(tmp_path / "gone.txt"), Checkpoint.open(tiny_llama), CONTEXT)


def write(tmp_path: Path, how: str) -> Path:
    """The held-out text in another form."""
    documents = corpus.heldout_documents()
    match how:
        case "one file":
            path = tmp_path / "heldout.txt"
            path.write_text("\n".join(documents))
        case "indented":
            path = tmp_path / "indented.txt"
            path.write_text("\n".join("  " + line + "  " for document in documents for line in document.splitlines()))
        case "a third of a mixture":
            path = tmp_path / "mixture.jsonl"
            lines = [line for document in documents for line in document.splitlines() if len(line.strip()) >= 40]
            mixed = LINES + sorted(set(lines))[:150]
            path.write_text("\n".join(json.dumps({"text": line}) for line in mixed))
        case _:
            path = tmp_path / "module.txt"
            path.write_text(documents[0])
    return path


@pytest.mark.parametrize("how", ["one file", "indented", "a third of a mixture", "one module"])
def test_what_is_measured_on_is_refused(tiny_llama: Path, tmp_path: Path, how: str) -> None:
    message = "lines of .* are in the held-out text that `pressd eval` measures on; give other text"
    with pytest.raises(ValueError, match=message):
        read_calibration(options(write(tmp_path, how)), Checkpoint.open(tiny_llama), CONTEXT)


def test_a_few_lines_of_it_are_no_reason(tiny_llama: Path, tmp_path: Path) -> None:
    """Licences and idioms are in every text."""
    lines = [line for line in corpus.heldout_documents()[0].splitlines() if len(line.strip()) >= 40]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES + lines[:50]))
    assert len(read_calibration(options(path), Checkpoint.open(tiny_llama), CONTEXT).ids) == 10
