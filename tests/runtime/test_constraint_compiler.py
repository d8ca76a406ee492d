"""One compilation per constraint, errors that spoil nothing, and tokenizers of several kinds."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pressd.runtime.constraints import ConstraintCompiler, ConstraintError
from pressd.runtime.constraints import compiler as compiling
from pressd.runtime.params import Constraint

PYLM = Path(__file__).parents[2] / "examples/pylm"
Make = Callable[..., ConstraintCompiler]


def regex(text: str) -> Constraint:
    return Constraint(kind="regex", text=text)


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def make(path: Path = PYLM, vocab_size: int = 4096, eos: tuple[int, ...] = (0,), **more: int) -> ConstraintCompiler:
        made.append(ConstraintCompiler(path, vocab_size, eos, **more))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


@pytest.fixture
def serialized(monkeypatch: pytest.MonkeyPatch) -> list[Constraint]:
    """Every constraint whose compilation began."""
    seen: list[Constraint] = []
    real = compiling.serialize

    def serialize(constraint: Constraint) -> str:
        seen.append(constraint)
        return real(constraint)

    monkeypatch.setattr(compiling, "serialize", serialize)
    return seen


def test_equal_constraints_from_many_threads_are_compiled_once(make: Make, serialized: list[Constraint]) -> None:
    compiler, together = make(), threading.Barrier(8)

    def ask(_: int) -> list[Any]:
        together.wait()
        return [compiler.submit(regex(f"[ab]{{{n % 5}}}c")).result(60) for n in range(40)]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    assert len(serialized) == 5
    assert len({id(grammar) for answer in answers for grammar in answer}) == 5


def test_errors_are_remembered_like_grammars(make: Make, serialized: list[Constraint]) -> None:
    compiler = make()
    errors = [compiler.submit(regex("(")).exception(60) for _ in range(3)]
    assert isinstance(errors[0], ConstraintError)
    assert [str(error) for error in errors] == [str(errors[0])] * 3
    assert len(serialized) == 1
    assert [error.__traceback__ for error in errors[1:]] == [None, None]  # nobody's frames are kept alive


def test_what_is_too_large_is_not_remembered(make: Make, serialized: list[Constraint]) -> None:
    compiler = make()
    for _ in range(2):
        assert "too many" in str(compiler.submit(regex("a" * 20_000)).exception(60))
    assert len(serialized) == 2


def test_the_least_recently_used_is_forgotten(make: Make, serialized: list[Constraint]) -> None:
    compiler = make(capacity=2)
    a, b, c = regex("a"), regex("b"), regex("c")
    kept, lost = compiler.submit(a).result(60), compiler.submit(b).result(60)
    compiler.submit(a)
    compiler.submit(c).result(60)
    assert compiler.submit(a).result(60) is kept
    assert serialized == [a, b, c]
    assert compiler.submit(b).result(60) is not lost
    assert serialized == [a, b, c, b]


def test_nobody_cancels_for_all(make: Make) -> None:
    compiler = make()
    assert not compiler.submit(regex("a")).cancel()
    assert compiler.submit(regex("a")).result(60).matcher().may_end is False


class _Panic(BaseException):
    """As llguidance's panics are: no Exception."""


