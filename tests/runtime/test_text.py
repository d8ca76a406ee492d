"""The text of tokens as they come is the text of them together, and continues the prompt's."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pressd.runtime.text import TextStream

PYLM = Path(__file__).parents[2] / "examples" / "pylm"


@given(token_ids=st.lists(st.integers(0, 4095) | st.integers(1, 256), max_size=12))
@settings(max_examples=300, deadline=None)
def test_text_of_bytes_is_that_of_the_whole(token_ids: list[int]) -> None:
    tokenizer = Tokenizer.from_file(str(PYLM / "tokenizer.json"))
    stream = TextStream(tokenizer, [])
    texts = [stream.push([token]) for token in token_ids]
    assert "".join(texts) + stream.push([], last=True) == tokenizer.decode(token_ids)


WORDS = ["▁lo", "▁and", "▁", "behold", "ü", "漢", "<s>", "<0xC3>", "<0xBC>", "<0xE6>", "<0xA2>"]
CHARACTERS = [*([index] for index in range(7)), [7, 8], [9, 8, 10]]  # the last two are ü and 漢, in bytes


@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    characters=st.lists(st.sampled_from(CHARACTERS), max_size=8),
    torn=st.sampled_from([[], [7], [9], [9, 8]]),
)
@settings(max_examples=300, deadline=None)
def test_text_continues_the_prompts(prompt: list[int], characters: list[list[int]], torn: list[int]) -> None:
    """With a decoder that drops the space at the beginning of a text: a completion is no beginning.

    It also makes nothing of all bytes in a row if some at their end are no character; whole ones before must survive.
    """
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(WORDS)}, merges=[]))
    tokenizer.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    token_ids = [token for character in characters for token in character]
    stream = TextStream(tokenizer, prompt)
    text = "".join(stream.push([token]) for token in token_ids)
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + token_ids)
    assert [stream.push([token]) for token in torn] == [""] * len(torn)
    assert stream.push([], last=True) == "\ufffd" * len(torn)
