"""The model's tokenizer and chat template. Slow; called in a thread, never on the event loop.

transformers brings torch along and takes seconds to import; so that happens in the thread too.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers import Tokenizer

from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.server.asked import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Token ids, the text they are of, and each token's [begin, end) in the characters of that text."""

    ids: tuple[int, ...]
    text: str
    spans: tuple[tuple[int, int], ...]


class ChatError(ValueError):
    """The conversation does not fit the model's chat template, or there is none; one line for the caller."""


class Text:
    """Text in and out of one model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self.bytes_of_token = bytes_of_tokens(self._backend)
        self.has_chat_template = bool(tokenizer.chat_template)

    @classmethod
    def load(cls, path: Path) -> "Text | None":
        """Return the tokenizer of a model directory, None if it has none.

        Raises ValueError if it has one that cannot be streamed.
        """
        if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return None
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = load_tokenizer(path)
        except Exception as error:  # the tokenizers library raises nothing more particular for a broken file
            raise ValueError(f"{path}: its tokenizer cannot be loaded: {error}") from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{path}: its tokenizer has no tokenizer.json; save it with save_pretrained first")
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """Tokenise text; special tokens written in it count as such, as everywhere in transformers."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return Encoding(ids=tuple(encoding.ids), text=text, spans=tuple(encoding.offsets))

    def encode_chat(self, messages: Sequence[Message]) -> Encoding:
        """Render a conversation up to the assistant's next turn, and tokenise it; raises ChatError."""
        if not self.has_chat_template:
            raise ChatError("this model has no chat template; send a prompt")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatError(f"the model's chat template refuses it: {error}") from None
        return self.encode(rendered, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence from its beginning."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def byte_offsets(encoding: Encoding) -> list[tuple[int, int]]:
    """Each token's [begin, end) in the UTF-8 bytes of the text."""
    position = [0, *itertools.accumulate(len(character.encode()) for character in encoding.text)]
    return [(position[begin], position[end]) for begin, end in encoding.spans]


def bytes_of_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the bytes which each id adds to a text; special tokens add none and are left out.

    Raises ValueError if the tokenizer's decoder does not treat tokens one by one.
    """
    spell = _Speller(json.loads(tokenizer.to_str()).get("decoder"))
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {token_id: spell(token) for token, token_id in vocabulary.items() if token_id not in special}


class _Speller:
    """What the steps of a tokenizers decoder do to one token inside a text."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = False
        self._byte_fallback = False
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    self._replacements.append((old, new))
                case {"type": "Metaspace", "replacement": old}:
                    self._replacements.append((old, " "))
                case {"type": "Fuse" | "Strip"}:  # Strip is about the beginning of a text, and a completion has none
                    pass
                case {"type": other}:
                    raise ValueError(f"the tokenizer's decoder {other} cannot be streamed by this build")
        if not steps:
            raise ValueError("the tokenizer has no decoder; save it with one, such as ByteLevel or Metaspace")

    def __call__(self, token: str) -> bytes:
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_level and all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return token.encode("utf-8")


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes: printable ones for themselves, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
