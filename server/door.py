"""Everything between a well-formed request and the engine: readiness, admission, live requests. No protocol."""

import asyncio
import enum
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from pressd.runtime.report import EngineInfo, StepStats
from pressd.server import measure, wire
from pressd.server import metrics as m
from pressd.server.admission import Admission, Ticket
from pressd.server.asked import Asked, ChatPrompt, TextPrompt, TokenPrompt, engine_refusal, engine_request
from pressd.server.detokenize import Detokenizer
from pressd.server.engine_client import EngineClient, EngineCommand
from pressd.server.errors import Refusal, duplicate_id, invalid, not_found, unavailable
from pressd.server.generation import Generation
from pressd.server.model_card import ModelCard, read_card
from pressd.server.settings import Settings
from pressd.server.text import ChatError, Encoding, Text

log = logging.getLogger("pressd.door")
T = TypeVar("T")

# What a client is told to wait, in seconds: a model loads for many seconds; beside a draining server there are others.
STARTING_RETRY_AFTER = 5.0
DRAINING_RETRY_AFTER = 1.0
# Starts of the engine that may fail in a row, and seconds that a step may take, before the process counts as broken.
MAX_FAILED_STARTS = 5
STEP_WATCHDOG = 300.0


class Phase(enum.Enum):
    """Whether requests are taken."""

    STARTING = enum.auto()
    READY = enum.auto()
    ENGINE_DOWN = enum.auto()
    DRAINING = enum.auto()


