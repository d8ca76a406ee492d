"""Text as it is streamed, against text decoded in one piece, however the bytes fall into tokens."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.server.detokenize import Detokenizer, Piece, StopMatcher

Cut = list[bytes]


def stream(
    tokens: Cut, stops: list[str] | None = None, chunks: list[int] | None = None
) -> tuple[list[Piece], str | None]:
    """Feed tokens in chunks of these sizes (one by one without) and return everything released, and the stop."""
    detokenizer = Detokenizer(dict(enumerate(tokens)), stops or [])
    released: list[Piece] = []
    ids = iter(range(len(tokens)))
    for size in itertools.chain(chunks or [], itertools.repeat(1)):
        chunk = list(itertools.islice(ids, size))
        if size and not chunk:
            break
        released += detokenizer.push(chunk)
    released += detokenizer.finish()
    return released, detokenizer.matched


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text or "" for piece in pieces)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the text ends, and by which stop: the one complete first, the longest of those that end together."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(ends)[0] - len(min(ends)[2]), min(ends)[2]) if ends else None


@given(st.lists(st.binary(max_size=5)))
def test_text_is_that_of_the_whole_even_if_it_is_no_utf8(tokens: Cut) -> None:
    released, _ = stream(tokens)
    assert text_of(released) == b"".join(tokens).decode("utf-8", "replace")
    assert [piece.token_id for piece in released] == list(range(len(tokens)))


@given(st.text(), st.data())
def test_what_is_released_is_final_and_whole(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    bounds = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    tokens = [raw[begin:end] for begin, end in itertools.pairwise(bounds)]
    detokenizer = Detokenizer(dict(enumerate(tokens)))
    shown, num_bytes = "", 0
    for index, token in enumerate(tokens):
        shown += text_of(detokenizer.push([index]))
        num_bytes += len(token)
        complete = raw[:num_bytes].decode("utf-8", "ignore")
        assert complete.startswith(shown)
        if len(complete.encode()) == num_bytes:  # no token has bytes of a code point to come, so none waits
            assert shown == complete
    assert shown + text_of(detokenizer.finish()) == text


def test_ids_do_not_run_ahead_of_their_text() -> None:
    first, second, third = "ü€".encode()[:1], "ü€".encode()[1:3], "ü€".encode()[3:]
    detokenizer = Detokenizer({0: first, 1: second, 2: third})
    assert detokenizer.push([0]) == []
    assert detokenizer.push([1]) == [Piece(0, "")]  # its code point is complete; the next one's first byte waits
    assert detokenizer.push([2]) == [Piece(1, "ü"), Piece(2, "€")]


SMALL = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(SMALL), STOPS, st.lists(st.integers(0, 5)))
def test_how_many_tokens_come_at_once_changes_nothing(tokens: list[str], stops: list[str], chunks: list[int]) -> None:
    cut = [token.encode() for token in tokens]
    assert stream(cut, stops, chunks) == stream(cut, stops)


@given(st.lists(SMALL.filter(bool)), STOPS)
def test_stop_texts_cut_at_the_same_place_however_tokens_fall(tokens: list[str], stops: list[str]) -> None:
    text = "".join(tokens)
    released, matched = stream([token.encode() for token in tokens], stops)
    expected = first_stop(text, stops)
    if expected is None:
        assert (text_of(released), matched) == (text, None)
        assert len(released) == len(tokens)
    else:
        assert (text_of(released), matched) == (text[: expected[0]], expected[1])
        # Tokens that begin in the stop text or behind it are not sent.
        starts = [0, *itertools.accumulate(map(len, tokens))]
        assert [piece.token_id for piece in released] == [i for i in range(len(tokens)) if starts[i] < expected[0]]


@given(st.lists(SMALL), STOPS)
def test_nothing_is_shown_that_a_stop_text_could_still_swallow(tokens: list[str], stops: list[str]) -> None:
    detokenizer = Detokenizer({index: token.encode() for index, token in enumerate(tokens)}, stops)
    final = text_of(stream([token.encode() for token in tokens], stops)[0])
    shown = ""
    for index in range(len(tokens)):
        shown += text_of(detokenizer.push([index]))
        assert final.startswith(shown)


def test_text_that_only_looked_like_a_stop_is_shown_in_the_end() -> None:
    detokenizer = Detokenizer({0: b"one EN"}, ["END"])
    assert detokenizer.push([0]) == []
    assert detokenizer.finish() == [Piece(0, "one EN")]


@given(st.text("a€", max_size=8), STOPS.map(lambda stops: [stop.replace("b", "€") for stop in stops]))
def test_no_byte_of_a_stop_text_is_sent_as_a_token(text: str, stops: list[str]) -> None:
    tokens = [bytes([byte]) for byte in text.encode()]
    released, _ = stream(tokens, stops)
    expected = first_stop(text, stops)
    kept = text if expected is None else text[: expected[0]]
    assert [piece.token_id for piece in released] == list(range(len(kept.encode())))


def test_a_stop_text_may_begin_inside_a_token_and_span_code_points() -> None:
    released, matched = stream([b"say \xe2\x82", b"\xac", b"!", b"more"], ["€!"])
    assert (released, matched) == ([Piece(0, "say ")], "€!")


def test_everything_after_a_stop_text_is_discarded() -> None:
    detokenizer = Detokenizer({0: b"a", 1: b"X", 2: b"b"}, ["X"])
    assert detokenizer.push([0, 1, 2]) == [Piece(0, "a")]
    assert detokenizer.push([2]) == detokenizer.finish() == []


def test_a_token_without_text_is_released_in_its_place() -> None:
    detokenizer = Detokenizer({0: b"a", 1: b"b"})
    assert detokenizer.push([0, 7, 1]) == [Piece(0, "a"), Piece(7, ""), Piece(1, "b")]


@pytest.mark.parametrize(
    ("stops", "text", "stop", "read"),
    [
        (["aab"], "aaab", "aab", 4),  # falls back inside itself
        (["abc", "b"], "abc", "b", 2),  # the one that is complete first
        (["bc", "abc"], "abc", "abc", 3),  # the longest of those that end together
    ],
)
def test_which_stop_text_is_found(stops: list[str], text: str, stop: str, read: int) -> None:
    assert StopMatcher(stops).feed(text) == (stop, read)
