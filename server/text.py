"""The model's tokenizer and chat template. Slow; called in a thread, never on the event loop.

transformers brings torch along and takes seconds to import; so that happens in the thread too.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from pressd.runtime.artifact.spelling import Speller
from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.server.chat import ChatPrompt
from pressd.server.chat_template import ChatTemplate, LongChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# What text is put behind to see how its tokens look inside a text: ends of lines stay tokens of their own.
_ANCHORS = ("\n", "=", "(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Token ids, the text they are of, and each token's [begin, end) in the characters of that text, if asked for."""

    ids: tuple[int, ...]
    text: str
    spans: tuple[tuple[int, int], ...] = ()


class Text:
    """Text in and out of one model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self.bytes_of_token = bytes_of_tokens(self._backend)
        self.bytes_of_any_token = self.bytes_of_token | bytes_of_special_tokens(self._backend)
        self._longest = max(map(len, self.bytes_of_any_token.values()), default=1)
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

    def encode(self, text: str, *, add_special_tokens: bool = True, spans: bool = False) -> Encoding:
        """Tokenise text; special tokens written in it count as such, as everywhere in transformers."""
        # Of the library's functions only those for batches let other threads run.
        encode_batch = self._backend.encode_batch if spans else self._backend.encode_batch_fast
        (encoding,) = encode_batch([text], add_special_tokens=add_special_tokens)
        return Encoding(ids=tuple(encoding.ids), text=text, spans=tuple(encoding.offsets) if spans else ())

    def encode_chat(self, prompt: ChatPrompt, *, max_bytes: int | None = None, spans: bool = False) -> Encoding:
        """Render a conversation and tokenise it, unless it has more bytes; raises ChatError, and LongChatError then.

        Special tokens written in it count as such, by whomever: what users may not say must be kept from the messages.
        """
        rendered = ChatTemplate(self._tokenizer).render(prompt)
        num_bytes = len(rendered.encode())
        if max_bytes is not None and num_bytes > max_bytes:
            problem = f"it has {num_bytes} bytes when rendered; at most {max_bytes} are taken, whatever its tokens"
            raise LongChatError(problem)
        return self.encode(rendered, add_special_tokens=False, spans=spans)

    def encode_inside(self, text: str) -> tuple[int, ...]:
        """Tokenise text as it stands inside another one, where no tokenizer puts a space before it."""
        for anchor in _ANCHORS:
            before = self._backend.encode(anchor, add_special_tokens=False).ids
            whole = self._backend.encode(anchor + text, add_special_tokens=False).ids
            if before and whole[: len(before)] == before:
                return tuple(whole[len(before) :])
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def spell(self, token_id: int) -> str:
        """The text of one token alone; bytes which are no UTF-8 become U+FFFD."""
        return self.bytes_of_any_token.get(token_id, b"").decode("utf-8", "replace")

    def max_bytes(self, num_tokens: int) -> int:
        """Bytes that a text of so many tokens has at most."""
        return num_tokens * self._longest

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence from its beginning."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def byte_offsets(encoding: Encoding) -> list[tuple[int, int]]:
    """Each token's [begin, end) in the UTF-8 bytes of the text; slow."""
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


def bytes_of_special_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the bytes which each special token adds to a text that shows them: the decoder takes them as any token."""
    spell = Speller(json.loads(tokenizer.to_str()).get("decoder"))
    added = tokenizer.get_added_tokens_decoder()
    return {token_id: spell(token.content) for token_id, token in added.items() if token.special}
