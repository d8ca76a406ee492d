"""A compiled constraint, and how far one sequence has come in it."""

from typing import TYPE_CHECKING

import torch

from pressd.runtime.constraints.error import ConstraintError
from pressd.runtime.constraints.vocabulary import Vocabulary
from pressd.runtime.params import ConstraintKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

# Where llguidance advises options that a request does not have.
_REWORDED = {
    "oneOf constraints are not supported": "oneOf needs alternatives that plainly exclude each other; write anyOf",
    "precomputation failed": "the regular expressions are too complex",
}


def limits() -> "LLParserLimits":
    """What one grammar may cost: at most about 20 ms of a thread for a mask, and 100 MB for its lexer's states."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # they quote the grammar and the text so far
    )


class Grammar:
    """A constraint made ready for one vocabulary; shared by all sequences that ask for it, on one thread at a time."""

    def __init__(self, kind: ConstraintKind, serialized: str, vocabulary: Vocabulary) -> None:
        """Compile. Raises ConstraintError if it cannot be compiled or no text satisfies it."""
        from llguidance import LLMatcher

        self.kind = kind
        self.vocabulary = vocabulary
        self.is_worn_out = False
        self._initial: LLMatcher = LLMatcher(vocabulary.tokenizer, serialized, log_level=0, limits=limits())
        self.check(self._initial)
        for warning in self._initial.get_grammar_warnings():
            raise ConstraintError(f"{kind}: {warning}")
        probe = self.matcher()
        probe.write_mask(torch.empty_like(vocabulary.eos))
        if probe.is_stuck:
            raise ConstraintError(f"{kind}: no text satisfies it", impossible=True)

    def matcher(self) -> "Matcher":
        """Return a matcher at the beginning of the text; cheap."""
        return Matcher(self, self._initial.deep_copy())

    def check(self, inner: "LLMatcher") -> None:
        """Raise ConstraintError if llguidance gave up; the states that sequences share may then be at fault."""
        if inner.is_error():
            self.is_worn_out = True
            message = inner.get_error()
            reworded = next((words for part, words in _REWORDED.items() if part in message), message)
            raise ConstraintError(f"{self.kind}: {reworded}", impossible="Unsatisfiable" in message)


class Matcher:
    """Where one sequence's text stands in a grammar. Not for several threads at once."""

    def __init__(self, grammar: Grammar, inner: "LLMatcher") -> None:
        self._grammar = grammar
        self._vocabulary = grammar.vocabulary
        self._inner = inner
        # llguidance's own end of text may need a word more than the model's vocabulary
        self._words = torch.empty(grammar.vocabulary.size // 32 + 1, dtype=torch.int32)
        self._is_complete: bool | None = None
        self._is_stuck = False
        self._has_ended = False

    @property
    def may_end(self) -> bool:
        """Whether the text satisfies the constraint as it is."""
        return self._has_ended or self._inner.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether the text satisfies the constraint and no token but the end can follow."""
        if self._is_complete is None:
            self._is_complete = self.may_end and not bool(self._followers().any())
        return self._is_complete

    @property
    def is_stuck(self) -> bool:
        """Whether the last mask was empty: the text does not satisfy the constraint, and no token leads there.

        Only vocabularies that cannot spell every character come here after the first token, and grammars that ask for
        an end-of-text token: the end is implied where a grammar is satisfied, and nowhere else.
        """
        return self._is_stuck

    def write_mask(self, bits: torch.Tensor) -> None:
        """Set bit t % 32 of word t // 32 exactly if token t may come next; EOS ids where the text may end.

        `bits` is int32 [ceil(vocab_size/32)]. Raises ConstraintError if the constraint turns out too complex to follow.
        """
        assert bits.dtype == torch.int32
        assert bits.shape == self._vocabulary.eos.shape
        words, may_end = self._followers(), self.may_end
        has_followers = bool(words.any())
        self._is_complete = may_end and not has_followers
        self._is_stuck = not may_end and not has_followers
        bits.copy_(words.bitwise_or_(self._vocabulary.eos) if may_end else words)

    def accept(self, token_id: int) -> None:
        """Go on by a drawn token. Raises ConstraintError if it may not come next: the mask was not obeyed."""
        if token_id in self._vocabulary.eos_token_ids:
            if not self.may_end:
                raise self._refusal(token_id)
            self._has_ended = self._is_complete = True
            return
        if self._has_ended or self._is_stuck or not 0 <= token_id < self._vocabulary.size:
            raise self._refusal(token_id)
        accepted = self._inner.try_consume_tokens([token_id])
        self._grammar.check(self._inner)
        if accepted != 1:
            raise self._refusal(token_id)
        self._is_complete = None

    def _refusal(self, token_id: int) -> ConstraintError:
        return ConstraintError(f"{self._grammar.kind}: token {token_id} may not come next")

    def _followers(self) -> torch.Tensor:
        """Return int32 [ceil(vocab_size/32)]: the tokens that continue the text, ends of text not among them."""
        words, inner = self._words, self._inner
        if not (self._has_ended or inner.is_stopped()):
            inner.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._has_ended or inner.is_stopped():  # by now: computing found no token, or gave up
            if not inner.get_error().startswith("NoExtensionBias"):
                self._grammar.check(inner)
            words.zero_()
        return words[: self._vocabulary.continuing.numel()].bitwise_and_(self._vocabulary.continuing)