def test_a_thread_outlives_what_it_compiles(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiling.serialize

    def serialize(constraint: Constraint) -> str:
        if constraint.text.startswith("boom"):
            raise _Panic("index out of bounds\nat line 3")
        return real(constraint)

    monkeypatch.setattr(compiling, "serialize", serialize)
    compiler = make()
    for n in range(2 * compiling.NUM_THREADS):
        with pytest.raises(ConstraintError, match=r"^regex: cannot be compiled: index out of bounds$"):
            compiler.submit(regex(f"boom{n}")).result(60)
    assert compiler.submit(regex("a")).result(60).matcher().may_end is False


def test_closing_fails_what_waits_and_finishes_what_runs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = threading.Semaphore(0), threading.Event()
    real = compiling.serialize

    def serialize(constraint: Constraint) -> str:
        begun.release()
        assert gate.wait(60)
        return real(constraint)

    monkeypatch.setattr(compiling, "serialize", serialize)
    compiler = make()
    running = [compiler.submit(regex("a" * n)) for n in range(1, compiling.NUM_THREADS + 1)]
    for _ in running:
        assert begun.acquire(timeout=60)
    waiting = compiler.submit(regex("b"))
    closing = threading.Thread(target=compiler.close)
    closing.start()
    assert str(waiting.exception(60)) == "regex: the engine has stopped"
    gate.set()
    closing.join(60)
    assert not closing.is_alive()
    assert [future.exception(0) for future in running] == [None] * len(running)
    with pytest.raises(RuntimeError, match="closed"):
        compiler.submit(regex("a"))
    compiler.close()


def test_a_grammar_that_gave_up_is_compiled_anew(make: Make, serialized: list[Constraint]) -> None:
    """1,500 optional words in a row are more alternatives than a parser may follow at once."""
    compiler = make()
    wide = Constraint(kind="ebnf", text=" ".join(("start:", *(f'"a{n}"?' for n in range(1500)))))
    grammar = compiler.submit(wide).result(60)
    matcher, bits = grammar.matcher(), torch.empty(128, dtype=torch.int32)
    matcher.write_mask(bits)
    a = next(token for token in range(1, 4096) if int(bits[token // 32]) >> token % 32 & 1)
    with pytest.raises(ConstraintError, match=r"^ebnf: .*max is 2000"):
        matcher.accept(a)
    with pytest.raises(ConstraintError, match="max is 2000"):
        matcher.write_mask(bits)
    assert compiler.submit(wide).result(60) is not grammar
    assert len(serialized) == 2


def test_a_directory_that_cannot_be_read_yet_is_tried_again(make: Make, tmp_path: Path) -> None:
    compiler = make(tmp_path)
    for _ in range(2):
        with pytest.raises(ConstraintError, match=r"^structured output cannot read the model's tokenizer: "):
            compiler.submit(regex("a")).result(60)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((PYLM / name).read_text())
    assert compiler.submit(regex("a")).result(60).matcher().may_end is False


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"
FALLBACK = [
    *({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}),
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def save_tokenizer(path: Path, words: list[str], decoder: dict[str, Any] | None) -> Any:
    """Write a tokenizer of these words, with <end> before and a <tool> that is not marked as special after them."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<end>", *words])}
    plain = json.loads(Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True)).to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**plain, "decoder": decoder}))
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("two words")])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    saved.save_pretrained(path)
    return saved


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": FALLBACK},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Metaspace", "replacement": SPACE}]},
    ],
    ids=["llama", "metaspace"],
)
def test_texts_are_what_the_tokenizer_itself_decodes(decoder: dict[str, Any], make: Make, tmp_path: Path) -> None:
    """Spaces by their stand-in, bytes that no word has, an added token that is text and one that is none."""
    if decoder["decoders"][1]["type"] == "Metaspace":
        decoder["decoders"][1] |= {"prepend_scheme": "never", "split": True}
    tokenizer = save_tokenizer(tmp_path, [*BYTES, "a", SPACE, f"{SPACE}b", "é"], decoder)
    compiler = make(tmp_path, len(tokenizer))
    text = "a b é😀<tool>two words"
    matcher = compiler.submit(Constraint(kind="choice", choices=(text,))).result(60).matcher()
    bits, drawn = torch.empty((len(tokenizer) + 31) // 32, dtype=torch.int32), []
    while not matcher.is_complete:
        matcher.write_mask(bits)
        drawn.append(max(token for token in range(len(tokenizer)) if int(bits[token // 32]) >> token % 32 & 1))
        matcher.accept(drawn[-1])
    assert tokenizer.decode(drawn) == text
    names = tokenizer.convert_ids_to_tokens(drawn)
    assert {"a", f"{SPACE}b", "é", "<0xF0>", "two words"} <= set(names)
    assert "<tool>" not in names
    tool = compiler.submit(Constraint(kind="ebnf", text='start: <tool> "a"')).result(60).matcher()
    tool.accept(tokenizer.convert_tokens_to_ids("<tool>"))
    assert not tool.is_complete


def test_a_decoder_that_spells_no_single_tokens_is_refused(make: Make, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ["a", "##b"], {"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(ConstraintError, match="decoder WordPiece does not spell tokens one by one"):
        make(tmp_path, 6).submit(regex("ab")).result(60)
