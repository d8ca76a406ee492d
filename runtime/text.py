"""Text in and out of a model, for callers in the same process: the tokenizer of its directory, read on first use."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.runtime.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What decoders of bytes write for those that are no character, or not one yet.
NO_CHARACTER = "\ufffd"


class Text:
    """Encodes prompts and decodes what continues them; knows ids only where there is no directory or tokenizer."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @cached_property
    def _tokenizer(self) -> "Tokenizer | None":
        if self._path is None or not any(
            (self._path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
        ):
            return None
        try:
            backend: Tokenizer | None = getattr(load_tokenizer(self._path), "backend_tokenizer", None)
        except Exception as error:  # the tokenizers library raises nothing more particular for a broken file
            raise ValueError(f"{self._path}: its tokenizer cannot be loaded: {error}") from None
        if backend is None:
            raise ValueError(f"{self._path}: its tokenizer has no tokenizer.json; save it with save_pretrained first")
        return backend

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Return a prompt's ids, with the special tokens that begin one; raises RequestError without a tokenizer."""
        if self._tokenizer is None:
            raise RequestError("prompt", "is a text, and this model has no tokenizer; give token ids")
        return tuple(self._tokenizer.encode(prompt).ids)

    def continuation(self, prompt: Sequence[int], token_ids: Sequence[int]) -> str | None:
        """Return what tokens add to the text of the prompt, special ones left out; None without a tokenizer."""
        stream = self.follow(prompt)
        if stream is None:
            return None
        # One by one, as a stream is: some decoders give up a whole character when bytes of none follow it.
        return "".join(stream.push([token]) for token in token_ids) + stream.push([], last=True)

    def follow(self, prompt: Sequence[int]) -> "TextStream | None":
        """Return what decodes a continuation of the prompt token by token; None without a tokenizer."""
        return None if self._tokenizer is None else TextStream(self._tokenizer, prompt)


class TextStream:
    """The text of one sequence as it grows, in whole characters; all of it together is `Text.continuation`."""

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Tokens that end with a whole character and whose text is out, then those whose text may be incomplete.
        self._told = _context(tokenizer, prompt)
        self._open: list[int] = []

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Return the text that new tokens complete; with `last`, also what will never be complete."""
        self._open += token_ids
        # Decoders treat the first token of a text unlike the others, so what is new is read after what is known.
        known, whole = self._tokenizer.decode(self._told), self._tokenizer.decode([*self._told, *self._open])
        text = whole[len(known) :] if whole.startswith(known) else self._tokenizer.decode(self._open)
        if not text and self._told:
            self._open = []  # special tokens: they will never be text, and need not be decoded again
        if not last and (not text or text.endswith(NO_CHARACTER)):
            return ""
        self._told, self._open = self._open or self._told, []
        return text


def _context(tokenizer: "Tokenizer", prompt: Sequence[int]) -> list[int]:
    """Return the last of the prompt's tokens, unless it ends inside a character, which would swallow what follows."""
    last = list(prompt[-1:])
    return [] if tokenizer.decode(last).endswith(NO_CHARACTER) else last
