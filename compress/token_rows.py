"""Text as rows of tokens of one length: what an evaluation reads."""

from dataclasses import dataclass
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


def read_rows(data: str, tokenizer_of: Checkpoint, *, tokens: int, seq_len: int) -> TokenRows:
    """Return the first `tokens` of the held-out text as whole rows, fewer if the text is shorter.

    Raises ValueError if there is not one row, or the tokenizer or the text cannot be read.
    """
    if seq_len < 2 or tokens < seq_len:
        raise ValueError(
            f"tokens is {tokens} and seq_len {seq_len}; seq_len must be at least 2, and tokens at least that"
        )
    text = corpus.load(data, SPLIT)
    tokenizer = _load_tokenizer(tokenizer_of)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = seq_len - len(prefix)
    wanted = tokens // seq_len * body
    stream: list[int] = []
    for document in text.documents:
        if len(stream) > wanted:
            break
        # The length warning is about the model's context; rows are cut below it.
        stream += tokenizer.encode(document, verbose=False)
    if prefix and stream[:1] == prefix:
        del stream[0]  # the first row begins with it already
    rows = min(len(stream), wanted) // body
    if rows == 0:
        raise ValueError(f"data {data}: {len(stream)} tokens do not fill one row of {seq_len}; give more text")
    ids = torch.tensor([prefix + stream[row * body : (row + 1) * body] for row in range(rows)], dtype=torch.int64)
    vocab_size = tokenizer_of.linear("lm_head").out_features
    if int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{tokenizer_of.path}: its tokenizer makes id {int(ids.max())}, its vocabulary has {vocab_size}"
        )
    return TokenRows(name=text.name, sha256=text.sha256, ids=ids)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        return load_tokenizer(checkpoint.tokenizer_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint.path}: its tokenizer cannot be loaded ({reason})") from None
