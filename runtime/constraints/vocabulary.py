"""The tokens of a model as the bytes they add to a text, for llguidance."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from pressd.runtime.artifact.spelling import Speller
from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.runtime.constraints.error import ConstraintError

_SPECIAL = b"\xff"  # never begins text in UTF-8; llguidance's mark for tokens that are no text


class Vocabulary:
    """A model's tokenizer in llguidance's form.

    `tokenizer` has one token more than the model: an end of text of its own, so that the model's, of which there may be
    none or several, are set apart from what a grammar says. `eos` and `continuing` (every token but those)
    are int32 bit sets [ceil(V/32)].
    """

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Read the tokenizer. Raises ConstraintError if there is none or its tokens are not sequences of bytes."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise ConstraintError(
                "structured output needs the package llguidance: pip install llguidance", lasting=False
            ) from None
        eos_token_ids = [token for token in eos_token_ids if 0 <= token < vocab_size]
        try:
            tokens = _bytes_of_tokens(load_tokenizer(path), vocab_size, frozenset(eos_token_ids))
        except Exception as error:  # whatever transformers raises for a directory it cannot read
            message = f"structured output cannot read the model's tokenizer: {error}"
            raise ConstraintError(message, lasting=False) from None
        self.size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.eos = bit_set(eos_token_ids, vocab_size)
        self.continuing = bit_set([token for token, text in enumerate(tokens) if text], vocab_size) & ~self.eos
        self.tokenizer = LLTokenizer(cast(TokenizerWrapper, _Spelled(tokens)))


class _Spelled:
    """What llguidance asks of a tokenizer that is not its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, _SPECIAL + b"<|end of constrained text|>"]
        self.eos_token_id = len(tokens)

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("forced text is never tokenized")  # see notation._EXACT


def bit_set(token_ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    """Return int32 [ceil(vocab_size/32)] in which bit t % 32 of word t // 32 is set for each id t."""
    flags = torch.zeros((vocab_size + 31) // 32 * 32, dtype=torch.int32)
    flags[list(token_ids)] = 1
    words = (flags.view(-1, 32).to(torch.int64) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _bytes_of_tokens(tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> list[bytes]:
    """Return what each id below vocab_size spells; nothing for ids without a token.

    Raises ValueError for a decoder that does not spell tokens one by one.
    """
    backend = tokenizer.backend_tokenizer
    spell = Speller(json.loads(backend.to_str()).get("decoder"))
    added = backend.get_added_tokens_decoder()
    tokens = [b""] * vocab_size
    for text, token in backend.get_vocab(with_added_tokens=True).items():
        if token >= vocab_size:
            continue
        if token in added and (added[token].special or (text.startswith("<") and text.endswith(">"))):
            tokens[token] = _SPECIAL + text.encode()
        elif token in eos_token_ids:
            tokens[token] = _SPECIAL + f"<{token}>".encode()
        else:
            tokens[token] = text.encode() if token in added else spell(text)
    return tokens
