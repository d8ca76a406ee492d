"""The model's tokenizer and chat template. Slow; called in a thread, never on the event loop.

transformers brings torch along and takes seconds to import; so that happens in the thread too.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from tokenizers import Tokenizer

from pressd.runtime.artifact.spelling import Speller
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
    spell = Speller(json.loads(tokenizer.to_str()).get("decoder"))
    if not spell.has_steps:
        raise ValueError("the tokenizer has no decoder; save it with one, such as ByteLevel or Metaspace")
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {token_id: spell(token) for token, token_id in vocabulary.items() if token_id not in special}
