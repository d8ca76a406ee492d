"""Holds sequences to their constraints: compiled beside the steps, a mask for each draw."""

import concurrent.futures

import torch

from pressd.runtime.constraints import ConstraintCompiler, ConstraintError, Grammar, Matcher
from pressd.runtime.request import FinishReason
from pressd.runtime.sampling import TokenMasks
from pressd.runtime.scheduler import StepPlan
from pressd.runtime.sequence import Sequence

IMPOSSIBLE = "no token satisfies the constraint, allowed_token_ids and bad_words together"


class Guides:
    """Gives a sequence its matcher when its grammar is compiled; until then it waits in the queue."""

    def __init__(self, compiler: ConstraintCompiler, vocab_size: int, device: torch.device) -> None:
        self._compiler = compiler
        self._words = -(-vocab_size // 32)
        self._device = device
        self._pending: dict[Sequence, concurrent.futures.Future[Grammar]] = {}
        self._errors: dict[Sequence, ConstraintError] = {}

    def begin(self, sequence: Sequence) -> None:
        """Have the sequence's constraint compiled, if it has one."""
        if sequence.request.constraint is not None:
            sequence.is_ready = False
            self._pending[sequence] = self._compiler.submit(sequence.request.constraint)

    def drop(self, sequence: Sequence) -> None:
        """The sequence is over."""
        self._pending.pop(sequence, None)
        self._errors.pop(sequence, None)

    def poll(self) -> list[tuple[Sequence, FinishReason, str | None]]:
        """Make sequences ready whose grammars are there; return those that are over with that, why, and the error."""
        ends: list[tuple[Sequence, FinishReason, str | None]] = []
        for sequence, future in [entry for entry in self._pending.items() if entry[1].done()]:
            del self._pending[sequence]
            try:
                sequence.matcher = future.result().matcher()
                if sequence.matcher.is_complete:
                    ends.append((sequence, FinishReason.CONSTRAINT_COMPLETE, None))
            except ConstraintError as error:
                ends.append((sequence, reason_of(error), str(error)))
            sequence.is_ready = True
        return ends

    def wait(self, seconds: float) -> None:
        """Wait until a grammar is compiled, if any is being compiled; at most so long."""
        if self._pending:
            concurrent.futures.wait(
                self._pending.values(), timeout=seconds, return_when=concurrent.futures.FIRST_COMPLETED
            )

    def masks(self, plan: StepPlan) -> TokenMasks | None:
        """Return what the constrained sequences of a plan may draw; for one whose matcher gives up, nothing."""
        drawing = [item.sequence for item in plan.rows if item.draws]
        places = [place for place, sequence in enumerate(drawing) if sequence.matcher is not None]
        if not places:
            return None
        bits = torch.zeros(len(places), self._words, dtype=torch.int32)
        for row, place in enumerate(places):
            matcher = drawing[place].matcher
            assert isinstance(matcher, Matcher)
            try:
                matcher.write_mask(bits[row])
            except ConstraintError as error:
                bits[row].zero_()
                self._errors[drawing[place]] = error
        return TokenMasks(places, bits.to(self._device))

    def why_impossible(self, sequence: Sequence) -> tuple[FinishReason, str]:
        """Return why a sequence could draw nothing."""
        error = self._errors.pop(sequence, None)
        return (FinishReason.CONSTRAINT_IMPOSSIBLE, IMPOSSIBLE) if error is None else (reason_of(error), str(error))


def reason_of(error: ConstraintError) -> FinishReason:
    """Return how a sequence ends whose constraint failed so."""
    return FinishReason.CONSTRAINT_IMPOSSIBLE if error.impossible else FinishReason.CONSTRAINT_INVALID
