"""The built-in text: what is held out stays out, and bad files are refused by line."""

import hashlib
import json
from pathlib import Path

import pytest

from pressd.compress import corpus


def line_triples(text: str) -> set[tuple[str, ...]]:
    """Every three consecutive lines that say something, which no two independent files share by accident."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 12 and not line.strip().startswith("#")]
    return {tuple(lines[index : index + 3]) for index in range(len(lines) - 2)}


def test_the_splits_share_no_module_and_no_document() -> None:
    assert len(set(corpus.HELDOUT)) == len(corpus.HELDOUT)
    assert not set(corpus.HELDOUT) & set(corpus.CALIBRATION)
    calibration, heldout = (corpus.load("stdlib", split) for split in corpus.SPLITS)
    assert not set(calibration.documents) & set(heldout.documents)


def test_every_module_of_the_lists_exists_here() -> None:
    for split, modules in (("heldout", corpus.HELDOUT), ("calibration", corpus.CALIBRATION)):
        documents = corpus.load("stdlib", split).documents
        present = [module for module in modules if (corpus.stdlib_root() / module).exists()]
        assert documents == tuple((corpus.stdlib_root() / module).read_text(encoding="utf-8") for module in present)
        assert len(present) >= len(modules) - 1  # Python 3.14 made string.py a package


def test_training_text_holds_no_held_out_module_nor_a_copy_of_one() -> None:
    library, tests = corpus.stdlib_training()
    heldout = [line_triples(document) for document in corpus.load("stdlib", "heldout").documents]
    owners: dict[tuple[str, ...], int] = {triple: index for index, triples in enumerate(heldout) for triple in triples}
    for document in library + tests:
        shared = [0] * len(heldout)
        for triple in line_triples(document):
            if triple in owners:
                shared[owners[triple]] += 1
        for count, triples in zip(shared, heldout, strict=True):
            assert count <= len(triples) / 10, document[:200]


@pytest.mark.parametrize(
    "path",
    [
        "test/test_csv.py",
        "test/test_http_cookies.py",
        "test/test_json/test_decode.py",
        "test/test_logging.py",
        "test/_test_multiprocessing.py",
        "test/test_concurrent_futures/test_thread_pool.py",
        "test/test_asyncio/test_locks.py",
        "test/test_robotparser.py",
    ],
)
def test_tests_of_held_out_modules_are_not_trained_on(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (path, "test/test_bisect.py", "bisect.py", "csv.py", "site-packages/thing.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(corpus, "stdlib_root", lambda: tmp_path)
    assert corpus.stdlib_training() == (("bisect.py",), ("test/test_bisect.py",))


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "stdlib_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"stdlib: no source files.*\.txt or \.jsonl"):
        corpus.load("stdlib", "heldout")


def test_digest_is_of_the_text_and_of_its_boundaries() -> None:
    def digest(*documents: str) -> str:
        return corpus.Corpus(name="x", split="heldout", documents=documents).sha256

    assert digest("ab", "c") == digest("ab", "c")
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab"), digest("abc", "")}) == 5
    expected = hashlib.sha256((2).to_bytes(8, "little") + "é".encode()).hexdigest()  # lengths are of bytes
    assert digest("é") == expected


def test_text_file_is_one_document_in_every_split(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufefffirst\n\nsecond\n".encode())
    for split in corpus.SPLITS:
        loaded = corpus.load(str(path), split)
        assert (loaded.name, loaded.split, loaded.documents) == ("notes.txt", split, ("first\n\nsecond\n",))


def test_jsonl_has_one_document_per_line(tmp_path: Path) -> None:
    # U+2028 and U+0085 may stand unescaped in JSON strings; str.splitlines would break the line there.
    texts = ["one", "with\nnewline", "line\u2028separator", "next\u0085line"]
    path = tmp_path / "notes.jsonl"
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8", newline="\r\n")
    assert corpus.load(str(path), "heldout").documents == tuple(texts)


@pytest.mark.parametrize(
    "line", ['{"text": 3}', '{"words": "x"}', '["text"]', '"text"', "7", "{", '{"text": null}', r'{"text": "\ud800"}']
)
def test_jsonl_error_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"notes\.jsonl, line 3: needs an object with a string `text`"):
        corpus.load(str(path), "calibration")


@pytest.mark.parametrize(("name", "content"), [("empty.txt", b""), ("blank.txt", b" \n\t"), ("empty.jsonl", b"\n")])
def test_file_without_text_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} holds no text"):
        corpus.load(str(tmp_path / name), "heldout")


def test_unreadable_and_unknown_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
            corpus.load(str(tmp_path / name), "heldout")
    with pytest.raises(ValueError, match=r"'wikitext' is not known; use `stdlib`, the path of a \.txt or \.jsonl"):
        corpus.load("wikitext", "heldout")
    with pytest.raises(ValueError, match="'training' does not exist; choose one of calibration, heldout"):
        corpus.load("stdlib", "training")