class Door:
    """One served model. `changed` is set whenever `phase` may have changed."""

    def __init__(self, settings: Settings, metrics: m.Metrics, factory: str) -> None:
        self.settings = settings
        self.metrics = metrics
        self.changed = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.info: EngineInfo | None = None
        self.card: ModelCard | None = None
        self.text: Text | None = None
        command = EngineCommand(model=settings.model, config=settings.engine_config(), factory=factory)
        self.engine = EngineClient(command, self)
        self.admission = Admission(
            max_requests=settings.max_batch + settings.max_queue_requests, max_waiting_tokens=settings.max_queue_tokens
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")
        self._engine_up = False
        self._draining = False
        self._retry_after = STARTING_RETRY_AFTER
        self._stats: StepStats | None = None
        self._last_report = time.monotonic()
        self._numbers = itertools.count()
        self._by_engine_id: dict[str, tuple[Generation, Ticket]] = {}
        self._by_request_id: dict[str, Generation] = {}
        measure.begin(metrics)

    @property
    def phase(self) -> Phase:
        """Whether requests are taken now."""
        if self._draining:
            return Phase.DRAINING
        if self._engine_up and self.card is not None:
            return Phase.READY
        return Phase.ENGINE_DOWN if self.engine.num_starts and not self._engine_up else Phase.STARTING

    @property
    def is_alive(self) -> bool:
        """False when only a new process can help: the engine cannot be started, or hangs in a step."""
        return self.engine.num_failed_starts < MAX_FAILED_STARTS and self.step_age() < STEP_WATCHDOG

    @property
    def num_live(self) -> int:
        """Requests whose client still waits for something."""
        return len(self._by_engine_id)

    def step_age(self) -> float:
        """Seconds since the engine's last report, 0 while nothing is asked of it."""
        return time.monotonic() - self._last_report if self._by_engine_id else 0.0

    def require_ready(self) -> tuple[EngineInfo, ModelCard]:
        """Return what is served; raises Refusal while nothing is taken."""
        if self._draining:
            raise unavailable("DRAINING", "the server is shutting down; ask another one", DRAINING_RETRY_AFTER)
        if self.engine.num_starts and not self._engine_up:
            raise unavailable("ENGINE_DOWN", "the engine died and is being restarted", self._retry_after)
        if self.info is None or self.card is None:
            raise unavailable("STARTING", "the model is being loaded", self._retry_after)
        return self.info, self.card

    @property
    def version(self) -> str:
        """Identity of the artifact, empty until it is loaded."""
        return self.info.artifact_id if self.info else ""

    def require_model(self, name: str) -> None:
        """Raise Refusal unless `name` is empty, the served name, or that with @version."""
        served = self.settings.served_name
        if name not in ("", served, f"{served}@{self.version}"):
            raise not_found("MODEL_NOT_FOUND", f"model {name!r} is not served here; {served!r} is")

    def require_text(self, field: str) -> Text:
        """Return the tokenizer; raises Refusal if the model has none."""
        if self.text is None:
            raise invalid(field, "this model has no tokenizer; send token_ids, and set output.text to false")
        return self.text

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run slow work on text beside the event loop, one piece at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def run(self) -> None:
        """Load the model and keep its engine alive until cancelled; raises EngineStartError or ValueError."""
        loading = asyncio.ensure_future(self._load())
        running = asyncio.ensure_future(self.engine.run())
        try:
            await asyncio.gather(loading, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        card = await self.in_thread(lambda: read_card(self.settings.model))
        self.text = await self.in_thread(lambda: Text.load(self.settings.model))
        for name in card.not_applied:
            log.warning("generation_config.json asks for what this build does not do", extra={"field": name})
        self.card = card
        self._describe()

    @asynccontextmanager
    async def generation(self, asked: Asked, arrival: float) -> AsyncIterator[Generation]:
        """Queue a request for the length of a block; leaving the block frees all it holds. Raises Refusal."""
        self.require_ready()
        self.require_model(asked.model)
        if asked.request_id in self._by_request_id:
            raise duplicate_id(asked.request_id)
        with self.admission.enter() as ticket:
            ids = await self._encode(asked.prompt)
            info, card = self.require_ready()  # tokenising took a while
            if asked.request_id in self._by_request_id:
                raise duplicate_id(asked.request_id)
            engine_id = str(next(self._numbers))
            request = engine_request(asked, ids, info=info, card=card, engine_id=engine_id, arrival=arrival)
            generation = Generation(
                request_id=asked.request_id,
                engine_id=engine_id,
                prompt_field=asked.prompt.field,
                num_prompt_tokens=len(ids),
                seed=request.sampling.seed,
                arrival=arrival,
                detokenizer=self._detokenizer(asked),
            )
            ticket.wait_with(len(ids))
            self._enter(generation, ticket)
            try:
                self.engine.submit(request)
                yield generation
            finally:
                self._leave(generation)

    def drain(self) -> None:
        """Take nothing new from now on; `idle` is set when the last request has left."""
        self._draining = True
        self.changed.set()

    def cancel(self, request_id: str) -> bool:
        """End a live request with what exists; False if there is none of that name."""
        generation = self._by_request_id.get(request_id)
        if generation is not None:
            generation.cancel()
        return generation is not None

    def fail_all(self, refusal: Refusal) -> None:
        """End all live requests with a status."""
        for generation, _ in self._by_engine_id.values():
            generation.fail(refusal)

    def engine_ready(self, info: EngineInfo) -> None:
        """The engine takes requests."""
        if self.engine.num_starts > 1:
            self.metrics.add(m.RESTARTS)
        self.info = info
        self._stats = None
        self._engine_up = True
        self._describe()
        log.info("engine is ready", extra={"device": info.device, "artifact": info.artifact_id})

    def engine_stepped(self, report: wire.Stepped) -> None:
        """The engine made a step, or obeyed while it had nothing to do."""
        assert self.info is not None
        self._last_report = now = time.monotonic()
        measure.step(self.metrics, report.step.stats, self._stats)
        measure.gauges(self.metrics, report.step.stats, self.info)
        self._stats = report.step.stats
        for output in report.step.outputs:
            generation, ticket = self._by_engine_id.get(output.request_id, (None, None))
            if generation is None or ticket is None:
                continue  # it left while the step ran
            ticket.begun()
            if output.token_ids:
                measure.tokens(self.metrics, generation, len(output.token_ids), now)
            generation.push(output, now)
        for rejection in report.rejections:
            generation, _ = self._by_engine_id.get(rejection.request_id, (None, None))
            if generation is not None:
                generation.fail(engine_refusal(rejection.field, rejection.message, generation.prompt_field))

    def engine_down(self, cause: str, retry_after: float) -> None:
        """The engine died: so do its requests, and nothing is taken until it is back."""
        self._engine_up = False
        self._retry_after = retry_after + (sum(self.info.load_seconds.values()) if self.info else 0.0)
        self.fail_all(unavailable("ENGINE_DOWN", f"the engine died: {cause}", self._retry_after))
        for series in (m.RUNNING, m.WAITING, m.KV_USAGE, m.KV_BLOCKS, m.KV_USED):
            self.metrics.forget(series)
        self.changed.set()

    def _describe(self) -> None:
        if self._engine_up and self.info is not None and self.card is not None:
            measure.model(self.metrics, self.info, self.card)
        self.changed.set()

    async def _encode(self, prompt: TextPrompt | TokenPrompt | ChatPrompt) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            return prompt.ids
        encoding = await self.encode(prompt)
        return encoding.ids

    async def encode(self, prompt: TextPrompt | ChatPrompt, *, add_special_tokens: bool = True) -> Encoding:
        """Tokenise a text, or a conversation by the model's template; raises Refusal."""
        text = self.require_text(prompt.field)
        if isinstance(prompt, TextPrompt):
            return await self.in_thread(lambda: text.encode(prompt.text, add_special_tokens=add_special_tokens))
        try:
            return await self.in_thread(lambda: text.encode_chat(prompt.messages))
        except ChatError as error:
            raise invalid(prompt.field, str(error)) from None

    def _detokenizer(self, asked: Asked) -> Detokenizer | None:
        if not asked.want_text and not asked.stop:
            return None
        text = self.require_text("output.text" if asked.want_text else "stopping.stop")
        return Detokenizer(text.bytes_of_token, asked.stop)

    def _enter(self, generation: Generation, ticket: Ticket) -> None:
        if not self._by_engine_id:
            self._last_report = time.monotonic()
        self._by_engine_id[generation.engine_id] = generation, ticket
        self._by_request_id[generation.request_id] = generation
        self.idle.clear()

    def _leave(self, generation: Generation) -> None:
        del self._by_engine_id[generation.engine_id]
        del self._by_request_id[generation.request_id]
        if not generation.engine_is_done:
            self.engine.abort(generation.engine_id)
        measure.closed(self.metrics, generation)
        if not self._by_engine_id:
            self.idle.set()
