"""Who may come in: as many sequences as there are places in the batch and the queue, and so many waiting tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

from pressd.server.errors import exhausted, invalid

# What a refused client is told to wait, in seconds: about one short answer.
RETRY_AFTER = 1.0


class Ticket:
    """One request inside. Its prompt counts as waiting until the engine has begun with it."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._num_tokens = 0

    def wait_with(self, num_tokens: int) -> None:
        """Queue a prompt; raises Refusal if too many tokens wait. A prompt always may if no other waits."""
        waiting = self._admission.num_waiting_tokens
        if waiting and waiting + num_tokens > self._admission.max_waiting_tokens:
            raise exhausted("QUEUE_FULL", f"{waiting} prompt tokens are waiting; try again later", RETRY_AFTER)
        self._num_tokens = num_tokens
        self._admission.num_waiting_tokens += num_tokens

    def begun(self) -> None:
        """The prompt waits no more."""
        self._admission.num_waiting_tokens -= self._num_tokens
        self._num_tokens = 0


class Admission:
    """Counts who is inside. Bounds are on requests, running or waiting, and on waiting prompt tokens.

    A request of several sequences counts as so many requests.
    """

    def __init__(self, *, max_requests: int, max_waiting_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_waiting_tokens = max_waiting_tokens
        self.num_requests = 0
        self.num_waiting_tokens = 0

    @contextmanager
    def enter(self, num_sequences: int = 1) -> Iterator[Ticket]:
        """Come in for the length of a block; raises Refusal if there is no place."""
        if num_sequences > self.max_requests:
            problem = f"it is {num_sequences}, and this server holds {self.max_requests} sequences of all requests"
            raise invalid("sampling.num_sequences", problem)
        if self.num_requests + num_sequences > self.max_requests:
            raise exhausted("QUEUE_FULL", f"{self.num_requests} requests are inside; try again later", RETRY_AFTER)
        self.num_requests += num_sequences
        ticket = Ticket(self)
        try:
            yield ticket
        finally:
            ticket.begun()
            self.num_requests -= num_sequences
