"""The bytes of each token, against the tokenizer's own decoding; prompts, offsets and chats."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pressd.server.chat import ChatPrompt, Message
from pressd.server.chat_template import ChatError
from pressd.server.text import Text, byte_offsets, bytes_of_tokens

BYTE_LEVEL = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
BYTE_LEVEL.decoder = decoders.ByteLevel()
BYTE_LEVEL.add_special_tokens([AddedToken("<end>", special=True)])
BYTE_LEVEL.add_tokens([AddedToken("a tag", special=False)])

# As SentencePiece models are converted: spaces as U+2581, bytes outside the vocabulary as <0xNN>.
PIECES = ["<unk>", "\u2581", "\u2581the", "e", "ü", *(f"<0x{byte:02X}>" for byte in range(256))]
FALLBACK = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(PIECES)}, merges=[], byte_fallback=True))
FALLBACK.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1)))
def test_byte_level_tokens_are_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    table = bytes_of_tokens(BYTE_LEVEL)
    mine = b"".join(table.get(token_id, b"") for token_id in ids).decode("utf-8", "replace")
    assert mine == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@given(st.lists(st.sampled_from([" ", " the", "e", "ü", "€", "x", "\n"])))
def test_byte_fallback_tokens_are_as_the_tokenizer_decodes_them(words: list[str]) -> None:
    text = "".join(words)
    ids = [
        token_id
        for word in words
        for token_id in (
            [PIECES.index(word.replace(" ", "\u2581"))]
            if word.replace(" ", "\u2581") in PIECES
            else [PIECES.index(f"<0x{byte:02X}>") for byte in word.encode()]
        )
    ]
    table = bytes_of_tokens(FALLBACK)
    assert b"".join(table[token_id] for token_id in ids).decode() == text
    # The tokenizer drops one space at the beginning of a text; a completion is never the beginning.
    assert FALLBACK.decode(ids) == text.removeprefix(" ")


def test_metaspace_decoder_writes_spaces() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"\u2581a": 0}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    assert bytes_of_tokens(tokenizer) == {0: b" a"}


def test_decoder_that_looks_at_neighbours_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ValueError, match="no decoder"):
        bytes_of_tokens(tokenizer)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece does not spell tokens one by one"):
        bytes_of_tokens(tokenizer)


@pytest.fixture(scope="module")
def text(echo_text: Path) -> Text:
    loaded = Text.load(echo_text)
    assert loaded is not None
    return loaded


def test_model_without_a_tokenizer_has_no_text(tmp_path: Path) -> None:
    assert Text.load(tmp_path) is None


def test_offsets_count_bytes(text: Text) -> None:
    encoding = text.encode("lo€the", spans=True)
    spans = byte_offsets(encoding)
    assert [encoding.text.encode()[begin:end].decode() for begin, end in spans] == ["lo", "€", "€", "€", "the"]


def test_special_tokens_are_left_out_unless_asked_for(text: Text) -> None:
    ids = (*text.encode("the").ids, 0)
    assert text.decode(ids) == "the"
    assert text.decode(ids, skip_special_tokens=False) == "the</s>"


def test_chat_is_rendered_by_the_models_template(text: Text) -> None:
    encoding = text.encode_chat(ChatPrompt(messages=(Message(role="user", content="hello"),)))
    assert encoding.text == "user: hello\nassistant:"
    assert text.decode(encoding.ids) == encoding.text


def test_chat_that_the_template_refuses(text: Text) -> None:
    with pytest.raises(ChatError, match="robots do not talk"):
        text.encode_chat(ChatPrompt(messages=(Message(role="robot", content="beep"),)))


def test_model_without_a_template_says_so(echo_text: Path, tmp_path: Path) -> None:
    config = json.loads((echo_text / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((echo_text / "tokenizer.json").read_bytes())
    loaded = Text.load(tmp_path)
    assert loaded is not None
    assert not loaded.has_chat_template
    with pytest.raises(ChatError, match="no chat template; send a prompt"):
        loaded.encode_chat(ChatPrompt(messages=(Message(role="user", content="hello"),)))
