"""Holds sequences to their constraints: compiled beside the steps, a mask for each draw."""

import concurrent.futures
from collections import deque

import torch

from pressd.runtime.constraints import ConstraintCompiler, ConstraintError, Grammar, Matcher
from pressd.runtime.params import Constraint
from pressd.runtime.request import FinishReason
from pressd.runtime.sampling import TokenMasks
from pressd.runtime.scheduler import StepPlan
from pressd.runtime.sequence import Sequence

IMPOSSIBLE = "no token is left by the constraint, allowed_token_ids, bad_words and min_new_tokens together"


class Guides:
    """Gives a sequence its matcher when its grammar is compiled; until then the sequence is kept here."""

    def __init__(self, compiler: ConstraintCompiler, vocab_size: int, device: torch.device) -> None:
        self._compiler = compiler
        self._words = -(-vocab_size // 32)
        self._device = device
        self._pending: dict[Sequence, concurrent.futures.Future[Grammar]] = {}
        self._waiters: dict[concurrent.futures.Future[Grammar], list[Sequence]] = {}
        self._done: deque[concurrent.futures.Future[Grammar]] = deque()  # filled by the compiler's thread
        self._errors: dict[Sequence, ConstraintError] = {}

    @property
    def num_pending(self) -> int:
        """Sequences whose grammars are being compiled."""
        return len(self._pending)

    def submit(self, constraint: Constraint | None) -> concurrent.futures.Future[Grammar] | None:
        """Have a constraint compiled; None if there is none."""
        return None if constraint is None else self._compiler.submit(constraint)

    def keep(self, sequence: Sequence, future: concurrent.futures.Future[Grammar]) -> None:
        """Hold a sequence back until its grammar is compiled."""
        self._pending[sequence] = future
        if future in self._waiters:
            self._waiters[future].append(sequence)
        else:
            self._waiters[future] = [sequence]
            # The compiler keeps its futures, and a future its callbacks: none may hold a sequence.
            future.add_done_callback(self._done.append)

    def keeps(self, sequence: Sequence) -> bool:
        """Whether the sequence's grammar is being compiled."""
        return sequence in self._pending

    def drop(self, sequence: Sequence) -> bool:
        """Forget a sequence that is over; True if it was kept here."""
        self._errors.pop(sequence, None)
        return self._pending.pop(sequence, None) is not None

    def poll(self) -> list[tuple[Sequence, FinishReason | None, str | None]]:
        """Return the sequences whose grammars are there, with the reason and the error of those that end with it."""
        found: list[tuple[Sequence, FinishReason | None, str | None]] = []
        while self._done:
            future = self._done.popleft()
            for sequence in self._waiters.pop(future, ()):
                if self._pending.pop(sequence, None) is not None:  # else it was dropped meanwhile
                    found.append(_matched(sequence, future))
        return found

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
        # Pinned where a GPU reads it, when it comes to it: see sampling.scratch.upload.
        bits = torch.zeros(len(places), self._words, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        for row, place in enumerate(places):
            matcher = drawing[place].matcher
            assert isinstance(matcher, Matcher)
            try:
                matcher.write_mask(bits[row])
            except ConstraintError as error:
                bits[row].zero_()
                self._errors[drawing[place]] = error
        return TokenMasks(places, bits.to(self._device, non_blocking=True))

    def why_impossible(self, sequence: Sequence) -> tuple[FinishReason, str]:
        """Return why a sequence could draw nothing."""
        error = self._errors.pop(sequence, None)
        return (FinishReason.CONSTRAINT_IMPOSSIBLE, IMPOSSIBLE) if error is None else (reason_of(error), str(error))


def _matched(
    sequence: Sequence, future: concurrent.futures.Future[Grammar]
) -> tuple[Sequence, FinishReason | None, str | None]:
    """Give a sequence its matcher; see Guides.poll."""
    try:
        sequence.matcher = future.result().matcher()
    except ConstraintError as error:
        return sequence, reason_of(error), str(error)
    return sequence, FinishReason.CONSTRAINT_COMPLETE if sequence.matcher.is_complete else None, None


def reason_of(error: ConstraintError) -> FinishReason:
    """Return how a sequence ends whose constraint failed so."""
    return FinishReason.CONSTRAINT_IMPOSSIBLE if error.impossible else FinishReason.CONSTRAINT_INVALID
