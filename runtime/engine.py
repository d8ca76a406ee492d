"""The engine: requests in, tokens out, one synchronous step at a time."""

import time
from collections.abc import Sequence as Tokens
from pathlib import Path

import torch

from pressd.runtime.blocks import BlockPool
from pressd.runtime.config import EngineConfig
from pressd.runtime.errors import RequestError
from pressd.runtime.request import (
    EngineInfo,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    StepResult,
    StepStats,
    StoppingParams,
)
from pressd.runtime.runner import Runner
from pressd.runtime.sampling import sample
from pressd.runtime.scheduler import Scheduled, Scheduler
from pressd.runtime.sequence import Sequence
from pressd.runtime.startup import start


class Engine:
    """Serves one model. Synchronous and for one thread: callers add requests between steps."""

    def __init__(self, runner: Runner, info: EngineInfo, config: EngineConfig) -> None:
        self.info = info
        self._runner = runner
        self._pool = BlockPool(info.kv_blocks, info.block_size)
        self._scheduler = Scheduler(self._pool, max_batch=config.max_batch, max_step_tokens=config.max_step_tokens)
        self._live: dict[str, Sequence] = {}
        self._numeric_errors = 0

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """Load an artifact or a plain Hugging Face directory; raises ArtifactError or ValueError, one line each."""
        config = config or EngineConfig()
        runner, info = start(Path(path), config)
        return cls(runner, info, config)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def validate(self, request: Request) -> None:
        """Raise RequestError if the request could never run here, however long it waited."""
        prompt = request.prompt_token_ids
        if not prompt:
            raise RequestError("prompt", "is empty; at least one token is needed")
        if len(prompt) >= self.info.max_context:
            raise RequestError(
                "prompt", f"has {len(prompt)} tokens; the context of {self.info.max_context} leaves no room"
            )
        for name, ids in (("prompt", prompt), ("stop_token_ids", request.stopping.stop_token_ids)):
            wrong = next((token for token in ids if not 0 <= token < self.info.vocab_size), None)
            if wrong is not None:
                raise RequestError(name, f"token id {wrong} is outside the vocabulary of {self.info.vocab_size}")
        needed = self._scheduler.blocks_needed(self._sequence(request))
        if needed > self.info.kv_blocks:
            raise RequestError(
                "max_new_tokens",
                f"the request may need {needed * self.info.block_size} tokens of KV and the whole pool holds "
                f"{self.info.kv_blocks * self.info.block_size}; ask for fewer tokens or serve with more --kv-memory",
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestError as validate does, or for a request_id that is live already."""
        if request.request_id in self._live:
            raise RequestError("request_id", f"{request.request_id!r} is in use")
        self.validate(request)
        sequence = self._sequence(request)
        self._live[request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request; its blocks are free when this returns. False if it is not live."""
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        self._scheduler.remove(sequence)
        return True

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Schedule, run, sample, emit; returns at once, without outputs, when there is nothing to do."""
        began = time.monotonic()
        step = self._scheduler.schedule(began)
        if not step:
            return StepResult(outputs=(), stats=self.stats())
        logits = self._runner.run(step)
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        ends = [scheduled.sequence for scheduled in step if scheduled.reaches_end]
        tokens = sample(logits, [s.request.sampling for s in ends], [len(s.token_ids) for s in ends])
        now = time.monotonic()
        counts = _counts(step)
        outputs = [_begun(item.sequence) for item in step if item.is_first and not item.reaches_end]
        for scheduled in step:
            scheduled.sequence.num_computed_tokens += scheduled.num_tokens
        outputs += [self._emit(*drawn, now) for drawn in zip(ends, tokens, finite, strict=True)]
        return StepResult(outputs=tuple(outputs), stats=self.stats(now - began, *counts))

    def stats(self, seconds: float = 0.0, prefill: int = 0, decode: int = 0, rows: int = 0) -> StepStats:
        """Return the gauges as they are now, with the counts of the step that just ended."""
        return StepStats(
            seconds=seconds,
            num_prefill_tokens=prefill,
            num_decode_tokens=decode,
            num_rows=rows,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_blocks_used=self._pool.num_used,
            kv_gathers=self._runner.num_gathers,
            numeric_errors=self._numeric_errors,
        )

    def generate(
        self,
        prompts: Tokens[Tokens[int]],
        sampling: SamplingParams | None = None,
        stopping: StoppingParams | None = None,
    ) -> list[list[int]]:
        """Complete all prompts together and return their new tokens."""
        sampling, stopping = sampling or SamplingParams(temperature=0.0), stopping or StoppingParams()
        answers: dict[str, list[int]] = {f"generate-{index}": [] for index in range(len(prompts))}
        for request_id, prompt in zip(answers, prompts, strict=True):
            self.add(
                Request(
                    request_id=request_id,
                    prompt_token_ids=tuple(prompt),
                    sampling=sampling,
                    stopping=stopping,
                    arrival=time.monotonic(),
                )
            )
        while self.has_work:
            for output in self.step().outputs:
                if output.finish_reason is FinishReason.NUMERIC_ERROR:
                    raise ArithmeticError(f"{output.request_id}: the model's logits are not finite")
                answers[output.request_id] += output.token_ids
        return list(answers.values())

    def check_integrity(self) -> None:
        """Assert that every used block belongs to exactly one live sequence."""
        self._pool.check_integrity()
        held = [block for sequence in self._live.values() for block in sequence.block_table]
        assert len(held) == len(set(held)) == self._pool.num_used

    def _sequence(self, request: Request) -> Sequence:
        prompt, stopping = request.prompt_token_ids, request.stopping
        limit = self.info.max_context
        if stopping.max_new_tokens is not None:
            limit = min(limit, len(prompt) + stopping.max_new_tokens)
        return Sequence(request=request, max_length=limit, token_ids=list(prompt))

    def _emit(self, sequence: Sequence, token: int, finite: bool, now: float) -> RequestOutput:
        """Append a drawn token to its sequence, decide whether that ends it, and say so."""
        request, reason, matched = sequence.request, None, None
        if not finite:
            reason = FinishReason.NUMERIC_ERROR
            self._numeric_errors += 1
        elif token in request.stopping.stop_token_ids:
            reason, matched = FinishReason.STOP, token
        elif token in self.info.eos_token_ids and not request.stopping.ignore_eos:
            reason, matched = FinishReason.EOS, token
        else:
            sequence.token_ids.append(token)
            sequence.first_token_at = sequence.first_token_at or now
            if len(sequence.token_ids) >= sequence.max_length:
                wanted = request.stopping.max_new_tokens
                produced = len(sequence.token_ids) - sequence.num_prompt_tokens
                reason = FinishReason.MAX_TOKENS if produced == wanted else FinishReason.CONTEXT_LIMIT
        if reason is not None:
            self.abort(request.request_id)
        return RequestOutput(
            request_id=request.request_id,
            token_ids=(token,) if finite and matched is None else (),
            finish_reason=reason,
            matched_token_id=matched,
            scheduled_at=sequence.scheduled_at,
            first_token_at=sequence.first_token_at,
        )


def _begun(sequence: Sequence) -> RequestOutput:
    """Report that a request left the queue, before it has a token."""
    return RequestOutput(request_id=sequence.request.request_id, scheduled_at=sequence.scheduled_at)


def _counts(step: list[Scheduled]) -> tuple[int, int, int]:
    """Return (prefill tokens, decode tokens, rows) of a step."""
    decode = sum(s.num_tokens == 1 and s.sequence.num_computed_tokens >= s.sequence.num_prompt_tokens for s in step)
    return sum(s.num_tokens for s in step) - decode, decode, len(step)
