"""Runs an engine for callers in the same process: whole completions, or one as a stream."""

import dataclasses
import itertools
import operator
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.runtime.completion import Completion, Piece, Prompt
from pressd.runtime.errors import RequestError
from pressd.runtime.request import FinishReason, Request, RequestOutput, TokenLogprobs
from pressd.runtime.text import Text

if TYPE_CHECKING:
    from pressd.runtime.engine import Engine


@dataclass(slots=True)
class _Draft:
    """A completion as it grows."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    def take(self, output: RequestOutput) -> None:
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.finish_reason, self.error = output.finish_reason, output.error

    def completion(self, index: int, prompt: tuple[int, ...], text: Text) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            index=index,
            prompt_token_ids=prompt,
            token_ids=tuple(self.token_ids),
            text=text.continuation(prompt, self.token_ids),
            finish_reason=self.finish_reason,
            error=self.error,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
        )


class Callers:
    """Those who wait for completions. Whoever reads steps the engine for all, so that calls may overlap, in one thread.

    A step's outputs go to one reader only. So there is an error where a request is live that `Engine.add` queued, and
    where somebody else called `Engine.step` while a stream was open.
    """

    def __init__(self, path: Path | None) -> None:
        """`path` is the directory whose tokenizer is used; None: token ids only."""
        self._text = Text(path)
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._serial = itertools.count()
        self._num_steps = 0

    def request(self, prompt: Prompt, template: Request) -> Request:
        """Return the template with a name of its own and this prompt; raises RequestError for what is no prompt."""
        if isinstance(prompt, int):
            raise RequestError("prompts", "has a number where a prompt should be; write [[1, 2]] for one prompt of ids")
        ids = self._text.encode(prompt) if isinstance(prompt, str) else tuple(map(operator.index, prompt))
        name = f"in-process-{next(self._serial)}"
        return dataclasses.replace(template, request_id=name, prompt_token_ids=ids, arrival=time.monotonic())

    def generate(self, engine: "Engine", prompts: str | Sequence[Prompt], template: Request) -> list[Completion]:
        """Complete all prompts together; see Engine.generate."""
        requests = [self.request(p, template) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        for place, request in enumerate(requests):
            try:
                engine.validate(request)
            except RequestError as error:
                raise RequestError(f"prompts[{place}]", str(error)) from None
        num_sequences = template.sampling.n
        drafts = {request.request_id: [_Draft() for _ in range(num_sequences)] for request in requests}
        for output in self._outputs(engine, requests):
            drafts[output.request_id][output.index].take(output)
        return [
            draft.completion(index, request.prompt_token_ids, self._text)
            for request in requests
            for index, draft in enumerate(drafts[request.request_id])
        ]

    def stream(self, engine: "Engine", prompt: Prompt, template: Request) -> Iterator[Piece]:
        """Complete one prompt piece by piece; see Engine.stream."""
        request = self.request(prompt, template)
        engine.validate(request)
        return self._pieces(engine, request)

    def _pieces(self, engine: "Engine", request: Request) -> Iterator[Piece]:
        texts = [self._text.follow(request.prompt_token_ids) for _ in range(request.sampling.n)]
        outputs = self._outputs(engine, [request])
        try:
            for output in outputs:
                reason, text = output.finish_reason, texts[output.index]
                if reason is None and not output.token_ids and not output.prompt_logprobs:
                    continue  # it says only that the sequence was scheduled
                yield Piece(
                    index=output.index,
                    token_ids=output.token_ids,
                    text=None if text is None else text.push(output.token_ids, last=reason is not None),
                    finish_reason=reason,
                    error=output.error,
                    logprobs=output.logprobs,
                    prompt_logprobs=output.prompt_logprobs,
                )
        finally:
            outputs.close()

    def _outputs(self, engine: "Engine", requests: list[Request]) -> Generator[RequestOutput, None, None]:
        """Yield what the engine has for these requests until all have ended; on the way out they are gone from it."""
        with self._inbox(engine, requests) as inbox:
            remaining = sum(request.sampling.n for request in requests)
            while remaining:
                while inbox:
                    output = inbox.popleft()
                    remaining -= output.finish_reason is not None
                    yield output
                if remaining:
                    self._step(engine)
                if remaining and not inbox and not any(r.request_id in engine.live_request_ids for r in requests):
                    raise RuntimeError("a request of generate() or stream() was aborted by somebody else")

    @contextmanager
    def _inbox(self, engine: "Engine", requests: list[Request]) -> Iterator[deque[RequestOutput]]:
        if not self._inboxes:
            self._num_steps = engine.num_steps
        self._refuse_others(engine)
        inbox: deque[RequestOutput] = deque()
        try:
            for request in requests:
                engine.add(request)
                self._inboxes[request.request_id] = inbox
            yield inbox
        finally:
            for request in requests:
                engine.abort(request.request_id)
                self._inboxes.pop(request.request_id, None)
            # A step that was launched ahead still holds blocks; nobody waits for what it brings.
            while engine.has_work and not self._inboxes and not engine.live_request_ids:
                engine.step()

    def _step(self, engine: "Engine") -> None:
        self._refuse_others(engine)
        outputs = engine.step().outputs
        self._num_steps = engine.num_steps
        for output in outputs:
            self._inboxes[output.request_id].append(output)

    def _refuse_others(self, engine: "Engine") -> None:
        """Raise RuntimeError where outputs would go, or have gone, to the wrong reader."""
        if others := engine.live_request_ids - self._inboxes.keys():
            raise RuntimeError(
                f"the request {min(others)!r} was queued by add(); step() until it has ended, or abort() it, before "
                "generate() or stream()"
            )
        if engine.num_steps != self._num_steps:
            raise RuntimeError("step() was called while a stream was open and took its tokens; read the stream instead")
