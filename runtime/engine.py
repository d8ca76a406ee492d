"""The engine: requests in, tokens out, one synchronous step at a time."""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, KeysView
from collections.abc import Sequence as Many
from pathlib import Path

import torch

from pressd.runtime.callers import Callers
from pressd.runtime.completion import Completion, Piece, Prompt
from pressd.runtime.config import EngineConfig
from pressd.runtime.constraints import ConstraintError
from pressd.runtime.emission import NOT_FINITE, emit, report
from pressd.runtime.errors import RequestError
from pressd.runtime.guides import Guides, reason_of
from pressd.runtime.kernels.compilations import Compilations
from pressd.runtime.params import Constraint, SamplingParams, StoppingParams
from pressd.runtime.report import StepResult, StepStats
from pressd.runtime.request import FinishReason, Request, RequestOutput
from pressd.runtime.runner import Launched, Outcome
from pressd.runtime.scheduler import Scheduler, StepPlan
from pressd.runtime.sequence import Sequence
from pressd.runtime.startup import EngineParts, start
from pressd.runtime.validation import check_request, max_length

# Seconds that a step without work waits for a grammar that is being compiled.
COMPILE_WAIT = 0.02


class Engine:
    """Serves one model. Synchronous and for one thread: callers add requests between steps."""

    def __init__(self, parts: EngineParts, config: EngineConfig, *, path: Path | None = None) -> None:
        """`path` is the model's directory, for the tokenizer of `generate` and `stream`; None: token ids only."""
        self.info = parts.info
        self._runner, self._kv, self._budget = parts.runner, parts.kv, parts.budget
        self._scheduler = Scheduler(
            self._kv, self._budget, max_batch=config.max_batch, max_step_tokens=config.max_step_tokens
        )
        self._guides = Guides(parts.compiler, self.info.vocab_size, self._runner.decoder.device)
        # With overlap, a step is launched before the results of the one before it are read.
        on_gpu = self._runner.decoder.device.type == "cuda"
        self._depth = int(on_gpu if config.overlap is None else config.overlap)
        self._shares_prompts = config.prefix_cache
        self._in_flight: deque[tuple[Launched, float]] = deque()  # and the seconds that planning it took
        self._live: dict[str, list[Sequence]] = {}
        self._serial = itertools.count()
        self._numeric_errors = 0
        self._callers = Callers(path)
        self._compilations = Compilations()  # of kernels, from now on: all that are needed should be there
        self.num_steps = 0

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """Load an artifact or a plain Hugging Face directory; raises ArtifactError or ValueError, one line each."""
        config = config or EngineConfig()
        return cls(start(Path(path), config), config, path=Path(path))

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._in_flight)

    @property
    def live_request_ids(self) -> KeysView[str]:
        """Requests that are queued or running, as they are when it is read."""
        return self._live.keys()

    def validate(self, request: Request) -> None:
        """Raise RequestError if the request could never run here, however long it waited."""
        check_request(request, self.info)
        sequence = self._sequence(request, 0, None)
        if sequence.num_prompt_tokens > self.info.kv_tokens:
            raise RequestError(
                "prompt",
                f"has {sequence.num_prompt_tokens} tokens and the whole KV pool holds {self.info.kv_tokens}; "
                "shorten it or serve with more --kv-memory",
            )
        if not self._scheduler.fits(sequence):
            raise RequestError(
                "max_new_tokens",
                f"the request may reach {sequence.max_length} tokens and the whole KV pool holds "
                f"{self.info.kv_tokens}; ask for fewer tokens or serve with more --kv-memory",
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestError as validate does, or for a request_id that is live already."""
        if request.request_id in self._live:
            raise RequestError("request_id", f"{request.request_id!r} is in use")
        self.validate(request)
        grammar = self._guides.submit(request.constraint)
        # The first of n computes the prompt; the others wait for it and find it in the prefix cache.
        leader = None
        for index in range(request.sampling.n):
            sequence = self._sequence(request, index, leader)
            self._live.setdefault(request.request_id, []).append(sequence)
            if grammar is None:
                self._scheduler.add(sequence)
            else:
                self._guides.keep(sequence, grammar)
            leader = leader or sequence

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Drop a request, or one of its sequences; False if it is not live.

        What it held is free when the step in flight, if any, is over.
        """
        live = self._live.get(request_id, ())
        sequences = [sequence for sequence in live if index in (None, sequence.index)]
        for sequence in sequences:
            self._end(sequence)
        return bool(sequences)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Schedule, launch, collect, emit; returns without outputs when there is nothing to do."""
        began = time.monotonic()
        self.num_steps += 1
        outputs = self._receive()
        plan = self._scheduler.schedule(began)
        planning = time.monotonic() - began
        if plan.rows:
            self._in_flight.append((self._runner.launch(plan, self._guides.masks(plan)), planning))
        elif not self._in_flight:
            self._scheduler.complete(plan.number)
            self._guides.wait(COMPILE_WAIT)
        if not self._in_flight or (plan.rows and len(self._in_flight) <= self._depth):
            return StepResult(outputs=tuple(outputs), stats=self.stats())
        done, seconds = self._in_flight.popleft()
        collecting = time.monotonic()
        outcomes = self._runner.collect(done)
        self._scheduler.complete(done.plan.number)
        now = time.monotonic()
        for outcome in outcomes:
            outputs += self._take(outcome, now)
        seconds += done.seconds + time.monotonic() - collecting
        self._budget.observe(done.plan.num_tokens, seconds)
        return StepResult(outputs=tuple(outputs), stats=self.stats(done, seconds))

    def stats(self, done: Launched | None = None, seconds: float = 0.0) -> StepStats:
        """Return the gauges and totals as they are now, with the counts of the step that just ended."""
        plan = done.plan if done else StepPlan(number=-1, rows=(), released=(), admitted=(), copies=())
        return StepStats(
            seconds=seconds,
            num_prefill_tokens=plan.num_tokens - plan.num_decode_tokens,
            num_decode_tokens=plan.num_decode_tokens,
            num_rows=len(plan.rows),
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._guides.num_pending,
            num_preempted=self._scheduler.num_preempted,
            kv_blocks_used=sum(pool.num_used for pool in self._kv.pools),
            kv_blocks_cached=sum(pool.num_cached for pool in self._kv.pools),
            kv_gathers=self._runner.num_gathers,
            kv_copied_blocks=self._kv.num_copied_blocks,
            numeric_errors=self._numeric_errors,
            preemptions=self._scheduler.num_preemptions,
            prefix_queried_tokens=self._kv.num_queried_tokens,
            prefix_hit_tokens=self._kv.num_hit_tokens,
            evicted_blocks=sum(pool.num_evicted for pool in self._kv.pools),
            host_seconds=max(0.0, seconds - done.model_seconds) if done else 0.0,
            graph="hit" if done and done.is_replay else "eager",
            late_compiles=self._compilations.count,
        )

    def flush_prefix_cache(self) -> int:
        """Forget every cached prefix; return the number of blocks that only the cache held."""
        return self._kv.flush()

    def check_integrity(self) -> None:
        """Assert that every held block belongs to live sequences, and every row to one."""
        live = [s for sequences in self._live.values() for s in sequences]
        self._scheduler.check_integrity(s for s in live if not self._guides.keeps(s))

    def generate(
        self,
        prompts: str | Many[Prompt],
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        *,
        constraint: Constraint | None = None,
        priority: int = 0,
    ) -> list[Completion]:
        """Complete prompts (one text, several texts, or several lists of token ids) together, greedily by default.

        Returns the `sampling.n` completions of each prompt, in the order of the prompts. A sequence that fails says so
        in its completion. Raises RequestError, before anything is queued, for a prompt that can never run, and
        RuntimeError while requests are live that `add` queued.
        """
        template = _template(sampling, stopping, constraint, priority)
        return self._callers.generate(self, prompts, template)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
        *,
        constraint: Constraint | None = None,
        priority: int = 0,
    ) -> Iterator[Piece]:
        """Complete one prompt as `generate` does and yield its pieces as they come; it is queued with the first one.

        Closing the iterator, as leaving its loop does, aborts the request. Streams and calls of `generate` may overlap.
        """
        template = _template(sampling, stopping, constraint, priority)
        return self._callers.stream(self, prompt, template)

    def _sequence(self, request: Request, index: int, leader: Sequence | None) -> Sequence:
        return Sequence(
            request=request,
            index=index,
            max_length=max_length(request, self.info),
            order=(-request.priority, request.arrival, next(self._serial)),
            token_ids=list(request.prompt_token_ids),
            num_tokens=len(request.prompt_token_ids),
            stop_ids=frozenset(request.stopping.stop_token_ids),
            leader=leader if self._shares_prompts and not request.bypass_prefix_cache else None,
        )

    def _receive(self) -> list[RequestOutput]:
        """Queue the sequences whose grammars have been compiled; report those that end with it."""
        outputs = []
        for sequence, reason, error in self._guides.poll():
            if reason is None:
                self._scheduler.add(sequence)
            else:
                outputs.append(self._close(sequence, reason, error))
        return outputs

    def _take(self, outcome: Outcome, now: float) -> list[RequestOutput]:
        """Turn what a step has for a sequence into what its reader gets; nothing for one that is over."""
        item, sequence = outcome.item, outcome.item.sequence
        if sequence.is_over:
            return []
        scores = outcome.prompt_logprobs[max(0, sequence.num_reported_prompt_tokens - item.start - 1) :]
        if not outcome.finite:
            self._numeric_errors += 1
            return [self._fail(sequence, FinishReason.NUMERIC_ERROR, NOT_FINITE)]
        if item.epoch == sequence.epoch:
            self._kv.settle(sequence, item.stop)
        if outcome.prompt_logprobs:
            sequence.num_reported_prompt_tokens = max(sequence.num_reported_prompt_tokens, item.stop + 1)
        if not outcome.possible:
            output = self._fail(sequence, *self._guides.why_impossible(sequence))
        elif outcome.token_id is None:
            if not (item.is_first or scores):
                return []
            output = report(sequence)
        else:
            output = self._accept(sequence, outcome, now)
        return [dataclasses.replace(output, prompt_logprobs=scores) if scores else output]

    def _accept(self, sequence: Sequence, outcome: Outcome, now: float) -> RequestOutput:
        assert outcome.token_id is not None
        try:
            output = emit(sequence, outcome.token_id, outcome.logprobs, self.info, now)
        except ConstraintError as error:
            return self._fail(sequence, reason_of(error), str(error))
        if output.finish_reason is not None:
            self._end(sequence)
        return output

    def _fail(self, sequence: Sequence, reason: FinishReason, error: str) -> RequestOutput:
        self._end(sequence, forget=reason is FinishReason.NUMERIC_ERROR)
        return report(sequence, reason=reason, error=error)

    def _end(self, sequence: Sequence, *, forget: bool = False) -> None:
        """The sequence is over: let go of everything it holds."""
        if not self._guides.drop(sequence):
            self._scheduler.remove(sequence, forget=forget)
        self._forget(sequence)

    def _close(self, sequence: Sequence, reason: FinishReason, error: str | None) -> RequestOutput:
        """End a sequence that was never queued."""
        self._forget(sequence)
        return report(sequence, reason=reason, error=error)

    def _forget(self, sequence: Sequence) -> None:
        sequence.is_over = True
        siblings = self._live[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.request_id]


def _template(
    sampling: SamplingParams | None, stopping: StoppingParams | None, constraint: Constraint | None, priority: int
) -> Request:
    return Request(
        request_id="",
        prompt_token_ids=(),
        sampling=sampling or SamplingParams(temperature=0.0),
        stopping=stopping or StoppingParams(),
        constraint=constraint,
        priority=priority,
    )
