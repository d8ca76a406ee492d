"""Text as rows of tokens of one length: what an evaluation reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pressd.compress import corpus
from pressd.compress.protocol import PROTOCOL, SPLIT
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """`ids` int64 [rows, seq_len], and where they came from: `sha256` is of the text, before tokenizing."""

    name: str
    sha256: str
    ids: Tensor

    def describe(self) -> dict[str, object]:
        """The `data` entry of a report."""
        rows, seq_len = self.ids.shape
        return {
            "name": self.name,
            "split": SPLIT,
            "tokens": rows * seq_len,
            "seq_len": seq_len,
            "rows": rows,
            "sha256": self.sha256,
            "protocol": PROTOCOL,
        }


def read_rows(
    data: str, tokenizer_of: Checkpoint, *, tokens: int, seq_len: int, change: Callable[[str, int], str] | None = None
) -> TokenRows:
    """Return the first `tokens` of the held-out text as whole rows, fewer if the text is shorter.

    `change` is made to each document, given its number, before it is tokenized; `sha256` is of the text before.
    Raises ValueError if there is not one row, or the tokenizer or the text cannot be read.
    """
    if seq_len < 2 or tokens < seq_len:
        raise ValueError(
            f"tokens is {tokens} and seq_len {seq_len}; seq_len must be at least 2, and tokens at least that"
        )
    text = corpus.load(data, SPLIT)
    documents = text.documents
    if change is not None:
        documents = tuple(change(document, number) for number, document in enumerate(documents))
    ids, num_tokens = cut_rows(documents, prepare(tokenizer_of), seq_len, limit=tokens // seq_len)
    if len(ids) == 0:
        raise ValueError(f"data {data}: {num_tokens} tokens do not fill one row of {seq_len}; give more text")
    return TokenRows(name=text.name, sha256=text.sha256, ids=ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A tokenizer, and the vocabulary of the model that it is for."""

    path: Path
    tokenizer: Any
    vocab_size: int


def prepare(checkpoint: Checkpoint) -> Prepared:
    """Load the tokenizer of a model; raises ValueError if it cannot be loaded."""
    try:
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint.path}: its tokenizer cannot be loaded ({reason})") from None
    return Prepared(path=checkpoint.path, tokenizer=tokenizer, vocab_size=checkpoint.linear("lm_head").out_features)


def cut_rows(
    documents: tuple[str, ...], prepared: Prepared, seq_len: int, limit: int | None = None
) -> tuple[Tensor, int]:
    """Return documents, one after the other, as whole rows int64 [rows, seq_len], and how many tokens were read.

    There are at most `limit` rows, and what lies behind them is not read. Every row begins with BOS if the tokenizer
    has one. Raises ValueError for ids outside of the vocabulary.
    """
    tokenizer = prepared.tokenizer
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = seq_len - len(prefix)
    stream: list[int] = []
    for document in documents:
        if limit is not None and len(stream) > limit * body:
            break
        # The length warning is about the model's context; rows are cut below it.
        stream += tokenizer.encode(document, verbose=False)
    if prefix and stream[:1] == prefix:
        del stream[0]  # the first row begins with it already
    rows = len(stream) // body if limit is None else min(len(stream) // body, limit)
    cut = [prefix + stream[row * body : (row + 1) * body] for row in range(rows)]
    ids = torch.tensor(cut, dtype=torch.int64).reshape(rows, seq_len)
    if rows and int(ids.max()) >= prepared.vocab_size:
        raise ValueError(
            f"{prepared.path}: its tokenizer makes id {int(ids.max())}, its vocabulary has {prepared.vocab_size}"
        )
    return ids, len(stream)
