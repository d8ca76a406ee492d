"""An engine without a model: it answers every prompt with the prompt itself, at the pace that a test allows.

A directory takes the model's place: `script.json` says how large it is, and these files in it steer it while it runs:

    steps     how many steps it may make in all; without the file as many as it likes
    hold      while the file is there, it does not get ready
    broken    if the file is there, it does not start, for the reason in the file
    poisoned  if the file is there, the next step fails
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pressd.runtime.config import EngineConfig
from pressd.runtime.errors import RequestError
from pressd.runtime.report import EngineInfo, KernelChoice, StepResult, StepStats
from pressd.runtime.request import FinishReason, Request, RequestOutput, TokenLogprobs

# How often the files are looked at, in seconds.
PACE = 0.001


def create(path: str, config: EngineConfig) -> "ScriptedEngine":
    """Make the engine of a directory."""
    folder = Path(path)
    if not (folder / "script.json").is_file():
        raise ValueError(f"{folder} has no script.json; write one")
    if (folder / "broken").exists():
        raise ValueError((folder / "broken").read_text())
    while (folder / "hold").exists():
        time.sleep(PACE)
    return ScriptedEngine(folder, config)


def logprobs_of(token_id: int, vocab_size: int, num_top: int) -> TokenLogprobs:
    """What this engine says of a token: a number that only it has, and its followers as alternatives."""
    top = tuple(((token_id + place) % vocab_size, -0.5 - place) for place in range(num_top))
    return TokenLogprobs(token_id=token_id, logprob=-(token_id + 1) / 8, rank=token_id + 1, top=top)


@dataclass
class _Live:
    request: Request
    index: int
    num_blocks: int
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    said: list[int] = field(default_factory=list)


class ScriptedEngine:
    """What the door asks of an engine. `burst` of the script is how many tokens a request gets in one step.

    Of n sequences each says the prompt. A constraint `choice` is followed by saying its first text's characters as ids;
    any other kind is invalid, and a choice of "" is impossible. What a flush frees is the number of requests so far.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        script = json.loads((folder / "script.json").read_text())
        self._folder = folder
        self._burst: int = script.get("burst", 1)
        self._num_steps = 0
        self._num_requests = 0
        self._waiting: list[_Live] = []
        self._running: list[_Live] = []
        self.info = EngineInfo(
            architecture="Echo",
            artifact_id="echo-1",
            device="cpu",
            dtype="float32",
            kv_dtype="float32",
            vocab_size=script["vocab_size"],
            max_context=script.get("max_context", 512),
            max_batch=config.max_batch,
            eos_token_ids=(script["eos"],),
            block_size=config.block_size,
            kv_blocks=script.get("kv_blocks", 256),
            kv_tokens=script.get("kv_blocks", 256) * config.block_size,
            kv_bytes=script.get("kv_blocks", 256) * 1024,
            weights_bytes=3 << 20,
            dense_bytes=8 << 20,
            kernels=(KernelChoice(op="linear", storage="dense", implementation="echo", layers=2, refusals=("x",)),),
            unfused_groups=0,
            load_seconds={"read": 0.5},
        )

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        # A door that checks requests as it should never sends this one; it stands for all that only the engine knows.
        if request.prompt_token_ids == (13, 13, 13):
            raise RequestError("max_new_tokens", "this prompt brings bad luck")
        length = len(request.prompt_token_ids) + (request.stopping.max_new_tokens or self.info.max_context)
        blocks = -(-min(length, self.info.max_context) // self.info.block_size)
        self._num_requests += 1
        for index in range(request.sampling.n):
            self._waiting.append(_Live(request, index, min(blocks, self.info.kv_blocks)))
        self._waiting.sort(key=lambda live: -live.request.priority)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        def stays(live: _Live) -> bool:
            return live.request.request_id != request_id or index not in (None, live.index)

        before = len(self._waiting) + len(self._running)
        self._waiting = [live for live in self._waiting if stays(live)]
        self._running = [live for live in self._running if stays(live)]
        return len(self._waiting) + len(self._running) < before

    def flush_prefix_cache(self) -> int:
        return self._num_requests

    def step(self) -> StepResult:
        if (self._folder / "poisoned").exists():
            raise RuntimeError("the step is poisoned")
        now = time.monotonic()
        while self._waiting and len(self._running) < self.info.max_batch:
            self._running.append(self._waiting.pop(0))
            self._running[-1].scheduled_at = now
        if not self._may_step():
            time.sleep(PACE)
            return StepResult(outputs=(), stats=self.stats())
        self._num_steps += 1
        num_rows = len(self._running)
        prefill = sum(len(live.request.prompt_token_ids) for live in self._running if not live.said)
        outputs = tuple(self._say(live) for live in list(self._running))
        decode = sum(len(output.token_ids) for output in outputs)
        return StepResult(outputs=outputs, stats=self.stats(PACE, prefill, decode, num_rows))

    def stats(self, seconds: float = 0.0, prefill: int = 0, decode: int = 0, rows: int = 0) -> StepStats:
        return StepStats(
            seconds=seconds,
            num_prefill_tokens=prefill,
            num_decode_tokens=decode,
            num_rows=rows,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_blocks_used=sum(live.num_blocks for live in self._running),
            num_preempted=0,
            kv_blocks_cached=0,
            kv_gathers=0,
            kv_copied_blocks=0,
            numeric_errors=0,
            preemptions=0,
            prefix_queried_tokens=0,
            prefix_hit_tokens=0,
            evicted_blocks=0,
            host_seconds=0.0,
        )

    def _may_step(self) -> bool:
        try:
            return self._num_steps < int((self._folder / "steps").read_text())
        except FileNotFoundError:
            return True

    def _say(self, live: _Live) -> RequestOutput:
        """Give a request its next tokens: the prompt, over and over if the end of sequence is to be ignored."""
        request = live.request
        prompt, stopping, allowed = request.prompt_token_ids, request.stopping, request.sampling.allowed_token_ids
        fresh: list[int] = []
        reason, matched, error = None, None, None
        if request.constraint is not None:
            invalid = request.constraint.kind != "choice"
            reason = FinishReason.CONSTRAINT_INVALID if invalid else FinishReason.CONSTRAINT_COMPLETE
            error = "this engine follows choices only" if invalid else None
            if not invalid and request.constraint.choices == ("",):
                reason, error = FinishReason.CONSTRAINT_IMPOSSIBLE, "nothing can be said"
            fresh = [] if error else [ord(c) % self.info.vocab_size for c in request.constraint.choices[0]]
        while reason is None and len(fresh) < self._burst:
            over = len(live.said) == len(prompt) and not stopping.ignore_eos
            token = self.info.eos_token_ids[0] if over else prompt[len(live.said) % len(prompt)]
            token = allowed[0] if allowed else token
            if token in stopping.stop_token_ids:
                reason, matched = FinishReason.STOP, token
                fresh += [token] if stopping.include_stop else []
            elif over:
                reason, matched = FinishReason.EOS, token
            else:
                live.said.append(token)
                fresh.append(token)
                if len(live.said) == stopping.max_new_tokens:
                    reason = FinishReason.MAX_TOKENS
                elif len(prompt) + len(live.said) >= self.info.max_context:
                    reason = FinishReason.CONTEXT_LIMIT
        is_first = not live.first_token_at
        live.first_token_at = live.first_token_at or time.monotonic()
        if reason is not None:
            self._running.remove(live)
        return RequestOutput(
            request_id=request.request_id,
            index=live.index,
            token_ids=tuple(fresh),
            finish_reason=reason,
            matched_token_id=matched,
            error=error,
            logprobs=self._logprobs(fresh, request) if request.sampling.logprobs else (),
            prompt_logprobs=self._logprobs(prompt[1:], request)
            if request.sampling.prompt_logprobs and is_first and live.index == 0
            else (),
            num_cached_tokens=int(request.cache_salt or 0) if request.cache_salt.isdigit() else 0,
            scheduled_at=live.scheduled_at,
            first_token_at=live.first_token_at,
        )

    def _logprobs(self, ids: Iterable[int], request: Request) -> tuple[TokenLogprobs, ...]:
        return tuple(logprobs_of(token, self.info.vocab_size, request.sampling.top_logprobs) for token in ids)
