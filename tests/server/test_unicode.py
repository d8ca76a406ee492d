"""Text token by token, against what the tokenizers library makes of the whole: tokenizers of two kinds, broken bytes,
special tokens, stop texts cut out of the text itself, any number of tokens at a time."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, target
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pressd.runtime.request import TokenLogprobs
from pressd.server.detokenize import Detokenizer, Piece
from pressd.server.text import bytes_of_special_tokens, bytes_of_tokens

# Characters of one to four bytes, some made of several code points, some that decoders treat in their own way.
ALPHABET = "abé€漢👩🚀\u200d\u0301 \u2581\ufffd\x00"
TEXTS = st.text(ALPHABET, max_size=6)
# What stands before a completion: a decoder may drop a space at the beginning of a text, and a completion is none.
ANCHOR = "anchor"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# The characters which byte-level tokenizers write for bytes 0 to 255.
LETTERS = dict(
    zip(
        [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x21), *range(0x7F, 0xA1), 0xAD],
        [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)],
        strict=True,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer whose first 256 ids are the bytes, and the bytes of its plain tokens as the server has them.

    With a fallback single bytes are told from text.
    """

    tokenizer: Tokenizer = field(repr=False)
    plain: dict[int, bytes] = field(repr=False)
    special: frozenset[int]
    has_fallback: bool

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def table(self, *, skip_special: bool) -> dict[int, bytes]:
        return self.plain if skip_special else self.plain | bytes_of_special_tokens(self.tokenizer)

    def spell(self, text: str) -> list[int]:
        """Tokens of a text, the longest at each place: they need not end where characters do."""
        pieces = {piece: token_id for token_id, piece in self.table(skip_special=False).items() if piece}
        raw, ids = text.encode(), []
        while raw:
            size = max(size for size in range(1, len(raw) + 1) if raw[:size] in pieces)
            ids.append(pieces[raw[:size]])
            raw = raw[size:]
        return ids

    def whole(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids behind others, as the library has it.

        A fallback that is no UTF-8 becomes one U+FFFD for each maximal malformed part of it, as everywhere else; the
        library replaces every byte of a run that is malformed anywhere, which is not known before the run is over.
        """
        ids = [token_id for token_id in ids if not (skip_special and token_id in self.special)]
        if not self.has_fallback:
            return self._behind_the_anchor(ids)
        runs = itertools.groupby(ids, lambda token_id: token_id < 256)
        return "".join(
            self._run(list(run)) if is_bytes else self._behind_the_anchor(list(run)) for is_bytes, run in runs
        )

    def _run(self, ids: list[int]) -> str:
        text = self._behind_the_anchor(ids)
        raw = bytes(ids)
        try:
            assert text == raw.decode()
        except UnicodeDecodeError:
            assert text == "\ufffd" * len(ids)
            return raw.decode("utf-8", "replace")
        return text

    def _behind_the_anchor(self, ids: list[int]) -> str:
        anchor = self.tokenizer.token_to_id(ANCHOR)
        text: str = self.tokenizer.decode([anchor, *ids], skip_special_tokens=False)
        assert text.startswith(ANCHOR)
        return text.removeprefix(ANCHOR)


@st.composite
def byte_level(draw: st.DrawFn) -> Vocabulary:
    """Tokens of any bytes, such as merges of bytes make them."""
    cut = st.tuples(TEXTS.map(str.encode), st.integers(0, 6)).map(lambda drawn: drawn[0][drawn[1] :])
    merged = draw(st.lists(st.binary(min_size=1, max_size=5) | cut, max_size=8))
    pieces = [bytes([byte]) for byte in range(256)] + merged
    tokens = dict.fromkeys("".join(chr(LETTERS[byte]) for byte in piece) for piece in [*pieces, ANCHOR.encode()])
    return vocabulary(draw, list(tokens), decoders.ByteLevel(), has_fallback=False)


@st.composite
def sentencepiece(draw: st.DrawFn) -> Vocabulary:
    """Tokens of whole characters, and one for each byte."""
    space = decoders.Metaspace() if draw(st.booleans()) else decoders.Replace("\u2581", " ")
    steps = [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    words = draw(st.lists(TEXTS.filter(bool), max_size=8))
    return vocabulary(draw, list(dict.fromkeys([*BYTES, *words, ANCHOR])), decoders.Sequence(steps), has_fallback=True)


def vocabulary(draw: st.DrawFn, tokens: list[str], decoder: object, *, has_fallback: bool) -> Vocabulary:
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoder
    plain = draw(st.lists(TEXTS.filter(bool), max_size=2))
    special = draw(st.lists(st.sampled_from(["</s>", "<|im_end|>", "a", "<|é▁€|>"]), max_size=2))
    tokenizer.add_tokens([AddedToken(content, special=False) for content in plain])
    tokenizer.add_special_tokens([AddedToken(content, special=True) for content in special])
    added = tokenizer.get_added_tokens_decoder()
    return Vocabulary(
        tokenizer=tokenizer,
        plain=bytes_of_tokens(tokenizer),
        special=frozenset(token_id for token_id, token in added.items() if token.special),
        has_fallback=has_fallback,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A completion and how it is asked for. `steps` are the numbers of tokens that come at once."""

    vocabulary: Vocabulary
    ids: list[int]
    steps: list[int]
    skip_special: bool
    text: str

    def detokenizer(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> Detokenizer:
        return Detokenizer(self.vocabulary.table(skip_special=self.skip_special), stops, include_stop=include_stop)

    def chunks(self) -> list[list[int]]:
        ids = iter(self.ids)
        sizes = itertools.chain(self.steps, itertools.repeat(1))
        taken = 0
        chunks = []
        while taken < len(self.ids):
            chunks.append(list(itertools.islice(ids, next(sizes))))
            taken += len(chunks[-1])
        return chunks


def vocabularies() -> st.SearchStrategy[Vocabulary]:
    return byte_level() | sentencepiece()


@st.composite
def cases(draw: st.DrawFn, *, broken: bool = True) -> Case:
    """Text in its longest tokens, text in single bytes, special tokens, and unless `broken` is false any tokens."""
    made = draw(vocabularies())
    any_tokens = st.lists(st.integers(0, made.size - 1), max_size=3)
    single_bytes = TEXTS.map(lambda text: list(text.encode()))
    special = st.lists(st.sampled_from(sorted(made.special)), max_size=1) if made.special else st.nothing()
    unfinished = single_bytes.map(lambda ids: ids[:-1])
    parts = TEXTS.map(made.spell) | single_bytes | special | (any_tokens | unfinished if broken else st.nothing())
    ids = list(itertools.chain.from_iterable(draw(st.lists(parts, max_size=8))))
    steps = draw(st.lists(st.integers(0, 5), max_size=8))
    skip = draw(st.booleans())
    return Case(vocabulary=made, ids=ids, steps=steps, skip_special=skip, text=made.whole(ids, skip_special=skip))


def stops_for(text: str) -> st.SearchStrategy[list[str]]:
    """Stop texts that are in a text, begin in it, overlap and hold one another."""
    bounds = st.tuples(st.integers(0, len(text)), st.integers(1, 5))
    inside = bounds.map(lambda bound: text[bound[0] : sum(bound)])
    beyond = st.tuples(inside, TEXTS).map("".join)
    stops = st.lists((inside | beyond | TEXTS).filter(bool), min_size=1, max_size=4)
    return stops.flatmap(lambda found: st.permutations([*found, *(stop[1:] for stop in found[:1] if stop[1:])]))


def first_end(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop text ends and the longest that ends there, by looking at every place."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(found, key=len)
    return None


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text or "" for piece in pieces)


@given(cases())
def test_deltas_add_up_to_what_the_library_decodes(case: Case) -> None:
    detokenizer = case.detokenizer()
    shown: list[Piece] = []
    for chunk in case.chunks():
        shown += detokenizer.push(chunk)
        assert case.text.startswith(text_of(shown))
    shown += detokenizer.finish()
    assert text_of(shown) == case.text
    assert [piece.token_id for piece in shown] == case.ids


@given(cases(), st.data())
def test_a_stop_text_ends_the_whole_decoding(case: Case, data: st.DataObject) -> None:
    stops, include_stop = data.draw(stops_for(case.text)), data.draw(st.booleans())
    match = first_end(case.text, stops)
    end, stop = match or (len(case.text), None)
    kept = case.text[: end if include_stop or not stop else end - len(stop)]
    detokenizer = case.detokenizer(stops, include_stop=include_stop)
    shown: list[Piece] = []
    for chunk in case.chunks():
        shown += detokenizer.push(chunk)
        assert kept.startswith(text_of(shown))  # nothing of a stop text that is left out, not even for a while
    shown += detokenizer.finish()
    assert (text_of(shown), detokenizer.matched) == (kept, stop)
    assert [piece.token_id for piece in shown] == case.ids[: len(shown)]
    target(float(match is not None) * len(kept))


@given(cases(), st.data())
def test_log_probabilities_stay_with_their_tokens(case: Case, data: st.DataObject) -> None:
    detokenizer = case.detokenizer(data.draw(stops_for(case.text) | st.just([])))
    given = [TokenLogprobs(token_id=n, logprob=-place / 8, rank=place + 1) for place, n in enumerate(case.ids)]
    shown: list[Piece] = []
    for chunk, begin in zip(case.chunks(), itertools.accumulate(map(len, case.chunks()), initial=0), strict=False):
        shown += detokenizer.push(chunk, given[begin : begin + len(chunk)])
    shown += detokenizer.finish()
    assert [piece.logprobs for piece in shown] == given[: len(shown)]


@given(cases(broken=False), st.data())
def test_what_is_decided_is_sent_at_once(case: Case, data: st.DataObject) -> None:
    stops, include_stop = data.draw(stops_for(case.text)), data.draw(st.booleans())
    detokenizer = case.detokenizer(stops, include_stop=include_stop)
    table = case.vocabulary.table(skip_special=case.skip_special)
    num_shown, raw, needs = 0, b"", [0]
    for chunk in case.chunks():
        num_shown += len(detokenizer.push(chunk))
        for token_id in chunk:
            raw += table.get(token_id, b"")
            # The characters that it is a part of; one without bytes waits for no more than those before it.
            needs.append(len(raw.decode("utf-8", "replace")) if table.get(token_id) else needs[-1])
        decided = raw.decode("utf-8", "ignore")
        if first_end(decided, stops):
            break
        starts = [size for stop in stops for size in range(len(stop)) if decided.endswith(stop[:size])]
        limit = len(decided) - (0 if include_stop else max(starts))
        assert num_shown == sum(need <= limit for need in needs[1:])


@given(cases(broken=False), st.data())
def test_tokens_that_begin_before_the_stop_text_are_sent(case: Case, data: st.DataObject) -> None:
    stops = data.draw(stops_for(case.text))
    match = first_end(case.text, stops)
    detokenizer = case.detokenizer(stops)
    shown = [piece for chunk in case.chunks() for piece in detokenizer.push(chunk)] + detokenizer.finish()
    table = case.vocabulary.table(skip_special=case.skip_special)
    sizes = [len(table.get(token_id, b"")) for token_id in case.ids]
    stop_begins = len(case.text[: match[0] - len(match[1])].encode()) if match else sum(sizes)
    begins = itertools.accumulate(sizes, initial=0)
    sent = [
        token_id for token_id, begin, size in zip(case.ids, begins, sizes, strict=False) if size and begin < stop_begins
    ]
    assert [piece.token_id for piece in shown if table.get(piece.token_id)] == sent


def test_letters_are_those_of_the_library() -> None:
    assert {chr(letter) for letter in LETTERS.values()} == set(pre_tokenizers.ByteLevel.alphabet())
