"""The calibration text as rows of tokens, chosen by a seed; and whether it may be used at all."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress import corpus
from pressd.compress.recipe import Calibration
from pressd.compress.token_rows import cut_rows, prepare
from pressd.runtime.artifact.reader import Checkpoint

SPLIT = "calibration"
# Lines shorter than this occur everywhere; texts that share more than so many of the longer ones are not independent.
_TELLING_LINE = 40
_TOO_MUCH_SHARED = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRows:
    """`ids` int64 [rows, seq_len] and where they came from; `text_sha256` is of all text, before rows are chosen."""

    name: str
    text_sha256: str
    seed: int
    ids: Tensor

    @property
    def token_sha256(self) -> str:
        """Digest of the token ids, in rows."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, object]:
        """The `calibration` entry of a manifest."""
        rows, seq_len = self.ids.shape
        return {
            "data": self.name,
            "text_sha256": self.text_sha256,
            "token_sha256": self.token_sha256,
            "tokens": rows * seq_len,
            "seq_len": seq_len,
            "seed": self.seed,
        }


def read_calibration(options: Calibration, source: Checkpoint, max_context: int) -> CalibrationRows:
    """Return as many rows as `options` ask for, drawn without replacement by the seed, in the order of the text.

    Raises ValueError for text that is missing, not UTF-8, too short, or held out from calibration, for a tokenizer that
    cannot be loaded, and as `num_rows` does.
    """
    wanted = num_rows(options, source, max_context)
    text = corpus.load(options.data, SPLIT)
    _refuse_heldout(text)
    try:
        prepared = prepare(source)
    except ValueError as error:
        raise ValueError(f"calibration: {error}; without text, weights can only be rounded by the pass rtn") from None
    rows, _ = cut_rows(text.documents, prepared, options.seq_len)
    if len(rows) < wanted:
        raise ValueError(
            f"calibration: {options.data} fills {len(rows)} rows of {options.seq_len} tokens, {wanted} are asked for "
            f"(tokens = {options.tokens}); give more text, or set tokens to at most {len(rows) * options.seq_len}"
        )
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed))[:wanted]
    ids = rows[chosen.sort().values]
    return CalibrationRows(name=text.name, text_sha256=text.sha256, seed=options.seed, ids=ids)


def num_rows(options: Calibration, source: Checkpoint, max_context: int) -> int:
    """Return how many rows `options` ask for; raises ValueError if there is none, or one is longer than the context."""
    if options.seq_len > max_context:
        raise ValueError(
            f"calibration: seq_len is {options.seq_len}; {source.path} reads {max_context} tokens at once: set seq_len "
            f"to at most {max_context}"
        )
    if options.tokens < options.seq_len:
        raise ValueError(
            f"calibration: tokens is {options.tokens}, less than one row of seq_len {options.seq_len}; set tokens to "
            f"at least {options.seq_len}, or a smaller seq_len"
        )
    return options.tokens // options.seq_len


def _refuse_heldout(text: corpus.Corpus) -> None:
    """What is measured on must not have been looked at: refuse text that repeats the held-out split."""
    heldout = _telling_lines(corpus.heldout_documents())
    lines = _telling_lines(text.documents)
    shared = len(lines & heldout) / max(1, len(lines))
    if shared > _TOO_MUCH_SHARED:
        raise ValueError(
            f"calibration: {shared:.0%} of the lines of {text.name} are in the held-out text that `pressd eval` "
            f"measures on; give other text"
        )


def _telling_lines(documents: tuple[str, ...]) -> set[str]:
    lines = (line.strip() for document in documents for line in document.splitlines())
    return {line for line in lines if len(line) >= _TELLING_LINE}
