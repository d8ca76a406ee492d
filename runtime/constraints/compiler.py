"""Compiles constraints away from the engine's thread and keeps what it compiled."""

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from pressd.runtime.constraints.error import ConstraintError
from pressd.runtime.constraints.matcher import Grammar
from pressd.runtime.constraints.notation import serialize
from pressd.runtime.constraints.vocabulary import Vocabulary
from pressd.runtime.params import Constraint

_log = logging.getLogger(__name__)
NUM_THREADS = 2
# Grammars are compiled by recursion whose depth is the user's; only what is touched takes memory.
STACK_BYTES = 256 << 20
_starting = threading.Lock()


class ConstraintCompiler:
    """Compiles each constraint once, in threads of its own, and remembers the last `capacity` of them, errors too."""

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int], *, capacity: int = 64) -> None:
        """Note where the tokenizer is; it is read when the first constraint arrives."""
        self._source = (path, vocab_size, tuple(eos_token_ids))
        self._capacity = capacity
        self._vocabulary: Vocabulary | None = None
        self._reading = threading.Lock()
        self._lock = threading.Lock()  # of all below
        self._cache: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()
        self._jobs: queue.SimpleQueue[tuple[Constraint, Future[Grammar]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def submit(self, constraint: Constraint) -> Future[Grammar]:
        """Return the constraint's grammar to come; equal constraints share one, so it cannot be cancelled.

        It raises ConstraintError if the constraint is refused. Safe from any thread.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the constraint compiler is closed")
            known = self._cache.get(constraint)
            if known is not None and not _is_worn_out(known):
                self._cache.move_to_end(constraint)
                return _afresh(known)
            future: Future[Grammar] = Future()
            future.set_running_or_notify_cancel()
            self._cache[constraint] = future
            self._cache.move_to_end(constraint)
            while len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
            if len(self._threads) < NUM_THREADS:
                self._threads.append(_start(self._work))
            self._jobs.put((constraint, future))
            return future

    def close(self) -> None:
        """Refuse what has not begun, and wait for what has."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for job in iter(self._next_waiting, None):
                job[1].set_exception(ConstraintError(f"{job[0].kind}: the engine has stopped"))
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._cache.clear()

    def _next_waiting(self) -> tuple[Constraint, Future[Grammar]] | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            constraint, future = job
            try:
                vocabulary = self._read()
                future.set_result(Grammar(constraint.kind, serialize(constraint), vocabulary))
            except ConstraintError as error:
                self._fail(constraint, future, error)
            except BaseException as error:  # llguidance's panics are no Exceptions, and this thread must go on
                _log.exception("compiling a constraint of kind %s", constraint.kind)
                message = f"{constraint.kind}: cannot be compiled: {error}"
                self._fail(constraint, future, ConstraintError(message, lasting=False))

    def _read(self) -> Vocabulary:
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(*self._source)
            return self._vocabulary

    def _fail(self, constraint: Constraint, future: Future[Grammar], error: ConstraintError) -> None:
        with self._lock:
            if not error.lasting and self._cache.get(constraint) is future:
                del self._cache[constraint]
        future.set_exception(error)


def _is_worn_out(future: Future[Grammar]) -> bool:
    return future.done() and future.exception() is None and future.result().is_worn_out


def _afresh(future: Future[Grammar]) -> Future[Grammar]:
    """Return the future itself, or its failure anew: an error that is raised twice keeps the frames of both."""
    error = future.exception() if future.done() else None
    if not isinstance(error, ConstraintError):
        return future
    failed: Future[Grammar] = Future()
    failed.set_exception(ConstraintError(str(error), impossible=error.impossible))
    return failed


def _start(target: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread with a deep stack; how deep is a setting of the process."""
    thread = threading.Thread(target=target, name="constraints", daemon=True)
    with _starting:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return thread
